"""Loads a model to several devices of one process. What several of them need is read once, and copied compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.api import backend_for, dequantize
from numba_dequant.arguments import flag_option, output_type, whole_option
from numba_dequant.backends.batch import Array
from numba_dequant.backends.devices import available_cores
from numba_dequant.backends.host import HostBackend
from numba_dequant.errors import OptionError, shown
from numba_dequant.formats import format_named
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.loading.groups import Groups
from numba_dequant.loading.parts import PartReader
from numba_dequant.loading.progress import Reporter
from numba_dequant.loading.requests import QuantizedTensor, Request, dtype_resolver, request_for
from numba_dequant.locks import compile_lock
from numba_dequant.parallel.plan import Plan
from numba_dequant.parallel.routes import Read, Routes, Share, shares_of

STREAM_BYTES = 64 << 20
"""The limit of the bytes to read and exchange in a batch of `Model.stream` is this number times `prefetch`."""

if TYPE_CHECKING:
    from numba_dequant.backends.device_tensor import DeviceTensor

    Blocks = NDArray[np.uint8] | DeviceTensor


def load_by_plan(
    model: Any,
    devices: Any,
    plan: Any,
    dtype: Any,
    keep_quantized: Any,
    threads: int | None,
    refused: Mapping[str, Any],
    batch_bytes: int | None = None,
) -> DeviceLoad:
    """A load to a list of devices, after all checks of arguments, which are as for `Model.load_all`.

    Args:
        model: the model.
        devices: the devices.
        plan: the plan, or a function that takes the model and returns one.
        dtype: one output type, or patterns with their types.
        keep_quantized: whether blocks stay compressed.
        threads: the number of threads that read.
        refused: other arguments by name, which must be None.
        batch_bytes: as for `Routes`.

    Raises:
        OptionError: there is no plan, no list of devices, an argument is wrong or cannot be combined with a plan.
        DtypeError: an output type does not exist, or a GPU does not support it.
        GgufError, ReadError: the file ends before the end of a tensor, or cannot be read.
        DeviceError: a device cannot be used.
    """
    found = _checked_plan(model, devices, plan, refused)
    kept, type_of = flag_option("keep_quantized", keep_quantized), dtype_resolver(dtype)
    n_threads = None if threads is None else whole_option("threads", threads, 1)

    def dtype_of(name: str) -> str | None:
        return None if kept else output_type(type_of(name))

    return DeviceLoad(model.tensors, found, devices, dtype_of, n_threads, batch_bytes)


def _checked_plan(model: Any, devices: Any, plan: Any, refused: Mapping[str, Any]) -> Plan:
    if plan is None:
        raise OptionError(
            "device is a list, so plan must say which device holds what; pass plan, or one device instead of a list"
        )
    if not isinstance(devices, (list, tuple)) or not devices:
        raise OptionError(f"plan needs a list of devices, such as ['cuda:0', 'cuda:1'], got device={shown(devices)}")
    for name, value in refused.items():
        if value is not None:
            raise OptionError(f"{name} cannot be combined with plan; omit {name}, or load to one device at a time")
    found = plan(model) if callable(plan) else plan
    if not isinstance(found, Plan):
        raise OptionError(f"plan must be a Plan or a function that returns one for a model, got {shown(found)}")
    if len(found.ranks) != len(devices):
        raise OptionError(
            f"the plan is for {len(found.ranks)} ranks, but there are {len(devices)} devices; pass {len(devices)} as "
            "world"
        )
    return found


class _HostPlace:
    """The host as one of several devices."""

    def __init__(self, backend: HostBackend) -> None:
        self.backend, self.device = backend, str(backend.device)

    def load(
        self, threads: int, requests: Sequence[Request], on_bytes_read: Callable[[int], None], ends: Sequence[int]
    ) -> Groups:
        with compile_lock:  # no fork during the import
            from numba_dequant.loading import host_loader

        return host_loader.load_groups(requests, self.backend, threads, on_bytes_read, ends)

    def empty(self, n_bytes: int) -> Blocks:
        return np.empty(n_bytes, np.uint8)

    def copy(self, target: Any, at: int, piece: Blocks, share: Share, n_rows: int) -> None:
        """Copy a piece, or the columns of a share in a piece of whole rows, to a position of `target`."""
        part = _on_host(piece, share, n_rows)
        target[at : at + part.size] = part


class _GpuPlace:
    """A GPU as one of several devices. All its work is on its default stream."""

    def __init__(self, backend: Any) -> None:
        from numba_dequant.backends.streams import CallStream

        self.gpu, self.device = backend.gpu, f"cuda:{backend.gpu.index}"
        self.call = CallStream(self.gpu)

    def load(
        self, threads: int, requests: Sequence[Request], on_bytes_read: Callable[[int], None], ends: Sequence[int]
    ) -> Groups:
        from numba_dequant.loading import gpu_buffers, gpu_loader

        n_threads = min(threads, gpu_buffers.TUNING.threads)
        return gpu_loader.load_groups(requests, self.call, n_threads, on_bytes_read, ends)

    def empty(self, n_bytes: int) -> Blocks:
        from numba_dequant.backends.cuda import new_memory
        from numba_dequant.backends.device_tensor import DeviceTensor

        with self.gpu.active():
            memory = new_memory(n_bytes, self.call)
        return DeviceTensor(memory, (n_bytes,), np.dtype(np.uint8), self.call.handle)

    def copy(self, target: Any, at: int, piece: Blocks, share: Share, n_rows: int) -> None:
        """As for the host. The default streams of two GPUs must already be in order."""
        with self.gpu.active():
            if isinstance(piece, np.ndarray):
                self.gpu.send(target.ptr + at, _on_host(piece, share, n_rows), self.call.handle)
            elif share.has_columns:
                step, first, last = share.columns
                self.gpu.copy_columns(target.ptr + at, last - first, piece.ptr + first, step, n_rows, self.call.handle)
            else:
                self.gpu.copy_on_device(target.ptr + at, piece.ptr, piece.nbytes, self.call.handle)


def _on_host(piece: Blocks, share: Share, n_rows: int) -> NDArray[np.uint8]:
    """The bytes of a piece, or the columns of a share in a piece of whole rows, in host memory."""
    data: NDArray[np.uint8] = piece if isinstance(piece, np.ndarray) else piece.copy_to_host()
    if not share.has_columns:
        return data
    _, first, last = share.columns
    return np.ascontiguousarray(data.reshape(n_rows, -1)[:, first:last]).reshape(-1)


class DeviceLoad:
    """One load to several devices.

    Args:
        tensors: the tensors of the model.
        plan: which device holds what. All devices are ranks of one host.
        devices: the devices, in the order of the ranks.
        dtype_of: the output type of a tensor; None for its blocks.
        threads: the number of threads that read, of all devices; None means the default.
        batch_bytes: as for `Routes`.

    Attributes:
        n_bytes: the bytes that are read.

    Raises:
        OptionError: the plan is for another model.
        DeviceError: a device cannot be used.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        plan: Plan,
        devices: Sequence[Any],
        dtype_of: Callable[[str], str | None],
        threads: int | None,
        batch_bytes: int | None,
    ) -> None:
        routes = Routes(shares_of(plan, tensors), ["here"] * len(devices), batch_bytes)
        self._routes, self._dtype_of = routes, dtype_of
        backends = [backend_for(device, None) for device in devices]
        self._places: list[_HostPlace | _GpuPlace] = [
            _HostPlace(backend) if isinstance(backend, HostBackend) else _GpuPlace(backend) for backend in backends
        ]
        self._gpus = {place.gpu.index: place for place in self._places if isinstance(place, _GpuPlace)}
        for one in self._gpus.values():
            for other in self._gpus.values():
                one.gpu.open_to(other.gpu)
        each = max((threads or max(available_cores(), 2 * len(devices))) // len(devices), 1)
        self._readers: list[PartReader] = []
        for number, place in enumerate(self._places):
            load = partial(place.load, each)
            self._readers.append(PartReader(tensors, routes, number, self._own, load, load, self._progress))
        self.n_bytes = sum(reader.n_bytes for reader in self._readers)

    def _own(self, part: TensorInfo) -> Request:
        return request_for(part, self._dtype_of(part.name))

    def run(self, report: Reporter) -> Iterator[tuple[str, list[Any]]]:
        """The name of each tensor and its parts, one for each device, in the order of the file.

        A part is None if the device does not hold the tensor.
        """
        self._report = report
        n_batches = self._routes.n_batches
        names = sorted({(share.number, share.name) for of_rank in self._routes.shares for share in of_rank})
        batch_of = self._routes.batch_of
        found: list[dict[str, Any]] = [{} for _ in self._readers]
        try:
            self._begin()
            for batch in range(n_batches + 1):
                # The next batch is read while this one is exchanged.
                if batch < n_batches:
                    self._begin()
                own, pieces = map(list, zip(*(reader.finish(batch) for reader in self._readers), strict=True))
                self._exchange(batch, pieces, own)
                del pieces
                for of_device, more in zip(found, own, strict=True):
                    of_device.update(more)
                while names and batch_of[names[0][0]] <= batch:
                    _, name = names.pop(0)
                    yield name, [of_device.pop(name, None) for of_device in found]
        finally:
            for reader in self._readers:
                reader.close()
            report.close()

    def _begin(self) -> None:
        for reader in self._readers:
            reader.begin()

    def _progress(self) -> None:
        self._report(sum(reader.n_read for reader in self._readers))

    def _exchange(self, batch: int, pieces: list[dict[Read, Any]], found: list[dict[str, Any]]) -> None:
        """Give each device what others have read for it, and add its parts to `found`."""
        routes, batch_of = self._routes, self._routes.batch_of
        self._order()
        for place, shares, transfers, own in zip(self._places, routes.shares, routes.transfers, found, strict=True):
            for share in shares:
                if not share.n_bytes and batch_of[share.number] == batch:
                    own[share.name] = self._finished(place, share, place.empty(0))
            for transfer in transfers:
                rank, share = transfer.rank, transfer.share
                if batch_of[share.number] != batch:
                    continue
                raw, at = place.empty(share.n_bytes), 0
                for other, theirs in routes.holders(rank, share).items():
                    n_rows = len(routes.rows(other, theirs)) if share.has_columns else 1
                    piece = pieces[other][routes.read(other, theirs)]
                    if not len(piece):  # there are fewer rows or blocks than ranks
                        continue
                    place.copy(raw, at, piece, share, n_rows)
                    at += n_rows * (share.columns[2] - share.columns[1]) if share.has_columns else len(piece)
                own[share.name] = self._finished(place, share, raw)
        self._order()

    def _order(self) -> None:
        """Let each GPU wait for the work that the other GPUs have now."""
        if len(self._gpus) < 2:
            return
        events = {}
        for index, place in self._gpus.items():
            with place.gpu.active():
                events[index] = place.gpu.record_event(place.call.handle)
        for index, place in self._gpus.items():
            with place.gpu.active():
                for other, event in events.items():
                    if other != index:
                        place.gpu.stream_wait_event(place.call.handle, event)

    def _finished(self, place: _HostPlace | _GpuPlace, share: Share, raw: Blocks) -> Array | QuantizedTensor:
        fmt, dtype = format_named(share.format), self._dtype_of(share.name)
        if dtype is None:
            return QuantizedTensor(raw, fmt, share.shape)
        values: Array = dequantize(raw, fmt, dtype, shape=share.shape, device=place.device)
        return values
