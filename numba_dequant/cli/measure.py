"""Measurements on a GPU, for `numba-dequant bench` and the benchmarks: clock, workloads, memory roofline."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.core import Device, Event

from numba_dequant.api import dequantize
from numba_dequant.arguments import Job
from numba_dequant.backends.cuda import dequantize_into
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.gpu import Gpu, stream_on, timed_event
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.format import Format
from numba_dequant.kernels.compiler import copy_kernel
from numba_dequant.kernels.launch_shape import LaunchShape, launch_shape
from numba_dequant.verify import assert_bit_identical
from numba_dequant.version import VERSION

ROUNDS, LAUNCHES = 9, 4
"""Readings per measurement, of which the median is used, and launches per reading."""

UNCACHED = 256 << 20
"""Bytes that exceed the cache of a GPU; the buffers of a workload, used in turn, have at least this total size."""

MAX_TURNS = 1 << 10
"""Maximum number of buffers used in turn; with smaller buffers, launches dominate the time anyway."""

HEAD_START = 1 << 30
"""Bytes of the copy that is queued before each reading: 0.7 ms on an H100."""

CHECKED = 1 << 18
"""Elements at each end of a result that are compared with the reference."""

ROOFLINE_SHAPES = [(1, 256), (2, 256), (4, 256), (8, 256), (2, 128), (4, 128)]
"""16-byte stores per thread, and threads per thread block, of the copy kernels."""

MAX_STAGE = 512
"""16-byte loads that a thread block of a copy kernel can hold in shared memory."""


class GpuClock:
    """A timer whose readings come in pairs; their difference is the GPU time of the work between them.

    Before the first reading of a pair, a long copy is queued. All work is then queued before the GPU reaches it, so
    the launch time of the host is not measured.

    Attributes:
        head_start: the number of copies of 1 GiB to queue.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.head_start = 1
        self._gpu, self._stream = gpu, stream_on(gpu.index, 0)
        self._room = [gpu.allocate(HEAD_START, 0) for _ in range(2)]
        self._start: Event | None = None

    def __call__(self) -> float:
        """A reading, in seconds."""
        if self._start is None:
            for _ in range(self.head_start):
                self._gpu.copy_on_device(self._room[0].pointer, self._room[1].pointer, HEAD_START, 0)
            self._start = self._event()
            return 0.0
        end = self._event()
        end.sync()
        milliseconds: float = end - self._start
        self._start = None
        return milliseconds / 1e3

    def _event(self) -> Event:
        return self._stream.record(options=timed_event())

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds per call of `work`: the median of several readings."""
        work()
        readings = []
        for _ in range(ROUNDS):
            start = self()
            for _ in range(LAUNCHES):
                work()
            readings.append((self() - start) / LAUNCHES)
        return statistics.median(readings)

    def copy_speed(self) -> float:
        """Bytes read and written per second by a copy within device memory."""
        first, second = (room.pointer for room in self._room)
        return 2 * HEAD_START / self.seconds(lambda: self._gpu.copy_on_device(first, second, HEAD_START, 0))


class Workload:
    """Random blocks on the current device. Each call dequantizes the next of several buffers, in turn.

    Attributes:
        fmt: the format of the blocks.
        dtype: the output type.
        n_elements: elements per call.
        bytes_moved: bytes that one call reads and writes.
    """

    def __init__(
        self,
        fmt: Format,
        dtype: str,
        n_elements: int,
        gpu: Gpu,
        mapping: str = "tile",
        kernel: Callable[[DeviceBytes, int, DeviceBytes], object] | None = None,
    ) -> None:
        """Fill buffers that exceed the cache of the GPU with random blocks.

        Args:
            fmt: the format of the blocks.
            dtype: the output type.
            n_elements: elements per call, rounded up to whole blocks.
            gpu: the current GPU.
            mapping: the mapping of the library's kernel.
            kernel: a function that queues another kernel instead, given data, the number of elements and the output.
        """
        self.fmt, self.dtype, self.mapping, self._kernel = fmt, dtype, mapping, kernel
        n_blocks = -(-n_elements // fmt.block_size)
        self.n_elements = n_blocks * fmt.block_size
        self.itemsize = numpy_dtype(dtype).itemsize
        n_read, n_written = n_blocks * fmt.type_size, self.n_elements * self.itemsize
        self.bytes_moved = n_read + n_written
        turns = min(max(2, -(-UNCACHED // self.bytes_moved)), MAX_TURNS)
        self._sources, self._targets = _in_one(n_read, turns, gpu), _in_one(n_written, turns, gpu)
        self._job = Job(None, fmt, dtype, n_elements=self.n_elements)
        self._gpu, self._turn = gpu, 0
        piece = np.random.default_rng(0).integers(0, 256, min(n_read, 1 << 24), np.uint8)
        for memory in self._sources:
            gpu.send(memory.pointer, piece, 0)
            for start in range(piece.size, n_read, piece.size):
                size = min(piece.size, n_read - start)
                gpu.copy_on_device(memory.pointer + start, memory.pointer, size, 0)

    def __call__(self) -> None:
        """Queue one launch."""
        data, target = self.buffers()
        if self._kernel is not None:
            self._kernel(data, self.n_elements, target)
        else:
            dequantize_into(data, self._job, target, 0, self.mapping)

    def buffers(self) -> tuple[DeviceBytes, DeviceBytes]:
        """The next buffers: data and output."""
        self._turn = (self._turn + 1) % len(self._sources)
        return self._sources[self._turn], self._targets[self._turn]

    def check(self) -> None:
        """Compare both ends of a result with the reference.

        Raises:
            DeviceError: the values differ.
        """
        self._turn = -1
        data, target = self._sources[0], self._targets[0]
        self._gpu.memset(target, 0xA5, 0)
        self()
        n_blocks = self.n_elements // self.fmt.block_size
        count = min(n_blocks, max(CHECKED // self.fmt.block_size, 1))
        for first in {0, n_blocks - count}:
            blocks = np.empty(count * self.fmt.type_size, np.uint8)
            self._gpu.copy_to_host(blocks, data.pointer + first * self.fmt.type_size, 0)
            expected = dequantize(blocks, self.fmt, self.dtype, device="reference")
            values = np.empty_like(expected)
            self._gpu.copy_to_host(values, target.pointer + first * self.fmt.block_size * self.itemsize, 0)
            assert_bit_identical(values, expected, f"{self.fmt.name} to {self.dtype}, mapping {self.mapping}")

    def roofline(self, clock: GpuClock) -> float:
        """Bytes per second of the fastest copy kernel that reads and writes the same number of bytes.

        0 if no copy kernel divides the work evenly, which happens for the smallest sizes.
        """
        shapes = [(stores, threads, False) for stores, threads in ROOFLINE_SHAPES]
        tile = launch_shape("tile", self.fmt)
        shapes.append((tile.tile_elements * self.itemsize // 16 // tile.threads, tile.threads, True))
        best = 0.0
        for stores, threads, is_staged in shapes:
            tile_elements = stores * threads * 16 // self.itemsize
            n_loads, rest = divmod(tile_elements * self.fmt.type_size, 16 * self.fmt.block_size)
            if rest or self.n_elements % tile_elements or (is_staged and n_loads > MAX_STAGE):
                continue
            kernel = self._gpu.load_kernel(copy_kernel(stores, threads, MAX_STAGE if is_staged else 0))
            shape = self.n_elements // tile_elements, threads

            def move(kernel: Any = kernel, shape: tuple[int, int] = shape, n_loads: int = n_loads) -> None:
                data, target = self.buffers()
                self._gpu.launch(kernel, *shape, (data.pointer, n_loads, target.pointer), 0)

            best = max(best, self.bytes_moved / clock.seconds(move))
        return best


def jit_launch(
    kernel: Any, mapping: LaunchShape, data: np.dtype[Any], out: np.dtype[Any]
) -> Callable[[DeviceBytes, int, DeviceBytes], None]:
    """The launch of a `numba.cuda.jit` kernel for `Workload`; `data` and `out` are the dtypes of its arrays."""
    from numba_dequant.kernels.numba_cuda import cuda

    arrays: dict[int, Any] = {}  # creating one takes longer than a launch

    def array(memory: DeviceBytes, dtype: np.dtype[Any]) -> Any:
        if memory.pointer not in arrays:
            tensor = DeviceTensor(memory, (memory.n_bytes // dtype.itemsize,), dtype, 0)
            arrays[memory.pointer] = cuda.as_cuda_array(tensor)
        return arrays[memory.pointer]

    def launch(blocks: DeviceBytes, n_elements: int, values: DeviceBytes) -> None:
        kernel[mapping.thread_blocks(n_elements), mapping.threads](array(blocks, data), n_elements, array(values, out))

    return launch


def _in_one(n_bytes: int, count: int, gpu: Gpu) -> list[DeviceBytes]:
    """`count` buffers from one allocation, each aligned to 256 bytes."""
    step = -(-n_bytes // 256) * 256
    memory = gpu.allocate(step * count, 0)
    pointers = range(memory.pointer, memory.pointer + step * count, step)
    return [DeviceBytes(pointer, n_bytes, gpu, memory.owner) for pointer in pointers]


def machine(device: Device | None = None) -> dict[str, Any]:
    """A description of the machine: the GPU, the driver and the versions of packages."""
    ours = "numba", "numba-cuda", "cuda-core", "llvmlite", "nvidia-nvvm", "numpy", "gguf"
    packages = (*ours, "torch", "safetensors", "transformers")
    versions = {"numba-dequant": VERSION}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    description: dict[str, Any] = {"python": platform.python_version(), "versions": versions}
    if device is not None:
        code = int(driver.cuDriverGetVersion()[1])
        description |= {"gpu": device.name, "driver": f"CUDA {code // 1000}.{code % 1000 // 10}"}
    return description
