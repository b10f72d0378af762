"""The ways to compute on the host, behind one function: NumPy, all cores, and Numba's CUDA simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.backends import cpu, reference
from numba_dequant.backends.devices import DeviceSpec
from numba_dequant.format import Format
from numba_dequant.formats import is_passed_on


def dequantize_into(
    data: NDArray[np.uint8],
    fmt: Format,
    dtype: str,
    out: NDArray[Any],
    place: DeviceSpec,
    mapping: str = "tile",
    *,
    on_one_core: bool = False,
) -> None:
    """Write the values of `data` (whole blocks) to the flat array `out`, rounded once to `dtype`."""
    if fmt.stored_dtype is not None:
        out[:] = data.view(fmt.stored_dtype)
    elif place.kind == "reference" and is_passed_on(fmt, dtype):
        cpu.pass_on(data, out, 0, out.size)
    elif place.kind == "reference":
        reference.dequantize_into(data, fmt, out)
    elif place.kind == "cpu":
        cpu.dequantize_into(data, fmt, dtype, out, 1 if on_one_core else None)
    else:
        from numba_dequant.backends import simulator

        simulator.dequantize_into(data, fmt, dtype, out, mapping)
