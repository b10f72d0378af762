"""The command `numba-dequant`."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from importlib.resources import as_file, files
from typing import NoReturn

from tqdm import tqdm

import numba_dequant as nd
from numba_dequant import disk_cache, display, verify
from numba_dequant.backends import cpu, devices
from numba_dequant.cli import console, warm
from numba_dequant.dtypes import NAMES
from numba_dequant.formats import format_named

SAMPLE = files("numba_dequant") / "sample" / "sample.gguf"


EXIT_STATUS = """\
exit status:
  0    done
  1    verify found values that differ
  2    a file, an argument or a device cannot be used; the message says why
  70   an internal error of numba-dequant; the traceback helps to fix it
  130  Ctrl-C
  141  the reader of the output closed the pipe
"""
CRASHED, INTERRUPTED, PIPE_CLOSED = 70, 130, 141


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    with console.safe_streams(), console.noticed_interrupts() as interrupts:
        try:
            status = _run(arguments)
            sys.stdout.flush()
        except KeyboardInterrupt:
            status = INTERRUPTED
        except BrokenPipeError:
            status = PIPE_CLOSED
        except (nd.NumbaDequantError, OSError, MemoryError) as error:
            status = _fail(_message(error))
        except Exception:
            status = INTERRUPTED if interrupts.pressed else _crash(traceback.format_exc())
        return INTERRUPTED if interrupts.pressed else status


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, nd.NumbaDequantError):
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        return f"{name}: {error.strerror}" if name else str(error.strerror or error)
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    return str(error)


def _run(arguments: list[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as end:  # --help, --version, or wrong arguments
        return int(end.code or 0)
    return int(options.run(options))


def _fail(message: str) -> int:
    console.complain(message)
    return 2


def _crash(lines: str) -> int:
    for line in lines.splitlines():
        console.complain(line)
    console.complain("this is an internal error of numba-dequant; please report it with the lines above")
    return CRASHED


class _Parser(argparse.ArgumentParser):
    """Escapes control characters in error messages, because arguments may be file names."""

    def error(self, message: str) -> NoReturn:
        super().error(display.printable(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "numba-dequant",
        description="Dequantize GGUF files on an NVIDIA GPU or the CPU.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"numba-dequant {nd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser(
        "verify",
        help="dequantize every tensor and compare with the reference",
        description="Dequantize every tensor of a model on the best device and compare the result, bit for bit, with "
        "the NumPy reference. Exit status 1 if any bit differs.",
    )
    check.add_argument("file", nargs="?", metavar="FILE", help="a GGUF file; default: a small sample of all formats")
    check.add_argument("--device", help="reference, cpu, cuda, cuda:1, ...; default: the first GPU, or else the CPU")
    check.add_argument("--dtype", choices=NAMES, default="float16", help="output type (%(default)s)")
    check.set_defaults(run=_verify)

    info = commands.add_parser(
        "info", help="show metadata and tensors", description="Show the metadata and the tensor table of a GGUF file."
    )
    info.add_argument("file", metavar="FILE", help="a GGUF file, or the first shard of a split")
    info.set_defaults(run=_info)

    show = commands.add_parser(
        "show",
        help="show what the bits of a block mean",
        description="Show the layout of a format, or how the values of one block of a tensor are computed.",
    )
    show.add_argument("what", metavar="FORMAT|FILE", help="a format, such as Q4_K, or a GGUF file")
    show.add_argument("tensor", nargs="?", metavar="TENSOR", help="a tensor of the file; default: the first")
    show.add_argument("--block", type=int, metavar="N", help="the block of the tensor (0)")
    show.add_argument("--element", type=int, metavar="N", help="an element of the block; its bits are shown")
    show.set_defaults(run=_show)

    measure = commands.add_parser(
        "bench",
        help="measure every format",
        description="Compare every format with the reference, then measure it: bytes read and written per second. On "
        "a GPU, also show the memory roofline: the speed of a kernel that only copies the same number of bytes.",
    )
    measure.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the first GPU, or else the CPU")
    measure.add_argument("--formats", metavar="A,B", help="formats; default: all quantized formats")
    measure.add_argument("--dtype", choices=NAMES, default="float16", help="output type (%(default)s)")
    measure.set_defaults(run=_bench)

    cache = commands.add_parser(
        "cache",
        help="show or clear the cache of compiled code",
        description="Show the folder and the size of the cache of compiled code. "
        f"The environment variable {disk_cache.VARIABLE} selects the folder.",
    )
    cache.add_argument("--clear", action="store_true", help="remove all entries")
    cache.set_defaults(run=_cache)

    warm = commands.add_parser(
        "warm",
        help="compile ahead of time",
        description="Compile kernels ahead of time: for the first GPU, for other GPU architectures, or for the CPU.",
    )
    warm.add_argument(
        "--arch", action="append", default=[], metavar="sm_90", help="a GPU architecture; may be repeated"
    )
    warm.add_argument("--cpu", action="store_true", help="compile for the CPU")
    warm.add_argument("--formats", metavar="A,B", help="formats; default: all")
    warm.add_argument("--dtype", choices=NAMES, action="append", help="output type; may be repeated (float16)")
    warm.set_defaults(run=_warm)
    return parser


def _verify(options: argparse.Namespace) -> int:
    if options.file is None:
        with as_file(SAMPLE) as path:
            return _verify_file(str(path), "the shipped sample", options)
    return _verify_file(options.file, display.printable(options.file), options)


def _verify_file(path: str, title: str, options: argparse.Namespace) -> int:
    device, problem = _device(options.device)
    with nd.open(path) as model:
        reason = f" ({problem})" if problem else ""
        print(f"{title}: {len(model.tensors)} tensors to {options.dtype} on {device}{reason}")
        total = sum(tensor.n_bytes for tensor in model.tensors.values())
        with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False, delay=1) as bar:
            rows = verify.verify(model, device, options.dtype, bar.update)
    print(verify.table(rows))
    wrong = [row.format.name for row in rows if not row.is_exact]
    print(f"DIFFERENT from the reference: {', '.join(wrong)}" if wrong else "Every bit agrees with the reference.")
    return 1 if wrong else 0


def _bench(options: argparse.Namespace) -> int:
    from numba_dequant.cli import bench

    device = _device(options.device)[0]
    if device.kind not in ("cpu", "cuda"):
        return _fail(f"bench cannot measure {device}; pass --device cpu or --device cuda")
    formats = _formats(options.formats, [fmt for fmt in nd.FORMATS.values() if fmt.block_size > 1])
    with tqdm(total=len(formats), unit="format", disable=None, leave=False) as progress:
        title, rows = bench.bench(device, formats, options.dtype, progress.update)
    print(title)
    for line in bench.table(rows):
        print(line)
    return 0


def _formats(names: str | None, default: list[nd.Format]) -> list[nd.Format]:
    if names is None:
        return default
    formats = [format_named(name) for name in names.split(",")]
    for fmt in formats:
        if fmt.decode is None:
            raise nd.UnknownFormatError(f"{fmt.name} is stored as it is, so there is no code that dequantizes it")
    return formats


def _device(name: str | None) -> tuple[devices.DeviceSpec, str | None]:
    """The device called `name`. Without a name: the first GPU, or the CPU and why no GPU is used."""
    problem = devices.why_no_cuda() if name is None else None
    return devices.parse_device(("cpu" if problem else "cuda:0") if name is None else name), problem


def _info(options: argparse.Namespace) -> int:
    with nd.open(options.file, allow_truncated=True) as model:
        path, (here, needed) = display.printable(model.path), model.n_bytes
        print(f"{path}: {len(model.metadata)} metadata entries, {len(model.tensors)} tensors")
        if here < needed:
            print(f"{here:,} of {needed:,} bytes are here; the file looks incomplete")
        if model.missing_shards:
            print(f"missing: {', '.join(map(display.printable, model.missing_shards))}; tensors of the other shards:")
        entries = display.metadata_rows(model.metadata.shown())
        width = max((len(key) for key, _ in entries), default=0)
        for key, value in entries:
            print(f"  {key.ljust(width)}  {value}")
        rows = display.tensor_rows(model.tensors.values())
        print(display.text(display.TENSOR_HEAD, rows, display.TENSOR_SIDES))
    return 0


def _show(options: argparse.Namespace) -> int:
    if _is_format(options.what):
        fmt = format_named(options.what)
        if options.tensor is not None or options.block is not None:
            return _fail(f"TENSOR and --block need a file, but {options.what} is a format")
        print(fmt if options.element is None else fmt.picture(options.element))
        return 0
    with nd.open(options.what) as model:
        name = next(iter(model.tensors), None) if options.tensor is None else options.tensor
        if name is None:
            return _fail(f"{options.what} has no tensors")
        tensor = model.tensors[name]
        explanation = nd.explain(model.read(name), tensor.format, options.block or 0, options.element or 0)
        print(f"{display.cell(tensor.name)}: {tensor.format.summary}\n{explanation}")
    return 0


def _is_format(what: str) -> bool:
    """Whether `what` names a format rather than a file."""
    if what in nd.FORMATS:
        return not os.path.isfile(what)
    return not (os.path.lexists(what) or os.path.dirname(what) or what.endswith(".gguf"))


def _cache(options: argparse.Namespace) -> int:
    if options.clear:
        print(f"{disk_cache.directory()}: {disk_cache.clear()} entries removed")
        return 0
    entries = disk_cache.entries()
    print(f"{disk_cache.directory()}: {len(entries)} entries, {sum(entries.values()):,} bytes")
    for name, size in sorted(entries.items()):
        print(f"  {size:>9,}  {name.rpartition('-')[0]}")
    if problem := disk_cache.problem():
        print(f"The cache cannot be used: {problem}")
    return 0


def _warm(options: argparse.Namespace) -> int:
    formats = _formats(options.formats, [fmt for fmt in nd.FORMATS.values() if fmt.decode])
    if options.cpu and cpu.is_jit_disabled():
        return _fail("NUMBA_DISABLE_JIT is set, so nothing is compiled for the CPU; unset it")
    if problem := disk_cache.problem():
        return _fail(f"compiled code cannot be cached: {problem}")
    dtypes = options.dtype or ["float16"]
    capabilities = [_capability(arch) for arch in options.arch]
    if not capabilities and not options.cpu:
        problem = "the CUDA simulator does not compile" if devices.is_simulated() else devices.why_no_cuda()
        if problem:
            return _fail(f"{problem}; pass --arch or --cpu")
        from numba_dequant.backends.gpu import gpu_at

        capabilities = [gpu_at(0).capability]
    tasks = warm.tasks(formats, dtypes, capabilities, on_cpu=options.cpu)
    with tqdm(total=len(tasks), unit="kernel", disable=None, leave=False) as bar:
        n_kept = 0
        for is_kept in warm.compile_all(tasks):
            n_kept += is_kept
            bar.update()
    if n_kept < len(tasks):
        return _fail(
            f"{len(tasks) - n_kept} of {len(tasks)} functions were compiled, but could not be written to "
            f"{disk_cache.directory()}; check whether the disk is full"
        )
    targets = ["the CPU"] * options.cpu + [f"sm_{major}{minor}" for major, minor in capabilities]
    folder = disk_cache.directory()
    print(f"{len(formats)} formats to {', '.join(dtypes)} compiled for {', '.join(targets)}, in {folder}")
    return 0


def _capability(arch: str) -> tuple[int, int]:
    match = re.fullmatch(r"(?:sm_)?([0-9]{1,3})([0-9])", arch)
    if match is None:
        raise nd.DeviceError(f"unknown architecture {arch!r}; expected something like sm_90")
    return int(match[1]), int(match[2])
