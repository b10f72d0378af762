"""`DeviceTensor`, the result of a call on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from numba_dequant.backends.dlpack import shareable
from numba_dequant.backends.foreign import LEGACY_STREAM, export, stream_handle
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import DeviceError
from numba_dequant.interop import Library, libraries_with_streams


class DeviceTensor:
    """A contiguous array in GPU memory, which PyTorch, CuPy and Numba can use without a copy.

    ``torch.from_dlpack(tensor)``, ``cupy.from_dlpack(tensor)``, ``cupy.asarray(tensor)`` and
    ``numba.cuda.as_cuda_array(tensor)`` share its memory and keep it alive. bfloat16 requires DLPack, because
    ``__cuda_array_interface__`` does not support it.

    The values are ready when `stream` has done its work. A library that imports the tensor through DLPack waits for
    this on the GPU. Dropped memory is reused only after the work on this stream and on the stream of that library.

    Attributes:
        shape: shape, rows first.
        dtype: NumPy dtype; bfloat16 is the dtype of ml_dtypes.
        stream: handle of the stream that computes the values.
        framework: PyTorch or CuPy, if the values were computed for one of its arrays on its current stream. A call
            with this tensor then also runs on the current stream of that library.
        memory: the memory; tensors of one call may share an allocation.
    """

    __slots__ = ("__weakref__", "dtype", "framework", "memory", "shape", "stream")

    def __init__(
        self,
        memory: DeviceBytes,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        stream: int,
        framework: Library | None = None,
    ) -> None:
        memory.shape, memory.dtype = shape, dtype
        self.memory = memory
        self.shape = shape
        self.dtype = dtype
        self.stream = stream
        self.framework = framework

    @property
    def device(self) -> int:
        """Ordinal of the GPU."""
        return self.memory.gpu.index

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize

    @property
    def ptr(self) -> int:
        """Address in GPU memory; 0 if the tensor is empty."""
        return self.memory.pointer if self.size else 0

    def copy_to_host(self) -> NDArray[Any]:
        """Wait for the values and copy them to a new NumPy array of the same shape and dtype.

        Raises:
            DeviceError: the tensor's stream is capturing a CUDA graph, or the GPU has failed.
        """
        host, gpu = np.empty(self.shape, self.dtype), self.memory.gpu
        with gpu.active():
            gpu.refuse_capture(self.stream, "values cannot be copied to the host before the graph runs")
            gpu.copy_to_host(host, self.memory.pointer, self.stream)
        return shareable(host)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype == numpy_dtype("bfloat16"):
            raise AttributeError("__cuda_array_interface__ has no bfloat16; use DLPack, e.g. torch.from_dlpack(tensor)")
        # The interface does not tell which stream will use the memory.
        for library in libraries_with_streams():
            self.memory.owner.lend(library.current_stream(self.device), library.keeper(self.device))
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.ptr, False),
            "strides": None,
            "stream": self.stream or LEGACY_STREAM,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.memory.gpu.index)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(
                f"this tensor can be shared on cuda:{self.device} only, without a copy; call copy_to_host() to copy it"
            )
        if stream is not None and stream < -1:
            raise BufferError(f"stream must be -1, a stream handle or None, got {stream}")
        if stream != -1:
            self._lend(stream_handle(stream))
        return export(self.memory, self.shape, self.dtype, max_version)

    def _lend(self, stream: int) -> None:
        """Let another stream use the values. It waits for them; the memory is freed after the work on that stream."""
        if stream == self.stream:
            return
        gpu = self.memory.gpu
        with gpu.active():
            gpu.stream_wait_stream(stream, self.stream)
            lives_on, keeper = gpu.keeper_of(stream)
            if lives_on:
                self.memory.owner.lend(stream, keeper)

    def __reduce__(self) -> NoReturn:
        raise DeviceError("a tensor on a GPU cannot be pickled; pickle the result of its copy_to_host()")

    def __copy__(self) -> DeviceTensor:
        return DeviceTensor(replace(self.memory), self.shape, self.dtype, self.stream, self.framework)

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        gpu = self.memory.gpu
        with gpu.active():
            memory = gpu.allocate(self.nbytes, self.stream)
            if self.size:
                gpu.copy_on_device(memory.pointer, self.ptr, self.nbytes, self.stream)
        return DeviceTensor(memory, self.shape, self.dtype, self.stream, self.framework)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor with shape () has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceTensor(shape={self.shape}, dtype={self.dtype.name}, device='cuda:{self.device}')"
