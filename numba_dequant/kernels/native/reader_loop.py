"""The function that the threads of `loading.native_threads` run, and one that joins them, compiled by Numba."""

from __future__ import annotations

import errno
from typing import Any

from numba import carray, types
from numba.extending import register_jitable

from numba_dequant.kernels.native.intrinsics import atomic_load, atomic_rmw, call_c, call_cuda, load_int, pointer
from numba_dequant.kernels.native.records import (
    END_OF_FILE,
    FAULT_GPU,
    FAULT_READ,
    buffer_dtype,
    calls_dtype,
    chunk_dtype,
    crew_dtype,
    job_dtype,
    slice_dtype,
    thread_dtype,
)

PAUSE = 20
"""Microseconds between checks for a free buffer; a copy takes about 150."""

INTERRUPTED = errno.EINTR
ARGUMENTS, TOKEN = (thread_dtype.fields[name][1] for name in ("data", "token"))  # type: ignore[index]
ADDRESSES = thread_dtype.fields["data_at"][1] - ARGUMENTS  # type: ignore[index]
CLAIMED, PLANNED, BYTES_READ = (job_dtype.fields[name][1] for name in ("claimed", "planned", "bytes_read"))  # type: ignore[index]
IS_OVER, N_BUFFERS = (job_dtype.fields[name][1] for name in ("is_over", "n_buffers"))  # type: ignore[index]
FREE_AT, IS_TAKEN = (buffer_dtype.fields[name][1] for name in ("free_at", "is_taken"))  # type: ignore[index]
SHARES_LEFT, BUFFER_OF = (chunk_dtype.fields[name][1] for name in ("shares_left", "buffer"))  # type: ignore[index]
BUFFER_SIZE, CHUNK_SIZE, THREAD_SIZE = buffer_dtype.itemsize, chunk_dtype.itemsize, thread_dtype.itemsize


@register_jitable  # type: ignore[untyped-decorator]
def is_free(buffer_at: Any, buffer: Any) -> Any:
    """Whether the GPU has finished using a buffer."""
    return atomic_load(buffer.flag) == atomic_load(buffer_at + FREE_AT) & 0xFFFFFFFF


@register_jitable  # type: ignore[untyped-decorator]
def take_buffer(job_at: Any, buffers_at: Any, buffers: Any) -> Any:
    """Claim a free buffer; returns its index or -1. The first ones are the most likely to be in the CPU cache."""
    for number in range(atomic_load(job_at + N_BUFFERS)):
        buffer_at = buffers_at + number * BUFFER_SIZE
        if atomic_load(buffer_at + IS_TAKEN) or not is_free(buffer_at, buffers[number]):
            continue
        if atomic_rmw("xchg", buffer_at + IS_TAKEN, 1) == 0:
            # Another thread may have used it since the check, so check again.
            if is_free(buffer_at, buffers[number]):
                return number
            atomic_rmw("xchg", buffer_at + IS_TAKEN, 0)
    return -1


@register_jitable  # type: ignore[untyped-decorator]
def buffer_of(job: Any, job_at: Any, chunk: Any, chunk_at: Any, is_first: Any, buffers: Any, calls: Any) -> Any:
    """The index of the buffer of a chunk, or -1 if the load is over. The thread with the first share claims it."""
    number = -1
    while number < 0:
        if is_first:
            number = take_buffer(job_at, job.buffers, buffers)
            if number >= 0:
                atomic_rmw("xchg", chunk_at + BUFFER_OF, number + 1)
        else:
            number = atomic_load(chunk_at + BUFFER_OF) - 1
        if number < 0:
            if atomic_load(job_at + IS_OVER):
                break
            call_c(calls.pause, (PAUSE,))
    return number


@register_jitable  # type: ignore[untyped-decorator]
def read_bytes(calls: Any, file: Any, host: int, n_bytes: Any, offset: Any) -> Any:
    """Read to pinned memory; returns 0, an errno or END_OF_FILE, and the number of bytes read."""
    done = 0
    while done < n_bytes:
        got = call_c(calls.read, (file, host + done, n_bytes - done, offset + done))
        if got > 0:
            done += got
            continue
        if got == 0:
            return END_OF_FILE, done
        code = load_int(call_c(calls.error, (0,)))
        if code != INTERRUPTED:
            return code, done
    return 0, done


@register_jitable  # type: ignore[untyped-decorator]
def send_chunk(calls: Any, chunk: Any, parts: Any, buffer: Any, arguments_at: int) -> Any:
    """Queue all GPU work of a chunk; returns 0 or the error code of the driver."""
    arguments = carray(pointer(arguments_at), 3, types.int64)
    code = 0
    if buffer.waited != chunk.ready:
        code = call_cuda(calls.let_gpu_wait, (buffer.stream, chunk.ready, 0))
        buffer.waited = chunk.ready
    if code == 0 and chunk.is_computed:
        code = call_cuda(calls.copy, (buffer.gpu, buffer.host, chunk.n_bytes, buffer.stream))
    for number in range(chunk.first_part, chunk.first_part + chunk.n_parts):
        if code:
            break
        part = parts[number]
        if part.kernel:
            arguments[0], arguments[1], arguments[2] = buffer.gpu + part.at, part.n_elements, part.target
            grid, block = (part.n_thread_blocks, 1, 1), (part.n_threads, 1, 1)
            addresses = arguments_at + ADDRESSES
            code = call_cuda(calls.launch, (part.kernel, *grid, *block, 0, buffer.stream, addresses, 0))
        else:
            code = call_cuda(calls.copy, (part.target, buffer.host + part.at, part.n_bytes, buffer.stream))
    # Also after a failure: the buffer is free when the GPU reaches this point.
    buffer.free_at += 1
    failed = call_cuda(calls.signal, (buffer.stream, buffer.flag, buffer.free_at & 0xFFFFFFFF, 0))
    return code or failed


