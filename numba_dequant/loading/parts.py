"""Reads what one rank or device of several needs, in batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from numba_dequant.formats import FORMATS
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.loading.files import check_complete
from numba_dequant.loading.groups import Groups, LoadGroups
from numba_dequant.loading.requests import Request, request_for
from numba_dequant.parallel.routes import Read, Routes, Share, read_of_span


def part_of(tensor: TensorInfo, share: Share) -> TensorInfo:
    """What a rank holds of a tensor, if its bytes are contiguous."""
    if share.dim is None:
        return tensor
    n_rows = share.stop - share.start
    return tensor._replace(
        shape=(n_rows, *tensor.shape[1:]),
        offset=tensor.offset + tensor.n_bytes * share.start // tensor.shape[0],
        n_bytes=share.n_bytes,
        n_elements=tensor.n_elements // tensor.shape[0] * n_rows,
    )


def range_of(tensor: TensorInfo, read: Read) -> TensorInfo:
    """A range of the bytes of a tensor, as a tensor of one dimension."""
    n_elements = read.n_bytes // tensor.format.type_size * tensor.format.block_size
    return tensor._replace(
        shape=(n_elements,), offset=tensor.offset + read.first, n_bytes=read.n_bytes, n_elements=n_elements
    )


def bytes_of(tensor: TensorInfo, first: int, n_bytes: int) -> TensorInfo:
    """Bytes that start in a tensor, or behind it in its file, as a tensor of bytes."""
    return tensor._replace(
        format=FORMATS["I8"], shape=(n_bytes,), offset=tensor.offset + first, n_bytes=n_bytes, n_elements=n_bytes
    )


class PartReader:
    """The reads of one rank. Two shares that need the same bytes have one read.

    Args:
        tensors: the tensors of the model.
        routes: who reads which bytes.
        rank: the rank.
        own: makes the request for a part that needs no exchange.
        load_own: loads these requests.
        load_pieces: loads what is exchanged; the same as `load_own` if one load can do both.
        on_progress: called while `finish` waits.

    Attributes:
        n_bytes: the bytes to read.
        n_read: the bytes that have been read.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        routes: Routes,
        rank: int,
        own: Callable[[TensorInfo], Request],
        load_own: LoadGroups,
        load_pieces: LoadGroups,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        # By loader: the requests, each with the batch, the number of the tensor, and the name of the own part or the
        # read that it is for.
        loads: dict[LoadGroups, list[tuple[int, int, str | Read, Request]]] = defaultdict(list)
        batch_of = routes.batch_of
        for share in routes.direct(rank):
            tensor = tensors[share.name]
            check_complete(tensor)
            request = own(part_of(tensor, share))
            loads[load_own].append((batch_of[share.number], share.number, share.name, request))
        reads: dict[Read, TensorInfo] = {}
        for transfer in routes.exchanged(rank):
            if transfer.source == rank:
                reads.setdefault(transfer.read, tensors[transfer.share.name])
        for read, tensor in reads.items():
            check_complete(tensor)
            request = request_for(range_of(tensor, read), None)
            loads[load_pieces].append((batch_of[read.number], read.number, read, request))
        in_file = list(tensors.values())
        for batch, spans in enumerate(routes.spans):
            for span in spans:
                for number in span.numbers:
                    check_complete(in_file[number])
                first = in_file[span.numbers[0]]
                read = read_of_span(span, first.name, rank)
                if read.n_bytes:
                    request = request_for(bytes_of(first, read.first, read.n_bytes), None)
                    loads[load_pieces].append((batch, read.number, read, request))
        self.n_bytes = sum(request.tensor.n_bytes for entries in loads.values() for *_, request in entries)
        self.n_read, self._on_progress = 0, on_progress
        self._fault: BaseException | None = None
        self._loads: list[tuple[list[list[str | Read]], Groups]] = []
        for load, entries in loads.items():
            entries.sort(key=lambda entry: entry[:2])
            keys: list[list[str | Read]] = [[] for _ in range(routes.n_batches + 1)]
            for batch, _, key, _ in entries:
                keys[batch].append(key)
            ends = list(accumulate(map(len, keys)))
            self._loads.append((keys, load([request for *_, request in entries], self._counter(), ends)))

    def _counter(self) -> Callable[[int], None]:
        before = 0

        def count(n_bytes: int) -> None:
            nonlocal before
            self.n_read += n_bytes - before
            before = n_bytes
            self._on_progress()

        return count

    def begin(self) -> None:
        """Begin to read the next batch. If this fails, `finish` raises the error."""
        try:
            for _, groups in self._loads:
                groups.begin()
        except Exception as error:
            self._fault = self._fault or error

    def finish(self, batch: int) -> tuple[dict[str, Any], dict[Read, Any]]:
        """Wait for a batch: the results of own parts by name, and the bytes to exchange. Finish batches in order."""
        if self._fault is not None:
            raise self._fault
        own: dict[str, Any] = {}
        pieces: dict[Read, Any] = {}
        for keys, groups in self._loads:
            for key, result in zip(keys[batch], groups.finish(), strict=True):
                if isinstance(key, Read):
                    pieces[key] = result.data
                else:
                    own[key] = result
        return own, pieces

    def close(self) -> None:
        """Stop reading."""
        for _, groups in self._loads:
            groups.close()
