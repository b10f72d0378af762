"""What a call returns that computed on a GPU."""

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
    ``numba.cuda.as_cuda_array(tensor)`` share its memory, which lives as long as any of them. NumPy and Numba have no
    bfloat16 in ``__cuda_array_interface__``: DLPack carries it.

    The values are ready once `stream` has got there, and whoever takes the tensor over by DLPack waits for that on the
    GPU. Dropped memory is reused only after that stream and the stream of whoever took it over.

    Attributes:
        shape: rows first.
        dtype: the NumPy dtype; bfloat16 is that of ml_dtypes.
        stream: handle of the stream on which the values are computed.
        framework: PyTorch or CuPy, if the values were computed on its current stream for an array of its own; a call
            that takes this tensor then runs on that library's current stream too.
        memory: where they lie; tensors that were made together may share an allocation.
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
        """Address in GPU memory; 0 if there are no elements."""
        return self.memory.pointer if self.size else 0

    def copy_to_host(self) -> NDArray[Any]:
        """A NumPy array of the values; waits until they are there.

        Raises:
            DeviceError: a CUDA graph is being captured on the tensor's stream.
        """
        host, gpu = np.empty(self.shape, self.dtype), self.memory.gpu
        with gpu.active():
            gpu.refuse_capture(self.stream, "values cannot be copied to the host before it runs")
            gpu.copy_to_host(host, self.memory.pointer, self.stream)
        return shareable(host)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype == numpy_dtype("bfloat16"):
            raise AttributeError("__cuda_array_interface__ has no bfloat16; use DLPack, e.g. torch.from_dlpack(tensor)")
        # The interface does not say on which stream the memory will be used.
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
            raise BufferError(f"this tensor is shared, not copied, and stays on cuda:{self.device}")
        if stream is not None and stream < -1:
            raise BufferError(f"expected a stream, got {stream}")
        if stream != -1:
            self._lend(stream_handle(stream))
        return export(self.memory, self.shape, self.dtype, max_version)

    def _lend(self, stream: int) -> None:
        """Let a stream use the values: it waits for them now, and their memory waits for it when it is dropped."""
        if stream == self.stream:
            return
        gpu = self.memory.gpu
        with gpu.active():
            gpu.stream_wait_stream(stream, self.stream)
            lives_on, keeper = gpu.keeper_of(stream)
            if lives_on:
                self.memory.owner.lend(stream, keeper)

    def __reduce__(self) -> NoReturn:
        raise DeviceError("a tensor on a GPU cannot be pickled; pickle what its copy_to_host() returns")

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
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceTensor(shape={self.shape}, dtype={self.dtype.name}, device='cuda:{self.device}')"
