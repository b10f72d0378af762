"""Compiles kernels to cubins, with numba-cuda and the CUDA toolkit; no GPU is needed.

The cubins are cached on disk. A driver that is older than the toolkit loads its cubins, but refuses its PTX.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

from numba_dequant import disk_cache
from numba_dequant.errors import DeviceError
from numba_dequant.format import Format
from numba_dequant.formats import is_built_in
from numba_dequant.kernels.gpu_packages import install_command
from numba_dequant.kernels.launch_shape import launch_shape
from numba_dequant.kernels.product_shape import PanelShape, ProductShape, WideShape
from numba_dequant.locks import compile_lock

TOOLCHAIN = ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink", "cuda-core")


class KernelSpec(NamedTuple):
    """A kernel to compile.

    Attributes:
        label: what it is, in file names of the cache and in errors.
        maker: "module.function" in this folder, which creates the kernel; imported only if there is no cached code.
        options: the arguments of `maker`.
        parameters: the types of the kernel's parameters: "data", "table" or "number".
        bounds: the number of threads of a thread block, and the number of thread blocks that a multiprocessor must have
            registers for. None means any.
        is_architecture_specific: whether it uses instructions that later compute capabilities do not have.
    """

    label: str
    maker: str
    options: tuple[Any, ...]
    parameters: tuple[str, ...] = ("data", "number", "data")
    bounds: tuple[int, int] | None = None
    is_architecture_specific: bool = False

    def make(self) -> Callable[..., None]:
        """The kernel as a Python function."""
        module, _, function = self.maker.partition(".")
        kernel: Callable[..., None] = getattr(import_module(f"numba_dequant.kernels.{module}"), function)(*self.options)
        return kernel

    @property
    def identity(self) -> str:
        """Text that is the same only for kernels with the same code."""
        options = [option.name if isinstance(option, Format) else option for option in self.options]
        return repr((self.maker, options, self.parameters, self.bounds, self.is_architecture_specific))

    @property
    def is_kept(self) -> bool:
        """Whether the code depends on this package alone, so that it may be cached on disk."""
        return all(is_built_in(option) for option in self.options if isinstance(option, Format))


def dequantize_kernel(fmt: Format, dtype: str, mapping: str = "tile") -> KernelSpec:
    """The kernel for one tensor: ``kernel(data, n_elements, out)``."""
    options = fmt, dtype, launch_shape(mapping, fmt)
    return KernelSpec(f"{fmt.name}-{dtype}-{mapping}", "dequantize.make_kernel", options)


def batch_kernel(fmt: Format, dtype: str) -> KernelSpec:
    """The kernel for many tensors of one format: ``kernel(data, table, n_tensors, out)``."""
    options = fmt, dtype, launch_shape("tile", fmt)
    parameters = "data", "table", "number", "data"
    return KernelSpec(f"{fmt.name}-{dtype}-batch", "dequantize.make_batch_kernel", options, parameters)


def rows_kernel(fmt: Format, dtype: str) -> KernelSpec:
    """The kernel for some rows: ``kernel(data, n_rows, indices, n_elements, out)``."""
    parameters = "data", "number", "table", "number", "data"
    options = fmt, dtype, launch_shape("tile", fmt)
    return KernelSpec(f"{fmt.name}-{dtype}-rows", "dequantize.make_rows_kernel", options, parameters)


def product_kernel(fmt: Format, dtype: str, bias: str | None, shape: ProductShape) -> KernelSpec:
    """The kernel of a product; `product.make_product_kernel` describes its parameters."""
    layout = f"{shape.warps}x{shape.stages}x{shape.parts}"
    flags = f"{shape.columns}{'-aligned' * shape.is_aligned}{'-overlaps' * shape.overlaps}{'-experts' * shape.experts}"
    flags += f"-{shape.resident}{'-streams' * shape.streams}"
    label = f"{fmt.name}-{dtype}-product-{bias or 'no'}-bias-{layout}-{flags}"
    parameters = ("data", "number", "number", "number", "data", "number", "data", "data", "data", "table", "number")
    return KernelSpec(
        label, "product.make_product_kernel", (fmt, dtype, bias, shape), parameters, (shape.threads, shape.resident)
    )


def wide_kernel(fmt: Format, dtype: str, bias: str | None, shape: WideShape | PanelShape) -> KernelSpec:
    """The kernel of a product with many columns; `make_wide_kernel` and `make_panel_kernel` describe its parameters."""
    flags = f"{'-aligned' * shape.is_aligned}{'-overlaps' * shape.overlaps}"
    parameters = ("data", "number", "number", "number", "data", "number", "data", "data", "data")
    options = fmt, dtype, bias, shape
    if isinstance(shape, WideShape):
        label = f"{fmt.name}-{dtype}-wide-{bias or 'no'}-bias{flags}"
        return KernelSpec(label, "product_wide.make_wide_kernel", options, parameters, (shape.threads, 2))
    layout = f"{shape.rows}x{shape.columns}x{shape.resident}"
    label = f"{fmt.name}-{dtype}-panels-{bias or 'no'}-bias-{layout}{flags}"
    return KernelSpec(
        label,
        "product_panel.make_panel_kernel",
        options,
        (*parameters, "data", "data"),
        (shape.threads, shape.resident),
        is_architecture_specific=True,
    )


def routes_kernel(overlaps: bool) -> KernelSpec:
    """The kernel that finds the columns of each expert: ``kernel(ids, n_pairs, n_experts, routes)``."""
    parameters = "table", "number", "number", "table"
    label = f"routes{'-overlaps' * overlaps}"
    return KernelSpec(label, "product_columns.make_routes_kernel", (overlaps,), parameters)


def prepare_kernel(fmt: Format, dtype: str, overlaps: bool, panel: int = 0) -> KernelSpec:
    """The kernel that prepares columns: ``kernel(x, n_columns, n_groups, out, powers, n_flags)``."""
    parameters = "data", "number", "number", "data", "data", "number"
    label = f"{fmt.name}-prepare-{dtype}{'-overlaps' * overlaps}{f'-panels-{panel}' * bool(panel)}"
    return KernelSpec(label, "product_columns.make_prepare_kernel", (fmt, dtype, overlaps, panel), parameters)


def copy_kernel(stores: int, threads: int, stage: int) -> KernelSpec:
    """The copy kernel: ``kernel(data, n_loads, out)``."""
    return KernelSpec(f"copy-{stores}-{threads}-{stage}", "copy.make_copy_kernel", (stores, threads, stage))


def read_kernel(threads: int) -> KernelSpec:
    """The read kernel: ``kernel(data, n_loads, value, out)``."""
    return KernelSpec(f"read-{threads}", "copy.make_read_kernel", (threads,), ("data", "number", "number", "data"))


def cubin(kernel: KernelSpec, capability: tuple[int, int]) -> tuple[str, bytes]:
    """The entry point's name and the cubin of a kernel, for a compute capability.

    Raises:
        DeviceError: the CUDA toolkit is missing, or does not support the compute capability.
    """
    label = f"sm{capability[0]}{capability[1]}-{kernel.label}"
    entry = disk_cache.cache_key(label, kernel.identity, disk_cache.versions(*TOOLCHAIN))
    kept = disk_cache.read(entry) if kernel.is_kept else None
    if kept is None or b"\0\x7fELF" not in kept:
        try:
            text = ptx(kernel, capability)
            kept = (
                entry_point(text).encode() + b"\0" + assemble(text, capability, "a" * kernel.is_architecture_specific)
            )
        except Exception as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise DeviceError(f"the CUDA toolkit cannot compile {label}: {reason}") from error
        if kernel.is_kept:
            disk_cache.write(entry, kept)
    name, code = kept.split(b"\0", 1)
    return name.decode(), code


def ptx(kernel: KernelSpec, capability: tuple[int, int]) -> str:
    """The PTX text of a kernel."""
    with compile_lock:  # a fork waits for the import
        function = kernel.make()
    text = function_ptx(function, capability, *kernel.parameters)
    if kernel.is_architecture_specific:
        text = re.sub(r"^(\.target sm_\d+)", r"\1a", text, count=1, flags=re.MULTILINE)
    if kernel.bounds is None:
        return text
    # The assembler then knows how many registers a thread may have.
    bounds = f"\n.maxntid {kernel.bounds[0]}\n.minnctapersm {kernel.bounds[1]}\n{{"
    return re.sub(r"(\.entry [^{]*)\n\{", lambda match: match[1] + bounds, text, count=1)


def function_ptx(kernel: Callable[..., None], capability: tuple[int, int], *kinds: Any) -> str:
    """The PTX text of a function.

    Args:
        kernel: the function.
        capability: the compute capability of the GPU.
        kinds: the types of its parameters: "data", "table", "number" or Numba types; default: data, number, data.
    """
    with compile_lock:  # a fork waits for the import
        from numba import types

        from numba_dequant.kernels.numba_cuda import cuda

    of_kind = {"data": types.CPointer(types.uint8), "table": types.CPointer(types.int64), "number": types.int64}
    signature = tuple(of_kind.get(kind, kind) for kind in kinds or ("data", "number", "data"))
    with compile_lock:
        # numba-cuda compiles the kernel's callees for the current device; use `capability` instead.
        dispatcher = cuda.dispatcher
        real = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
        try:
            text, _ = cuda.compile_ptx(kernel, signature, cc=capability)
        finally:
            dispatcher.get_current_device = real
    assert isinstance(text, str)
    return text


def entry_point(text: str) -> str:
    """The name of the kernel in a PTX text."""
    match = re.search(r"\.entry\s+(\w+)", text)
    assert match is not None
    return match[1]


def assemble(text: str, capability: tuple[int, int], suffix: str = "") -> bytes:
    """Assemble a PTX text to a cubin with the linker of the CUDA toolkit.

    An older linker refuses the PTX version of a newer compiler. The text uses only old instructions, so earlier version
    numbers are tried too.
    """
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=f"sm_{capability[0]}{capability[1]}{suffix}")
    header = re.search(r"^\.version (\d+)\.(\d+)$", text, re.MULTILINE)
    assert header is not None
    refusal = None
    for minor in range(int(header[2]), -1, -1):
        candidate = f"{text[: header.start()]}.version {header[1]}.{minor}{text[header.end() :]}"
        try:
            return bytes(Program(candidate, "ptx", options).compile("cubin").code)
        except Exception as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


@lru_cache(maxsize=1)
def toolkit_key() -> str:
    """The name of the cache entry that says that the toolkit works."""
    return disk_cache.cache_key("toolkit", disk_cache.versions(*TOOLCHAIN))


def why_no_toolkit() -> str | None:
    """Why kernels cannot be compiled, or None. Success is cached on disk, because loading the toolkit is slow."""
    entry = toolkit_key()
    if disk_cache.read(entry) is not None:
        return None
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        for library in ("nvvm", "nvJitLink"):
            load_nvidia_dynamic_lib(library)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"the CUDA toolkit is incomplete ({reason}); run: {install_command()}"
    disk_cache.write(entry, b"")
    return None
