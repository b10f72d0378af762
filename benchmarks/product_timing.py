"""Random blocks, products and their times, for the benchmarks of products.

python benchmarks/product_timing.py        # compiles the kernels for an H100, without a GPU

Weights are read from memory, not from a cache: launches use several buffers in turn, which exceed it. A copy is queued
before each reading, so that launch time on the host is not measured. A reading that began before everything was queued
is counted as late.
"""

import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, product
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch

import numba_dequant as nd
from numba_dequant.backends import cuda_product
from numba_dequant.kernels import compiler
from numba_dequant.kernels.product_shape import has_products

UNCACHED = 400 << 20
"""Bytes of buffers that are used in turn, at least; an H100's cache has 50 MB."""

HEAD_START = 1 << 30
"""Bytes of the copy before a reading: 0.7 ms on an H100."""

SHAPES = [(131072, 4096), (14336, 4096), (4096, 14336), (4096, 4096)]
"""Rows and elements of the weights of test_products.py."""

SHAPE_OF_MANY = (14336, 4096)
"""The same, of the products with 16 and more columns."""

MANY_FORMATS = ["Q4_K", "Q4_0", "Q8_0", "Q6_K", "Q5_K", "IQ4_XS", "Q3_K", "Q2_K", "MXFP4", "IQ2_XXS"]
"""The formats of the products with 16 and more columns."""

SHAPES_OF_FLOATS = [(4096, 4096), (4096, 512)]
"""Rows and elements of the weights of accuracy_products.py, which also has float32 results."""

READING = 1e-3
"""Seconds of work in a reading, at least, if that takes at most `MOST_LAUNCHES` launches."""

MOST_LAUNCHES = 48
ROUNDS = 9
ROOT_MEAN_SQUARE = 0.02
"""Root mean square of the weights, about that of a model."""

READ_SHAPES = [(per_processor, threads) for threads in (256, 512) for per_processor in (1, 2, 3, 4, 8)]
"""Thread blocks per multiprocessor, and threads per thread block, of the read kernels."""

IMPOSSIBLE = 0x5A17_0FF1_CE5A_17ED
"""What a read kernel looks for in random bytes, so that it finds it almost never and writes nothing."""


