"""Reads what one rank or device of several needs, in batches, in the order of the file."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.loading.files import check_complete
from numba_dequant.loading.requests import Request, request_for, slice_rows
from numba_dequant.parallel.routes import Read, Routes, Share

AHEAD = 16
"""Tensors that are read ahead while the tensors of a batch are exchanged, if there are several batches."""

Load = Callable[[Sequence[Request], int | None], Generator[Any, None, None]]
"""Loads requests in order; the number says how many of them to read ahead, and None that memory is no concern."""


def part_of(tensor: TensorInfo, share: Share) -> TensorInfo:
    """What a rank holds of a tensor, if its bytes are contiguous."""
    return slice_rows(tensor, slice(share.start, share.stop)) if share.dim is not None else tensor


def range_of(tensor: TensorInfo, read: Read) -> TensorInfo:
    """A range of the bytes of a tensor, as a tensor of one dimension."""
    n_elements = read.n_bytes // tensor.format.type_size * tensor.format.block_size
    return tensor._replace(
        shape=(n_elements,), offset=tensor.offset + read.first, n_bytes=read.n_bytes, n_elements=n_elements
    )


class PartReader:
    """The reads of one rank. Two shares that need the same bytes have one read, and an empty share has none.

    Args:
        tensors: the tensors of the model.
        routes: who reads which bytes.
        rank: the rank.
        own: makes the request for a part that needs no exchange.
        load_own: loads these requests.
        load_pieces: loads what is exchanged; the same as `load_own` if one load can do both.

    Attributes:
        n_bytes: the bytes that are read.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        routes: Routes,
        rank: int,
        own: Callable[[TensorInfo], Request],
        load_own: Load,
        load_pieces: Load,
    ) -> None:
        direct: list[tuple[int, str | Read, Request]] = []
        for share in routes.shares[rank]:
            if share.n_bytes and routes.is_direct(rank, share):
                tensor = tensors[share.name]
                check_complete(tensor)
                direct.append((share.index, share.name, own(part_of(tensor, share))))
        reads: dict[Read, Request] = {}
        for other, share in routes.exchanged(rank):
            if routes.source_of(other) == rank:
                tensor, read = tensors[share.name], routes.read(other, share)
                check_complete(tensor)
                reads[read] = request_for(range_of(tensor, read), None)
        pieces: list[tuple[int, str | Read, Request]] = [(read.index, read, request) for read, request in reads.items()]
        if load_own is load_pieces:
            loads = [(sorted(direct + pieces, key=lambda each: each[0]), load_own)]
        else:
            loads = [(direct, load_own), (pieces, load_pieces)]
        self.n_bytes = sum(request.tensor.n_bytes for entries, _ in loads for _, _, request in entries)
        self._routes = routes
        ahead = AHEAD if routes.n_batches > 1 else None
        self._streams = [
            (iter(entries), load([request for _, _, request in entries], ahead)) for entries, load in loads if entries
        ]
        self._next = [next(entries, None) for entries, _ in self._streams]

    def read(self, batch: int) -> tuple[dict[str, Any], dict[Read, Any]]:
        """The results of the own parts that belong to a batch, by name, and the bytes to exchange."""
        own: dict[str, Any] = {}
        pieces: dict[Read, Any] = {}
        for number, (entries, results) in enumerate(self._streams):
            while (entry := self._next[number]) is not None and self._routes.batch_of[entry[0]] == batch:
                _, key, _ = entry
                result = next(results)
                if isinstance(key, Read):
                    pieces[key] = result.data
                else:
                    own[key] = result
                self._next[number] = next(entries, None)
        return own, pieces

    def close(self) -> None:
        """Stop reading."""
        for _, results in self._streams:
            results.close()
