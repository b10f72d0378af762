"""Dequantize every tensor of a model on a device and compare it with the reference, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant import display
from numba_dequant.api import dequantize
from numba_dequant.arguments import Job
from numba_dequant.backends.devices import DeviceSpec
from numba_dequant.errors import DeviceError
from numba_dequant.format import Format
from numba_dequant.model import Model


@dataclass
class Row:
    """The result for all tensors of one format."""

    format: Format
    tensors: int = 0
    elements: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    different: int = 0
    worst: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether all bits are equal; two NaNs count as equal."""
        return not self.different

    @property
    def speed(self) -> float:
        """Bytes read and written per second, in GB/s."""
        return (self.bytes_in + self.bytes_out) / self.seconds / 1e9 if self.seconds else 0.0


def verify(
    model: Model, device: DeviceSpec, dtype: str = "float16", progress: Callable[[int], object] | None = None
) -> list[Row]:
    """Compare every tensor with the reference. Returns one row per format, ordered by ggml id."""
    rows: dict[str, Row] = {}
    for name, tensor in model.tensors.items():
        data = model.read(name)
        expected = dequantize(data, tensor.format, dtype, shape=tensor.shape, device="reference")
        values, seconds = _timed(data, tensor.format, dtype, tensor.shape, device)
        row = rows.setdefault(tensor.format.name, Row(tensor.format))
        different, worst = count_mismatches(values, expected)
        row.tensors += 1
        row.elements += expected.size
        row.bytes_in += data.size
        row.bytes_out += expected.nbytes
        row.seconds += seconds
        row.different += different
        row.worst = max(row.worst, worst)
        if progress is not None:
            progress(data.size)
    return sorted(rows.values(), key=lambda row: row.format.ggml_id)


def _timed(
    data: NDArray[np.uint8], fmt: Format, dtype: str, shape: tuple[int, ...], device: DeviceSpec
) -> tuple[NDArray[Any], float]:
    """The values, and the seconds that dequantizing took, without copies to and from a GPU."""
    if device.kind == "cuda":
        from numba_dequant.backends.cuda import time_kernel
        from numba_dequant.backends.gpu import gpu_at

        return time_kernel(data, Job(None, fmt, dtype, shape), gpu_at(device.index))
    dequantize(data[: fmt.type_size], fmt, dtype, device=str(device))  # compiles
    start = time.perf_counter()
    values: Any = dequantize(data, fmt, dtype, shape=shape, device=str(device))
    seconds = time.perf_counter() - start
    return values.copy_to_host() if device.kind == "simulator" else values, seconds


def assert_bit_identical(values: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Check that all bits are equal; two NaNs count as equal.

    Raises:
        DeviceError: some values differ.
    """
    wrong, worst = count_mismatches(values, expected)
    if wrong:
        raise DeviceError(f"{wrong:,} of {expected.size:,} elements of {what} are wrong, by up to {worst:g}")


def count_mismatches(values: NDArray[Any], expected: NDArray[Any]) -> tuple[int, float]:
    """How many elements differ in any bit, and the largest difference; two NaNs count as equal."""
    if values.dtype.kind in "iu":
        different = values != expected
        return int(different.sum()), float(np.abs(values.astype(object) - expected).max()) if different.any() else 0.0
    bits = np.dtype(f"u{values.itemsize}")
    with np.errstate(invalid="ignore"):  # casting some NaNs warns
        a, b = values.astype(np.float64), expected.astype(np.float64)
    neither = ~(np.isnan(a) | np.isnan(b))
    different = np.where(neither, values.view(bits) != expected.view(bits), np.isnan(a) != np.isnan(b))
    if not different.any():
        return 0, 0.0
    with np.errstate(invalid="ignore"):
        return int(different.sum()), float(np.where(neither, np.abs(a - b), np.inf)[different].max())


def table(rows: list[Row]) -> str:
    """The rows as a text table."""
    cells = [
        (
            row.format.name,
            f"{row.tensors:,}",
            f"{row.elements:,}",
            f"{row.bytes_in:,}",
            f"{row.bytes_out:,}",
            f"{row.speed:.2f}",
            "exact" if row.is_exact else f"{row.different:,} differ, by up to {row.worst:g}",
        )
        for row in rows
    ]
    return display.text(("format", "tensors", "elements", "bytes in", "bytes out", "GB/s", "result"), cells, "<>>>>><")