def blocks_like_weights(name, n_rows, n_elements, seed=0, device="cuda"):
    """Random blocks whose values are finite and of the size of weights: uint8 of shape (rows, bytes per row)."""
    fmt = nd.FORMATS[name]
    random = np.random.default_rng(seed)
    piece = random.integers(0, 256, (1 << 13) * fmt.type_size, np.uint8).view(fmt.layout)
    scales = [field for field in fmt.layout.names if fmt.layout[field].base in (np.float16, np.float32)]
    for field in scales:
        piece[field] = random.uniform(0.5, 1.5, piece[field].shape)
    middle = ((1 << int(name[1])) - 1) / 2 if name[1].isdigit() else 1
    if "dmin" in scales:  # subtracted, with the same integers as the scales of sub-blocks
        piece["dmin"] *= middle
    if "m" in scales:  # the smallest value of a block
        piece["m"] *= -middle
    for _ in range(1 + bool(scales)):
        values = nd.dequantize(piece.view(np.uint8), name, "float32", device="reference").reshape(len(piece), -1)
        with np.errstate(all="ignore"):
            size = np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=1))
        for field in scales:
            piece[field] = piece[field].astype(np.float64) * (ROOT_MEAN_SQUARE / np.median(size))
    piece = piece[(size > ROOT_MEAN_SQUARE / 16) & (size < 16 * ROOT_MEAN_SQUARE)] if not scales else piece
    assert len(piece) > 10, name
    blocks = torch.from_numpy(piece.view(np.uint8).reshape(-1, fmt.type_size)).to(device)
    n_blocks = n_rows * n_elements // fmt.block_size
    return blocks.repeat(-(-n_blocks // len(blocks)), 1)[:n_blocks].reshape(n_rows, -1).contiguous()


def turns_of(n_bytes):
    """The number of buffers of this size that are used in turn."""
    return max(2, -(-UNCACHED // n_bytes))


def error(found, exact):
    """Root mean square of the differences, divided by that of the exact values."""
    found, exact = found.double(), exact.double()
    return float((found - exact).norm() / exact.norm())


class Clock:
    """A timer of GPU time on a stream of its own, whose readings come in pairs; it also counts late ones."""

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self._room = torch.empty(2, HEAD_START, dtype=torch.uint8, device="cuda")
        self._start, self.late, self.head_start = None, 0, 1

    def __call__(self):
        """A reading, in seconds."""
        if self._start is None:
            for _ in range(self.head_start):
                with torch.cuda.stream(self.stream):
                    self._room[1].copy_(self._room[0])
            self._start = self._event()
            return 0.0
        self.late += self._start.query()
        end = self._event()
        end.synchronize()
        milliseconds = self._start.elapsed_time(end)
        self._start = None
        return milliseconds / 1e3

    def _event(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def prepare(self, work):
        """Run `work` and return the number of its launches per reading. Sets a head start that is long enough."""
        torch.cuda.synchronize()  # buffers are filled on another stream
        with torch.cuda.stream(self.stream):
            work()
            self.stream.synchronize()
            self.head_start = 8
            self()
            start = time.perf_counter()
            for _ in range(4):
                work()
            on_host = (time.perf_counter() - start) / 4
            on_gpu = self() / 4
        launches = min(max(round(READING / on_gpu), 2), MOST_LAUNCHES)
        self.head_start = 1 + int(2 * on_host * launches / 7e-4)
        self.late = 0
        return launches

    def readings(self, work):
        """Seconds per call of `work`, for each of several readings."""
        launches, found = self.prepare(work), []
        with torch.cuda.stream(self.stream):
            for _ in range(ROUNDS):
                self()
                for _ in range(launches):
                    work()
                found.append(self() / launches)
        return found

    def seconds(self, work):
        """The median of the readings."""
        return statistics.median(self.readings(work))


class Reader:
    """The floor: the time to read bytes, and do nothing with them."""

    def __init__(self, gpu, clock):
        self._gpu, self._clock, self._found = gpu, clock, {}
        self._out = torch.zeros(1, dtype=torch.uint8, device="cuda")

    def seconds(self, n_bytes):
        """Seconds to read so many bytes, from buffers used in turn; the best of several kernels. Measured once."""
        if n_bytes not in self._found:
            assert n_bytes % 16 == 0
            step = -(-n_bytes // 256) * 256
            memory = torch.randint(0, 256, (turns_of(n_bytes) * step,), dtype=torch.uint8, device="cuda")
            starts = range(memory.data_ptr(), memory.data_ptr() + memory.numel(), step)
            with self._gpu.active():
                self._found[n_bytes] = min(self._seconds(shape, starts, n_bytes) for shape in READ_SHAPES)
            assert not self._out.any()
        return self._found[n_bytes]

    def _seconds(self, shape, starts, n_bytes):
        per_processor, threads = shape
        kernel = self._gpu.load_kernel(compiler.read_kernel(threads))
        turns, stream = cycle(starts), self._clock.stream.cuda_stream

        def read():
            arguments = next(turns), n_bytes // 16, IMPOSSIBLE, self._out.data_ptr()
            self._gpu.launch(kernel, per_processor * self._gpu.processors, threads, arguments, stream)

        return self._clock.seconds(read)


class Scratch:
    """Temporary memory, which each product uses again."""

    def __init__(self):
        self._tensors, self._number = {}, 0

    def restart(self):
        self._number = 0
        return self

    def __call__(self, n_bytes):
        self._number += 1
        key = self._number, n_bytes
        if key not in self._tensors:
            self._tensors[key] = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
        return self._tensors[key].data_ptr()


class Product:
    """A product of the weights in several buffers, used in turn, with the same columns."""

    def __init__(self, gpu, fmt, buffers, x, stream, *, dtype=torch.float16, overlaps=True):
        self.fmt, self.buffers, self.x = fmt, buffers, x
        (n_columns, n_elements), n_rows = x.shape, buffers[0].shape[0]
        self.out = torch.empty(n_columns, n_rows, dtype=dtype, device="cuda")
        self._gpu, self._stream, self._overlaps, self._scratch = gpu, stream, overlaps, Scratch()
        names = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
        self._given = [
            cuda_product.Operands(
                fmt, each.data_ptr(), n_rows, n_elements, x.data_ptr(), names[x.dtype], n_columns, self.out.data_ptr(),
                names[dtype],
            )
            for each in buffers
        ]  # fmt: skip
        self._turns = cycle(self._given)

    def __call__(self):
        """Queue the product with the next buffer."""
        given = next(self._turns)
        self._multiply(given, overlaps=self._overlaps)

    def _multiply(self, given, *, overlaps):
        memory = self._scratch.restart()
        cuda_product.multiply(self._gpu, given, memory, self._stream, weight_is_constant=overlaps)

    def error(self, n_rows=16):
        """The error of the first and the last rows against float64, with the first buffer."""
        torch.cuda.synchronize()
        self._multiply(self._given[0], overlaps=False)
        torch.cuda.synchronize()
        x, blocks, found = self.x.double(), self.buffers[0], []
        for rows in (slice(0, n_rows), slice(-n_rows, None)):
            part = blocks[rows].cpu().numpy()
            values = nd.dequantize(part, self.fmt, "float32", device="reference").reshape(len(part), -1)
            exact = x @ torch.from_numpy(values).double().to(x.device).T
            found.append(error(self.out[:, rows], exact))
        return max(found)


def kernels(formats, capability=(9, 0), shared_memory=227 << 10, processors=132):
    """The kernels that the benchmarks need; the defaults are those of an H100."""
    found = {}

    def load(spec, shared_memory=0):
        found[spec.label] = spec

    card = SimpleNamespace(
        kernels={},
        capability=capability,
        shared_memory=shared_memory,
        processors=processors,
        load_kernel=load,
        launch=lambda *arguments, **options: None,
    )
    for _, threads in READ_SHAPES:
        load(compiler.read_kernel(threads))
    for name in formats:
        many = [SHAPE_OF_MANY] if name in MANY_FORMATS else []
        for dtype, shapes, counts in (
            ("float16", SHAPES, (1, 8)), ("float32", SHAPES_OF_FLOATS, (8,)), ("float16", many, (16, 32, 64, 128))
        ):  # fmt: skip
            for (n_rows, n_elements), count in product(shapes, counts):
                sizes = 256, n_rows, n_elements, 256, "float16", count, 256, dtype
                cuda_product.multiply(card, cuda_product.Operands(nd.FORMATS[name], *sizes), lambda n_bytes: 256, 0)
        load(compiler.dequantize_kernel(nd.FORMATS[name], "float16"))
    return list(found.values())


KERNELS = []


def _compile(number):
    compiler.cubin(KERNELS[number], (9, 0))
    return KERNELS[number].label


def main():
    KERNELS.extend(kernels(name for name, fmt in nd.FORMATS.items() if has_products(fmt)))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as pool:
        for done, label in enumerate(pool.map(_compile, range(len(KERNELS))), 1):
            print(f"{done} of {len(KERNELS)}: {label}", flush=True)


if __name__ == "__main__":
    main()
