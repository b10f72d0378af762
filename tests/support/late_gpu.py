"""A GPU that does its work as late as it may: streams advance at random, and when they must.

It has the methods of `backends.gpu.Gpu`, and stands in its place. Its memory is the host's, and its kernels are run by
the reference.
"""

import ctypes
import gc
import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from faults import n_threads_of_this_process

import numba_dequant as nd
from numba_dequant.backends import devices, gpu
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.kernels.product_shape import column_bytes
from numba_dequant.loading import gpu_buffers

POISON = 0xA5

TUNING = gpu_buffers.LoadTuning(chunk_bytes=4096, subread_bytes=1000, small_file_bytes=0)
WITH_SMALL_FILES = replace(TUNING, small_file_bytes=1 << 22)


def at(address, n_bytes):
    return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))


class Owner:
    """A piece of memory of the late GPU. It is freed in the order of its stream, behind all streams that used it."""

    def __init__(self, late, pointer, n_bytes, stream):
        self.late, self.range, self.stream = late, (pointer, pointer + n_bytes), int(stream)
        self.others, self.lent_to = [], set()

    def used_on(self, stream):
        if stream != self.stream:
            self.others.append(self.late.record_event(stream))

    def lend(self, stream, keeper):
        self.lent_to.add(int(stream))

    def __del__(self):
        for event in [*self.others, *map(self.late.record_event, self.lent_to)]:
            self.late.stream_wait_event(self.stream, event)
        self.late.free(self)


class Event:
    """A point of a stream, known by its handle."""

    def __init__(self, late, stream, position):
        self.late, self.stream, self.position = late, stream, position
        self.handle = len(late.events) + 1
        late.events.append(self)

    def sync(self):
        self.late.run(self.stream, self.position)


class Stream:
    def __init__(self, late, handle):
        self.late, self.handle = late, handle

    def sync(self):
        self.late.run(self.handle)


@dataclass
class Operation:
    """Something that a stream has been asked to do, the memory that it reads or writes, and what it waits for."""

    work: Callable[[], None]
    ranges: tuple[tuple[int, int], ...] = ()
    awaited: tuple[int, int] | None = None


@dataclass
class Kernel:
    handle: int
    spec: tuple