@register_jitable  # type: ignore[untyped-decorator]
def count_chunk(calls: Any, job: Any, job_at: Any, chunk: Any, parts: Any, stream_bit: Any) -> None:
    """Update the counters for a chunk that was sent, and signal if a tensor is complete."""
    is_complete, n_bytes = False, 0
    for number in range(chunk.first_part, chunk.first_part + chunk.n_parts):
        part = parts[number]
        atomic_rmw("or", job.written + 8 * part.tensor, stream_bit)
        is_complete |= atomic_rmw("sub", job.left + 8 * part.tensor, part.n_bytes) == part.n_bytes
        n_bytes += part.n_bytes
    atomic_rmw("add", job_at + BYTES_READ, n_bytes)
    if is_complete:
        call_c(calls.tell, (job.progress, job.one, 8))


@register_jitable  # type: ignore[untyped-decorator]
def start_next(calls: Any, job: Any, thread: Any, thread_at: Any) -> Any:
    """Start the next thread, so that Python starts only the first. If the system has none left, fewer threads read."""
    number = thread.number + 1
    if number < job.n_threads:
        handle_at = job.threads + 8 * number
        if call_cuda(calls.create, (handle_at, job.attributes, calls.read_and_send, thread_at + THREAD_SIZE)):
            carray(pointer(handle_at), 1, types.int64)[0] = 0


def read_and_send(thread_at: int) -> int:
    """Read shares of chunks until none are left or a thread has failed; returns how many were read.

    The thread that reads the last share of a chunk sends the chunk.
    """
    thread = carray(pointer(thread_at), 1, thread_dtype)[0]
    job_at, arguments_at = thread.job, thread_at + ARGUMENTS
    job = carray(pointer(job_at), 1, job_dtype)[0]
    calls = carray(pointer(job.calls), 1, calls_dtype)[0]
    start_next(calls, job, thread, thread_at)
    chunks = carray(pointer(job.chunks), job.n_chunks, chunk_dtype)
    parts = carray(pointer(job.parts), job.n_parts, slice_dtype)
    buffers = carray(pointer(job.buffers), job.most_buffers, buffer_dtype)
    count = chunk_number = 0
    call_cuda(calls.set_context, (job.context,))
    while True:
        if call_c(calls.wait_for_share, (job.shares_planned, thread_at + TOKEN, 8)) != 8:
            continue
        if atomic_load(job_at + IS_OVER):
            return count
        share = atomic_rmw("add", job_at + CLAIMED, 1)
        if share >= atomic_load(job_at + PLANNED):
            return count
        while (share - chunks[chunk_number].first_share) * job.share_size >= chunks[chunk_number].n_bytes:
            chunk_number += 1
        chunk, chunk_at = chunks[chunk_number], job.chunks + chunk_number * CHUNK_SIZE
        start = (share - chunk.first_share) * job.share_size
        number = buffer_of(job, job_at, chunk, chunk_at, start == 0, buffers, calls)
        if number < 0:
            return count
        buffer, fault = buffers[number], FAULT_READ
        n_bytes = min(job.share_size, chunk.n_bytes - start)
        code, done = read_bytes(calls, chunk.file, buffer.host + start, n_bytes, chunk.offset + start)
        is_whole = code == 0 and atomic_rmw("sub", chunk_at + SHARES_LEFT, 1) == 1
        if is_whole:
            fault, code = FAULT_GPU, send_chunk(calls, chunk, parts, buffer, arguments_at)
            atomic_rmw("xchg", job.buffers + number * BUFFER_SIZE + IS_TAKEN, 0)
        if code:
            thread.fault_chunk, thread.fault_place, thread.fault_code = chunk_number, fault, code
            thread.fault_offset = chunk.offset + start + done
            thread.has_failed = 1
            atomic_rmw("xchg", job_at + IS_OVER, 1)
            call_c(calls.tell, (job.progress, job.one, 8))
            return count
        count += 1
        if is_whole:
            count_chunk(calls, job, job_at, chunk, parts, buffer.stream_bit)


def join_threads(crew_at: int) -> int:
    """Wait until threads have ended; returns how many. Ctrl-C cannot interrupt this one native call.

    When a thread has ended, the handle of the one that it started is there.
    """
    crew = carray(pointer(crew_at), 1, crew_dtype)[0]
    threads = carray(pointer(crew.threads), crew.count, types.int64)
    count = 0
    for number in range(crew.count):
        if threads[number]:
            call_c(crew.join, (threads[number], 0))
            threads[number] = 0
            count += 1
    return count
