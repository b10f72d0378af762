"""What the commands share."""

from __future__ import annotations

import numba_dequant as nd
from numba_dequant.backends import devices
from numba_dequant.cli import console
from numba_dequant.formats import format_named


def fail(message: str) -> int:
    """Report what is wrong; the result is the exit status."""
    console.complain(message)
    return 2


def named_formats(names: str | None, default: list[nd.Format]) -> list[nd.Format]:
    """The formats in a list separated by commas.

    Raises:
        UnknownFormatError: there is no such format, or no code dequantizes it.
    """
    if names is None:
        return default
    formats = [format_named(name) for name in names.split(",")]
    for fmt in formats:
        if fmt.decode is None:
            raise nd.UnknownFormatError(f"{fmt.name} is stored as it is, so there is no code that dequantizes it")
    return formats


def named_device(name: str | None) -> tuple[devices.DeviceSpec, str | None]:
    """The device called `name`, and None. Without a name: the first GPU and None, or the CPU and why no GPU is used.

    Raises:
        DeviceError: there is no such device.
    """
    problem = devices.why_no_cuda() if name is None else None
    return devices.parse_device(("cpu" if problem else "cuda:0") if name is None else name), problem
