"""Reads what one rank or device of several needs, in batches, in the order of the file."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.loading.files import check_complete
from numba_dequant.loading.requests import Request, request_for, slice_rows
from numba_dequant.parallel.routes import Read, Routes, Share

Load = Callable[[Sequence[Request], Callable[[int], None], Sequence[int]], Iterator[Any]]
"""Loads requests in order, in groups with these ends. It calls a function with the number of bytes that it has read."""


class _StoppedError(Exception):
    """The load has ended, and nobody waits for this thread."""


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
    """The reads of one rank, in a thread of their own. Two shares that need the same bytes have one read.

    Args:
        tensors: the tensors of the model.
        routes: who reads which bytes.
        rank: the rank.
        own: makes the request for a part that needs no exchange.
        load_own: loads these requests.
        load_pieces: loads what is exchanged; the same as `load_own` if one load can do both.
        context: a context in which the thread works.

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
        load_own: Load,
        load_pieces: Load,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        # By loader: the requests, each with the name of the own part or the read that it is for.
        loads: dict[Load, list[tuple[int, str | Read, Request]]] = defaultdict(list)
        for share in routes.direct(rank):
            tensor = tensors[share.name]
            check_complete(tensor)
            loads[load_own].append((share.number, share.name, own(part_of(tensor, share))))
        reads: dict[Read, TensorInfo] = {}
        for transfer in routes.exchanged(rank):
            if transfer.source == rank:
                reads.setdefault(transfer.read, tensors[transfer.share.name])
        for read, tensor in reads.items():
            check_complete(tensor)
            loads[load_pieces].append((read.number, read, request_for(range_of(tensor, read), None)))
        self.n_bytes = sum(request.tensor.n_bytes for entries in loads.values() for _, _, request in entries)
        self.n_read = 0
        self._stopped = threading.Event()
        self._loads: list[tuple[list[list[str | Read]], Iterator[Any]]] = []
        for load, entries in loads.items():
            entries.sort(key=lambda entry: entry[0])
            keys: list[list[str | Read]] = [[] for _ in range(routes.n_batches)]
            for index, key, _ in entries:
                keys[routes.batch_of[index]].append(key)
            results = load([request for _, _, request in entries], self._counter(), list(accumulate(map(len, keys))))
            self._loads.append((keys, results))
        self._context, self._pool = context, ThreadPoolExecutor(1, "numba_dequant load")

    def _counter(self) -> Callable[[int], None]:
        before = 0

        def count(n_bytes: int) -> None:
            nonlocal before
            self.n_read += n_bytes - before
            before = n_bytes
            if self._stopped.is_set():
                raise _StoppedError

        return count

    def begin(self, batch: int) -> Future[tuple[dict[str, Any], dict[Read, Any]]]:
        """Read a batch: the results of own parts by name, and the bytes to exchange. Begin batches in their order."""
        return self._pool.submit(self._read, batch)

    def _read(self, batch: int) -> tuple[dict[str, Any], dict[Read, Any]]:
        own: dict[str, Any] = {}
        pieces: dict[Read, Any] = {}
        with self._context():
            for keys, results in self._loads:
                for key, result in zip(keys[batch], results, strict=False):
                    if isinstance(key, Read):
                        pieces[key] = result.data
                    else:
                        own[key] = result
        return own, pieces

    def close(self) -> None:
        """Stop reading, and wait until the thread has ended."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
        for _, results in self._loads:
            if isinstance(results, Generator):
                results.close()
