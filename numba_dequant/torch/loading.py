"""Loads tensors of a file for PyTorch: on a GPU, on PyTorch's current stream and in memory of its allocator."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from numba_dequant.api import dequantize_many
from numba_dequant.backends.devices import DeviceSpec, available_cores, gpu_device
from numba_dequant.backends.host import HostBackend
from numba_dequant.dtypes import DEFAULT
from numba_dequant.format import Format
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.loading.groups import Groups
from numba_dequant.loading.requests import QuantizedTensor, Request, request_for
from numba_dequant.torch.checks import DTYPES


def load(requests: Sequence[Request], device: torch.device) -> Generator[Any, None, None]:
    """The results of the requests on a CPU or GPU, in order. On a GPU they are ready in the order of its stream.

    Raises:
        NumbaDequantError: as for `Model.load_all`.
    """
    if device.type != "cuda":
        from numba_dequant.loading import host_loader

        return host_loader.load(requests, HostBackend(DeviceSpec("cpu")), None, None, _ignore)
    from numba_dequant.loading import gpu_loader

    return gpu_loader.load(requests, _call_on(device), None, None, _ignore)


def load_groups(
    requests: Sequence[Request],
    on_bytes_read: Callable[[int], None],
    ends: Sequence[int],
    *,
    device: torch.device,
    sharers: int,
) -> Groups:
    """Loads the requests in groups with these ends. On a GPU, results are ready in the order of its stream.

    Args:
        requests: what to load.
        on_bytes_read: called with the number of bytes that have been read.
        ends: the ends of the groups.
        device: the device.
        sharers: the number of processes of this host that load at the same time.

    Raises:
        NumbaDequantError: as for `Model.load_all`.
    """
    threads = max(available_cores() // sharers, 2) if sharers > 1 else None
    if device.type != "cuda":
        from numba_dequant.loading import host_loader

        return host_loader.load_groups(requests, HostBackend(DeviceSpec("cpu")), threads, on_bytes_read, ends)
    from numba_dequant.loading import gpu_buffers, gpu_loader

    threads = threads and min(threads, gpu_buffers.TUNING.threads)
    return gpu_loader.load_groups(requests, _call_on(device), threads, on_bytes_read, ends)


def dequantize_own(found: Mapping[str, tuple[Tensor, Format, Tensor]], output: str, device: torch.device) -> None:
    """Dequantize contiguous blocks to contiguous tensors, both of this package's own. On a GPU, nothing is checked.

    Args:
        found: name -> blocks as uint8, their format, and the tensor for the values, which is aligned.
        output: the output type.
        device: where they all are.
    """
    if device.type != "cuda":
        blocks = {name: (data, fmt, tuple(values.shape)) for name, (data, fmt, values) in found.items()}
        dequantize_many(blocks, output, device="cpu", out={name: values for name, (*_, values) in found.items()})
        return
    from numba_dequant.backends.cuda_batch import Blocks, dequantize_blocks

    jobs = (Blocks(fmt, data.data_ptr(), values.data_ptr(), values.numel()) for data, fmt, values in found.values())
    dequantize_blocks(jobs, output, _call_on(device))


def _ignore(n_bytes: int) -> None:
    pass


def _call_on(device: torch.device) -> Any:
    """PyTorch's current stream of a GPU, for a load that returns tensors."""
    spec = gpu_device(torch.cuda.current_device() if device.index is None else device.index)
    from numba_dequant.backends import streams
    from numba_dequant.backends.gpu import gpu_at

    torch.cuda.init()
    return streams.of_torch(gpu_at(spec.index))


def request_of(tensor: TensorInfo, dtype: torch.dtype | None, device: torch.device) -> Request:
    """The request for a tensor as `dtype`, or for its blocks if `dtype` is None. `load` makes tensors on a GPU."""
    name = None if dtype is None else DTYPES.get(dtype, DEFAULT)
    if device.type == "cuda":
        return request_for(tensor, name)
    if dtype is None:
        return request_for(tensor, None, torch.empty(tensor.n_bytes, dtype=torch.uint8, device=device))
    return request_for(tensor, name, torch.empty(tensor.shape, dtype=dtype, device=device))


def tensor_of(result: Any) -> Tensor:
    """The tensor of a result of `load`; blocks in the shape (..., bytes per row)."""
    if isinstance(result, QuantizedTensor):
        result = result.data.view(blocks_shape(result.format, result.shape))
    tensor: Tensor = result
    return tensor


def blocks_shape(fmt: Format, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the blocks of a tensor as uint8: (..., bytes per row)."""
    return (*shape[:-1], fmt.n_bytes(shape[-1:]))
