"""The benchmark of `numba-dequant bench`: every format once, compared with the memory roofline."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import numba_dequant as nd
from numba_dequant.api import dequantize
from numba_dequant.backends.devices import DeviceSpec, available_cores
from numba_dequant.cli.common import add_command, fail, named_device, named_formats
from numba_dequant.dtypes import NAMES, numpy_dtype
from numba_dequant.format import Format
from numba_dequant.verify import assert_bit_identical

GPU_ELEMENTS, CPU_ELEMENTS = 1 << 26, 1 << 22
BAR = 40


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = add_command(
        commands,
        "bench",
        run,
        help="measure every format",
        description="Compare every format with the reference, then measure it: bytes read and written per second. On "
        "a GPU, also show the memory roofline: the speed of a kernel that only copies the same number of bytes.",
        examples=("bench --formats Q4_K,Q6_K", "bench --device cpu --formats Q8_0 --dtype bfloat16"),
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; default: the first GPU, or else the CPU"
    )
    parser.add_argument("--formats", metavar="A,B", help="formats; default: all quantized formats")
    parser.add_argument("--dtype", choices=NAMES, default="float16", help="output type (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    device = named_device(options.device)[0]
    if device.kind not in ("cpu", "cuda"):
        return fail(f"bench cannot measure {device}; pass --device cpu or --device cuda")
    formats = named_formats(options.formats, [fmt for fmt in nd.FORMATS.values() if fmt.block_size > 1])
    from tqdm import tqdm  # every command would wait for the import

    with tqdm(total=len(formats), unit="format", disable=None, leave=False) as progress:
        title, rows = bench(device, formats, options.dtype, progress.update)
    print(title)
    for line in table(rows):
        print(line)
    return 0


@dataclass(frozen=True)
class Row:
    """Bytes read and written per second by one format, and the memory roofline; 0 if not measured."""

    format: Format
    speed: float
    roofline: float


def bench(
    device: DeviceSpec, formats: list[Format], dtype: str, progress: Callable[[], object] = lambda: None
) -> tuple[str, list[Row]]:
    """Measure formats on a device. Returns a line about the machine, and one row per format.

    Each result is first compared with the reference.

    Raises:
        DeviceError: a result is wrong.
    """
    if device.kind == "cuda":
        return _on_gpu(device.index, formats, dtype, progress)
    return _on_cpu(formats, dtype, progress)


def _on_gpu(index: int, formats: list[Format], dtype: str, progress: Callable[[], object]) -> tuple[str, list[Row]]:
    from numba_dequant.backends.gpu import gpu_at
    from numba_dequant.cli.measure import GpuClock, Workload

    gpu = gpu_at(index)
    with gpu.active() as device:
        clock = GpuClock(gpu)
        rows = []
        for fmt in formats:
            work = Workload(fmt, dtype, GPU_ELEMENTS, gpu)
            work.check()
            rows.append(Row(fmt, work.bytes_moved / clock.seconds(work), work.roofline(clock)))
            progress()
        copy = clock.copy_speed()
        return f"{device.name}, {GPU_ELEMENTS:,} elements to {dtype}; device copy {copy / 1e9:.0f} GB/s", rows


def _on_cpu(formats: list[Format], dtype: str, progress: Callable[[], object]) -> tuple[str, list[Row]]:
    rows = []
    for fmt in formats:
        data = np.random.default_rng(0).integers(0, 256, CPU_ELEMENTS // fmt.block_size * fmt.type_size, np.uint8)
        out = np.empty(CPU_ELEMENTS, numpy_dtype(dtype))
        dequantize(data, fmt, dtype, device="cpu", out=out)
        assert_bit_identical(out, dequantize(data, fmt, dtype, device="reference"), f"{fmt.name} to {dtype}")
        seconds = _seconds(partial(dequantize, data, fmt, dtype, device="cpu", out=out))
        rows.append(Row(fmt, (data.nbytes + out.nbytes) / seconds, 0.0))
        progress()
    return f"CPU, {available_cores()} threads, {CPU_ELEMENTS:,} elements to {dtype}", rows


def _seconds(work: Callable[[], object]) -> float:
    readings = []
    for _ in range(9):
        start = time.perf_counter()
        work()
        readings.append(time.perf_counter() - start)
    return statistics.median(readings)


def table(rows: list[Row]) -> Iterator[str]:
    """The rows as lines of text, with bars: the share of the roofline or, without one, of the fastest format."""
    has_roofline = all(row.roofline for row in rows)
    fastest = max((row.speed for row in rows), default=0.0)
    width = max((len(row.format.name) for row in rows), default=0)
    yield f"{'format'.ljust(width)}  {'GB/s':>7}" + (f"  {'roofline':>8}   share" if has_roofline else "")
    for row in rows:
        share = row.speed / (row.roofline if has_roofline else fastest)
        limit = f"  {row.roofline / 1e9:8.0f}  {share:6.1%}" if has_roofline else ""
        digits = 0 if has_roofline else 1
        yield f"{row.format.name.ljust(width)}  {row.speed / 1e9:7.{digits}f}{limit}  {bar(share)}"


def bar(share: float) -> str:
    """A bar of `BAR` block characters, in steps of an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(BAR, "·")