class LateGpu:
    index, capability, context = 0, (9, 0), 1
    processors, shared_memory = 2, 232448

    def __init__(self, seed, *, has_threads=True):
        self.kernels, self.idle_buffers = {}, []
        room = np.zeros((64 << 20) + 256, np.uint8)
        self.memory = room[-room.ctypes.data % 256 :]
        self.start = self.memory.ctypes.data
        self.end = self.start + 256
        self.queues, self.done = defaultdict(list), defaultdict(int)
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.n_streams = self.in_use = 0
        self.problems, self.events, self.loaded, self.kept = [], [], [], []
        self.thread_functions = self.functions() if has_threads else None

    def functions(self):
        """What the threads' loop calls in place of the driver, and in place of `pread`."""
        counts = {"set_context": 1, "pause": 1, "let_gpu_wait": 3, "copy": 4, "launch_of_thread": 11, "signal": 4}
        self.error_number = ctypes.c_int()
        functions = {
            name.removesuffix("_of_thread"): ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_ssize_t] * count)(
                getattr(self, name)
            )
            for name, count in counts.items()
        }
        functions["read"] = ctypes.CFUNCTYPE(*[ctypes.c_ssize_t] * 5)(self.read)
        functions["error"] = ctypes.CFUNCTYPE(*[ctypes.c_ssize_t] * 2)(lambda _: ctypes.addressof(self.error_number))
        return functions

    def read(self, file, pointer, n_bytes, offset):
        try:
            return self.read_into(file, at(pointer, n_bytes), offset)
        except OSError as error:
            self.error_number.value = error.errno
            return -1

    def read_into(self, file, data, offset):
        return os.preadv(file, [data], offset)

    def set_context(self, context):
        return 0

    def pause(self, microseconds):
        with self.lock:
            for handle in list(self.queues):
                self.run(handle, self.done[handle] + self.random.randint(0, 3))
        return 0

    def signal(self, stream, address, value, flags):
        def write():
            ctypes.c_uint32.from_address(address).value = value

        self.queue(stream, write)
        return 0

    def let_gpu_wait(self, stream, event, flags):
        self.stream_wait_event(stream, self.events[event - 1])
        return 0

    def copy(self, pointer, host, n_bytes, stream):
        self.copy_to_device(pointer, at(host, n_bytes), stream)
        return 0

    def launch_of_thread(self, kernel, grid, _1, _2, threads, _3, _4, _5, stream, arguments, _6):
        values = [ctypes.c_int64.from_address(where).value for where in at(arguments, 24).view(np.int64).tolist()]
        self.launch(self.loaded[kernel - 1], grid, threads, values, stream)
        return 0

    # The methods of `Gpu`

    def active(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def allocate(self, n_bytes, stream, keeper=None):
        with self.lock:
            end = self.end + -(-max(n_bytes, 1) // 256) * 256
            if end > self.start + self.memory.size:
                raise nd.DeviceError(f"cuda:0 is out of memory: {n_bytes:,} bytes are needed")
            pointer, self.end = self.end, end
            self.in_use += n_bytes
            self.queue(stream, lambda: at(pointer, n_bytes).fill(POISON), (pointer, n_bytes))
            return DeviceBytes(pointer, n_bytes, self, Owner(self, pointer, n_bytes, stream))

    def allocate_by_torch(self, n_bytes, stream):
        raise AssertionError("no test of this GPU has tensors of PyTorch's on it")

    def new_tensor(self, shape, dtype, stream):
        raise AssertionError("no test of this GPU has tensors of PyTorch's on it")

    def pinned(self, n_bytes):
        return np.zeros(n_bytes, np.uint8)

    def copy_to_device(self, pointer, host, stream):
        def copy():
            at(pointer, host.size)[:] = host

        self.queue(stream, copy, (pointer, host.size))

    def send(self, pointer, host, stream):
        self.copy_to_device(pointer, host.copy(), stream)

    def copy_to_host(self, host, pointer, stream):
        self.run(stream)
        host.reshape(-1).view(np.uint8)[:] = at(pointer, host.nbytes)

    def copy_on_device(self, target, pointer, n_bytes, stream):
        def copy():
            at(target, n_bytes)[:] = at(pointer, n_bytes)

        self.queue(stream, copy, (target, n_bytes), (pointer, n_bytes))

    def copy_columns(self, target, width, pointer, step, n_rows, stream):
        n_bytes = step * (n_rows - 1) + width

        def copy():
            rows = np.lib.stride_tricks.as_strided(at(pointer, n_bytes), (n_rows, width), (step, 1))
            at(target, n_rows * width).reshape(n_rows, width)[:] = rows

        self.queue(stream, copy, (target, n_rows * width), (pointer, n_bytes))

    def open_to(self, other):
        assert other is self

    def memset(self, memory, value, stream):
        self.queue(stream, lambda: at(memory.pointer, memory.n_bytes).fill(value), (memory.pointer, memory.n_bytes))

    def load_kernel(self, spec, shared_memory=0):
        with self.lock:
            self.loaded.append(Kernel(len(self.loaded) + 1, spec))
            return self.loaded[-1]

    def launch(self, kernel, thread_blocks, threads, arguments, stream, shared_bytes=0, overlaps=False):
        if kernel.spec.maker.startswith("product"):
            self.launch_product(kernel.spec, thread_blocks, arguments, stream)
            return
        fmt, dtype, shape = kernel.spec.options
        assert threads == shape.threads
        if "table" not in kernel.spec.parameters:
            data, n_elements, out = arguments
            assert thread_blocks == shape.thread_blocks(n_elements)
            self.dequantize(fmt, dtype, n_elements, data, out, stream)
            return
        assert arguments[0] == arguments[3] == 0
        table = at(arguments[1], 8 * 4 * arguments[2]).view(np.int64).reshape(4, -1)

        def dequantize():
            first_tiles, starts, out_starts, counts = table.tolist()
            expected = np.cumsum([0, *(shape.thread_blocks(count) for count in counts)]).tolist()
            assert [*first_tiles, thread_blocks] == expected
            for start, out_start, count in zip(starts, out_starts, counts, strict=True):
                compute(fmt, dtype, count, start, out_start * numpy_dtype(dtype).itemsize)

        # It is a launch's own business which memory the table names; here, all of it must be there.
        self.queue(stream, dequantize, (arguments[1], table.nbytes), *self.ranges_of(table, fmt, dtype, stream))

    def launcher(self, kernel, thread_blocks, threads, arguments):
        return partial(self.launch, kernel, thread_blocks, threads, arguments)

    def ranges_of(self, table, fmt, dtype, stream):
        self.run(stream)  # what fills the table
        itemsize = numpy_dtype(dtype).itemsize
        for _, start, out_start, count in table.T.tolist():
            yield start, fmt.n_bytes((count,))
            yield out_start * itemsize, count * itemsize

    def launch_product(self, spec, thread_blocks, arguments, stream):
        """What the kernels of products read and write, in a simple layout of prepared columns."""
        fmt, dtype = spec.options[:2]
        if spec.maker == "product_columns.make_prepare_kernel":
            x, n_columns, n_groups, out, powers, n_flags = arguments
            assert n_flags == 0
            assert x % 16 == 0
            n_prepared, _ = thread_blocks
            assert n_prepared >= n_columns
            n_read, stride = 64 * n_groups, column_bytes(fmt, 32 * n_groups)

            def prepare():
                columns = at(x, n_columns * n_read).view(numpy_dtype(dtype)).astype(np.float16).view(np.uint8)
                prepared = at(out, n_prepared * stride).reshape(n_prepared, stride)
                prepared[:] = 0
                prepared[:n_columns, :n_read] = columns.reshape(-1, n_read)
                at(powers, 4 * n_prepared).view(np.float32)[:] = 1

            written = (out, n_prepared * stride), (powers, 4 * n_prepared)
            self.queue(stream, prepare, (x, n_columns * n_read), *written)
            return
        bias_type, shape = spec.options[2:]
        data, n_rows, row_bytes, n_groups, x, n_columns, powers, bias, out, routes, _ = arguments
        assert routes == 0
        n_elements, size = 32 * n_groups, numpy_dtype(dtype).itemsize
        stride = 2 * n_elements if shape.columns == 1 else column_bytes(fmt, n_elements)
        assert data % fmt.alignment == 0
        assert x % 16 == 0
        assert 1 <= n_columns <= shape.columns

        def product():
            columns = at(x, n_columns * stride).reshape(n_columns, stride)[:, : 2 * n_elements].view(np.float16)
            blocks = at(data, n_rows * row_bytes)
            values = nd.dequantize(blocks, fmt, "float32", shape=(n_rows, n_elements), device="reference")
            found = columns.astype(np.float64) @ values.T.astype(np.float64)
            if shape.columns > 1:
                found *= at(powers, 4 * n_columns).view(np.float32)[:, None]
            if bias_type is not None:
                found += at(bias, n_rows * numpy_dtype(bias_type).itemsize).view(numpy_dtype(bias_type))
            at(out, found.size * size)[:] = found.astype(numpy_dtype(dtype)).reshape(-1).view(np.uint8)

        read = [(data, n_rows * row_bytes), (x, n_columns * stride)]
        read += [] if shape.columns == 1 else [(powers, 4 * n_columns)]
        read += [] if bias_type is None else [(bias, n_rows * numpy_dtype(bias_type).itemsize)]
        self.queue(stream, product, *read, (out, n_columns * n_rows * size))

    def create_stream(self):
        with self.lock:
            self.n_streams += 1
            return Stream(self, 100 + self.n_streams)

    def synchronize(self, stream):
        self.run(stream)

    def raise_if_failed(self, stream):
        pass

    def record_event(self, stream):
        with self.lock:
            return Event(self, int(stream), len(self.queues[int(stream)]))

    def stream_wait_event(self, stream, event):
        with self.lock:
            awaited = event.stream, event.position
            self.queue(stream, lambda: self.run(*awaited), awaited=awaited)

    def wait_for_event(self, event):
        event.sync()

    def stream_wait_stream(self, waiting, awaited):
        if waiting != awaited:
            self.stream_wait_event(waiting, self.record_event(awaited))

    def refuse_capture(self, stream, reason):
        pass

    def keep_until_done(self, stream, array):
        self.kept.append(array)

    def keeper_of(self, stream):
        return True, None

    # What it does with them

    def dequantize(self, fmt, dtype, n_elements, data, out, stream):
        n_bytes, n_written = fmt.n_bytes((n_elements,)), n_elements * numpy_dtype(dtype).itemsize
        assert data % 16 == out % 16 == 0, "neither wide loads nor wide stores"
        work = lambda: compute(fmt, dtype, n_elements, data, out)  # noqa: E731
        self.queue(stream, work, (data, n_bytes), (out, n_written))

    def queue(self, stream, work, *ranges, awaited=None):
        with self.lock:
            self.queues[int(stream)].append(Operation(work, ranges, awaited))
            for handle in list(self.queues):
                if self.random.random() < 0.2:
                    self.run(handle, self.done[handle] + self.random.randint(0, 3))

    def run(self, stream, position=None):
        with self.lock:
            queue = self.queues[int(stream)]
            while self.done[int(stream)] < min(len(queue), position if position is not None else len(queue)):
                operation = queue[self.done[int(stream)]]
                self.done[int(stream)] += 1
                operation.work()
                operation.work = None

    def free(self, owner):
        with self.lock:
            first, last = owner.range
            self.in_use -= last - first
            for stream, queue in self.queues.items():
                for position, operation in enumerate(queue[self.done[stream] :], self.done[stream]):
                    overlaps = any(start < last and first < start + n_bytes for start, n_bytes in operation.ranges)
                    if overlaps and not self.is_behind(owner.stream, stream, position):
                        self.problems.append(f"freed while stream {stream} was still going to use it")

    def is_behind(self, waiting, stream, position):
        """Whether a stream does nothing more before another one has got past a position."""
        awaited = [operation.awaited for operation in self.queues[waiting][self.done[waiting] :] if operation.awaited]
        return waiting == stream or any(of == stream and upto > position for of, upto in awaited)


def compute(fmt, dtype, n_elements, data, out):
    blocks = at(data, fmt.n_bytes((n_elements,)))
    values = nd.dequantize(blocks, fmt, dtype, device="reference")
    assert values.size == n_elements
    at(out, values.nbytes)[:] = values.view(np.uint8)


def installed(seed, monkeypatch, *, has_threads=True, tuning=TUNING):
    """Yield a late GPU in place of the real one; without what reader threads need, if it is said so."""
    late = LateGpu(seed, has_threads=has_threads)
    monkeypatch.setitem(gpu.OPEN, 0, late)
    monkeypatch.setattr(devices, "why_no_cuda", lambda: None)
    monkeypatch.setattr(gpu_buffers, "TUNING", tuning)
    threads = n_threads_of_this_process()
    yield late
    gc.collect()
    assert n_threads_of_this_process(threads) <= threads  # one of faulthandler may have ended
    assert not late.problems
    assert has_threads or not late.idle_buffers
