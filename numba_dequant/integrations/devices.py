"""Where our operators run. Elsewhere, a program keeps its own functions."""

from __future__ import annotations

import torch

from numba_dequant.errors import OptionError


def is_supported(tensor: torch.Tensor) -> bool:
    """Whether our operators run where a tensor is: on the CPU, on an NVIDIA GPU, or on the meta device."""
    kind = tensor.device.type
    return kind in ("cpu", "meta") or (kind == "cuda" and torch.version.hip is None)


def has_other_accelerator() -> bool:
    """Whether this machine has an accelerator that we do not support, which the program may choose."""
    return torch.version.hip is not None or torch.backends.mps.is_available() or torch.xpu.is_available()


def require_supported(program: str) -> None:
    """Raise OptionError if the program may compute on an accelerator that we do not support."""
    if has_other_accelerator():
        raise OptionError(
            f"this machine has an accelerator other than NVIDIA's, on which {program} would fail with our functions; "
            "call accelerate only where PyTorch uses the CPU or an NVIDIA GPU"
        )
