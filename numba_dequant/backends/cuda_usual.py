"""`dequantize_many` for what is usual on a GPU: `DeviceTensor`s with a format and a shape, and new results.

`cuda_batch` accepts everything and names what is wrong. Its checks of 200 tensors take longer than the GPU needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numba_dequant.arguments import has_elements
from numba_dequant.backends import cuda, streams
from numba_dequant.backends.cuda_batch import LARGE, allocate_together, launches_for
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.gpu import Gpu
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.format import Format
from numba_dequant.formats import format_named


class _Kind:
    """The tensors of one format: the memory of their blocks and of their values, and their numbers of elements."""

    __slots__ = ("block_size", "fmt", "found", "is_stored", "item_size", "result_dtype", "type_size")

    def __init__(self, fmt: Format, dtype: str) -> None:
        self.fmt, self.type_size, self.block_size = fmt, fmt.type_size, fmt.block_size
        self.is_stored = fmt.stored_dtype is not None
        self.result_dtype = fmt.result_dtype(dtype)
        self.item_size = self.result_dtype.itemsize
        self.found: list[tuple[DeviceBytes, DeviceBytes, int]] = []


def dequantize(tensors: dict[Any, Any], dtype: str, gpu: Gpu, stream: Any) -> dict[Any, Any] | None:
    """The results, or None if anything is not usual or is wrong. Nothing but time is lost then.

    Args:
        tensors: name -> (data, format, shape); the first data is a `DeviceTensor`.
        dtype: the output type.
        gpu: the GPU of the first data.
        stream: the stream, as for `numba_dequant.dequantize_many`.

    Raises:
        NumbaDequantError: as for `numba_dequant.dequantize_many`.
    """
    first = next(iter(tensors.values()))[0]
    call = streams.stream_for(stream, gpu, [first])
    handle, framework = call.handle, first.framework
    kinds: dict[Any, _Kind] = {}
    results: dict[Any, Any] = {}
    targets: list[DeviceBytes] = []
    with gpu.active():
        gpu.refuse_capture(handle, "a batch cannot be prepared during the capture; call prepare_many before it")
        for name, entry in tensors.items():
            if not isinstance(entry, tuple) or len(entry) != 3:
                break
            data, spelled, shape = entry
            if type(data) is not DeviceTensor or data.stream != handle or data.framework is not framework:
                break
            key = spelled if type(spelled) is str else id(spelled)
            kind = kinds.get(key)
            if kind is None:
                fmt = format_named(spelled)
                cuda.check_capability(dtype, fmt, gpu)
                kind = kinds[key] = _Kind(fmt, dtype)
            memory = data.memory
            n_elements = memory.n_bytes // kind.type_size * kind.block_size
            if memory.n_bytes % kind.type_size or type(shape) is not tuple or not has_elements(shape, n_elements):
                break
            if memory.gpu is not gpu or kind.is_stored or not n_elements:
                break
            target = DeviceBytes(0, n_elements * kind.item_size, gpu, None)
            results[name] = DeviceTensor(target, shape, kind.result_dtype, handle, framework)
            if n_elements >= LARGE:  # the GPU begins with it while others are checked
                allocate_together([target], call)
                cuda.launch_kernel(gpu, kind.fmt, dtype, (memory.pointer, n_elements, target.pointer), handle)
                _used([memory.owner], handle)
                continue
            targets.append(target)
            kind.found.append((memory, target, n_elements))
        else:
            allocate_together(targets, call)
            groups = [
                (kind.fmt, dtype, [(data.pointer, target.pointer, n) for data, target, n in kind.found])
                for kind in kinds.values()
                if kind.found
            ]
            launches, _tables = launches_for(groups, call)
            for launch in launches:
                launch(handle)
            owners = {id(data.owner): data.owner for kind in kinds.values() for data, *_ in kind.found}
            _used(owners.values(), handle)
            return results
    return None


def _used(owners: Iterable[Any], handle: int) -> None:
    for owner in owners:
        if hasattr(owner, "used_on"):
            owner.used_on(handle)
