"""Make programs that read GGUF files use this package.

A program is a module of this folder with the function `replacements`. It checks the version of the program, and lists
the functions to replace.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from numba_dequant.errors import OptionError, shown
from numba_dequant.integrations.patching import Replaced, replace_all

PROGRAMS = ("gguf", "transformers", "diffusers", "comfyui", "vllm")


def accelerate(*programs: str) -> Replaced:
    """Let programs dequantize with this package.

    >>> import gguf, numba_dequant as nd
    >>> with nd.accelerate("gguf"):
    ...     gguf.dequantize.__module__
    'numba_dequant.integrations.gguf'

    Values are equal bit for bit where the program is exact. Otherwise ours are the exact ones: those of GGML in
    float32, rounded once. One message of the logger "numba_dequant" says what was replaced.

    Args:
        programs: "gguf" (the package gguf-py), "transformers", "diffusers", "comfyui" (the custom node ComfyUI-GGUF,
            which must have been imported) and "vllm" (the package vllm-gguf-plugin).

    Returns:
        An object whose `undo` restores the functions; it is also a context manager. Its text lists the functions.

    Raises:
        OptionError: there is no such program, it is not installed or imported, its version is unknown, or PyTorch has
            an accelerator on which it would fail with our functions. Nothing was replaced.
    """
    if not programs:
        raise OptionError(f"accelerate got no program; pass one or more of {', '.join(PROGRAMS)}")
    for program in programs:
        if program not in PROGRAMS:
            raise OptionError(f"unknown program {shown(program)}; choose from {', '.join(PROGRAMS)}")
    return replace_all(
        [replacement for program in dict.fromkeys(programs) for replacement in _module(program).replacements()]
    )


def _module(program: str) -> Any:
    try:
        module: ModuleType = import_module(f"{__name__}.{program}")
    except ImportError as error:
        raise OptionError(f"accelerate cannot replace functions of {program}: {error}") from error
    return module
