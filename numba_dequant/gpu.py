"""Dequantizing on a GPU: checks, memory and the launch, in the order of one stream."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

from cuda.core import Device, Kernel, LaunchConfig, ObjectCode, Stream, launch

from numba_dequant import compiler, runtime
from numba_dequant.arguments import check_output, host_bytes, is_on_gpu, result_shape
from numba_dequant.device_tensor import DeviceTensor
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import DeviceError, DtypeError, OutputError
from numba_dequant.format import Format
from numba_dequant.mapping import mapping_named
from numba_dequant.runtime import DeviceBytes

LARGEST_GRID = 2**31 - 1

_lock = threading.Lock()


def dequantize(
    data: Any, source: Format, dtype: str, shape: Any, index: int, out: Any, stream: Any, mapping: str
) -> Any:
    """What `numba_dequant.dequantize` does on CUDA device `index`."""
    handle = runtime.stream_handle(stream)
    with runtime.current(index) as device:
        memory = runtime.view(data, handle) if is_on_gpu(data) else None
        host = host_bytes(data) if memory is None else None
        n_elements = source.n_elements(memory.n_bytes if host is None else host.size)  # type: ignore[union-attr]
        asked = result_shape(shape, n_elements, out)
        kind = source.stored_dtype or numpy_dtype(dtype)
        if memory is not None and memory.device != index:
            raise DeviceError(f"the data lies on cuda:{memory.device}, the device is cuda:{index}; copy it there first")
        target = None if out is None else _checked(out, memory, kind.name, asked, n_elements, index, handle)
        if source.decode is not None:
            _check_capability(dtype, device)

        result = out
        if target is None:
            target = runtime.allocate(n_elements * kind.itemsize, device, handle)
            result = DeviceTensor(target, asked, kind, handle)
        if memory is None:
            assert host is not None
            memory = runtime.upload(host, device, handle)
        dequantize_into(memory, source, dtype, n_elements, target, handle, mapping)
        return result


def _checked(
    out: Any, memory: DeviceBytes | None, dtype: str, shape: tuple[int, ...], n_elements: int, index: int, handle: int
) -> DeviceBytes:
    if not is_on_gpu(out):
        raise OutputError(f"out is a {type(out).__name__} on the host, the device is cuda:{index}")
    target = runtime.view(out, handle)
    if target.device != index:
        raise OutputError(f"out lies on cuda:{target.device}, the device is cuda:{index}")
    if target.is_readonly:
        raise OutputError("out is read-only")
    check_output(target.dtype, target.shape, dtype, shape, n_elements)
    if memory is not None and not (
        target.pointer + target.n_bytes <= memory.pointer or memory.pointer + memory.n_bytes <= target.pointer
    ):
        raise OutputError("out shares memory with data")
    return target


def dequantize_into(
    data: DeviceBytes, source: Format, dtype: str, n_elements: int, out: DeviceBytes, stream: int, mapping: str = "tile"
) -> None:
    """Queue the work that writes the values of `data` to `out`, both on the current device."""
    if not n_elements:
        return
    if source.stored_dtype is not None:
        runtime.copy_on_device(out.pointer, data.pointer, out.n_bytes, stream)
        return
    device = Device(data.device)
    # The kernel stores 16 bytes at a time: an odd address gets its values by way of memory of ours.
    target = runtime.allocate(out.n_bytes, device, stream) if out.pointer % 16 else out
    capability = device.compute_capability
    kernel = load_kernel(source, dtype, mapping, (capability.major, capability.minor))
    shape = mapping_named(mapping, source)
    step = LARGEST_GRID * shape.tile_elements
    for first in range(0, n_elements, step):
        count = min(step, n_elements - first)
        start = data.pointer + first // source.block_size * source.type_size
        place = target.pointer + first * (out.n_bytes // n_elements)
        config = LaunchConfig(grid=shape.thread_blocks(count), block=shape.threads)
        launch(Stream.from_handle(stream), config, kernel, start, count, place)
    if target is not out:
        runtime.copy_on_device(out.pointer, target.pointer, out.n_bytes, stream)


def _check_capability(dtype: str, device: Device) -> None:
    if dtype == "bfloat16" and device.compute_capability < (8, 0):
        found = ".".join(map(str, device.compute_capability))
        raise DtypeError(f"bfloat16 needs a GPU of compute capability 8.0 or later, this one has {found}; use float16")


def load_kernel(source: Format, dtype: str, mapping: str, capability: tuple[int, int]) -> Kernel:
    """A kernel ready to launch on GPUs of a compute capability, compiled if it must be."""
    with _lock:
        return _load_kernel(source, dtype, mapping, capability)


@lru_cache(maxsize=None)
def _load_kernel(source: Format, dtype: str, mapping: str, capability: tuple[int, int]) -> Kernel:
    name, code = compiler.cubin(source, dtype, mapping, capability)
    return ObjectCode.from_cubin(code).get_kernel(name)
