"""``device="cuda"`` if Numba's CUDA simulator replaces the GPUs (``NUMBA_ENABLE_CUDASIM=1``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.format import Format
from numba_dequant.kernels.dequantize import make_kernel
from numba_dequant.kernels.launch_shape import launch_shape
from numba_dequant.kernels.numba_cuda import cuda


@dataclass(frozen=True)
class SimulatedTensor:
    """A result of the simulator, in place of a `DeviceTensor`."""

    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, rows first."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype."""
        return self.values.dtype

    def copy_to_host(self) -> NDArray[Any]:
        """A copy of the values."""
        return self.values.copy()


def dequantize_into(data: NDArray[np.uint8], fmt: Format, dtype: str, out: NDArray[Any], mapping: str) -> None:
    """Run the kernel on host arrays, thread by thread."""
    if not out.size:
        return
    shape = launch_shape(mapping, fmt)
    kernel = cuda.jit(make_kernel(fmt, dtype, shape))
    on_device = cuda.to_device(out)
    kernel[shape.thread_blocks(out.size), shape.threads](cuda.to_device(data), out.size, on_device)
    out[:] = on_device.copy_to_host()
