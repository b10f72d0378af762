"""The loop of `pump`, in Python that Numba compiles."""

from __future__ import annotations

import errno
from typing import Any

from numba import carray, types
from numba.extending import register_jitable

from numba_dequant.native.intrinsics import atomic, call, call_driver, load_int, look, pointer
from numba_dequant.native.records import BUFFER, CALLS, ENDED, IN_FILE, IN_GPU, JOB, LANE, PART, PIECE

PAUSE = 20
"""Microseconds; a copy takes 80."""

INTERRUPTED = errno.EINTR
ARGUMENTS, TOKEN = (LANE.fields[name][1] for name in ("data", "token"))  # type: ignore[index]
ADDRESSES = LANE.fields["data_at"][1] - ARGUMENTS  # type: ignore[index]
CLAIMED, PLANNED, TAKEN = (JOB.fields[name][1] for name in ("claimed", "planned", "taken"))  # type: ignore[index]
IS_OVER, FAULTS = (JOB.fields[name][1] for name in ("is_over", "faults"))  # type: ignore[index]


@register_jitable  # type: ignore[untyped-decorator]
def read_piece(calls: Any, piece: Any, host: int) -> Any:
    """Read a piece to pinned memory; the result is 0, the C library's code, or ENDED, and how many bytes were read."""
    done = 0
    while done < piece.n_bytes:
        got = call(calls.read, (piece.file, host + done, piece.n_bytes - done, piece.offset + done))
        if got > 0:
            done += got
            continue
        if got == 0:
            return ENDED, done
        code = load_int(call(calls.error, (0,)))
        if code != INTERRUPTED:
            return code, done
    return 0, done


@register_jitable  # type: ignore[untyped-decorator]
def send_piece(calls: Any, piece: Any, parts: Any, buffer: Any, lane: Any, arguments_at: int) -> Any:
    """Queue all work on a piece; the result is 0, or the driver's code."""
    arguments = carray(pointer(arguments_at), 3, types.int64)
    code = 0
    if lane.waited != piece.ready:
        code = call_driver(calls.let_gpu_wait, (lane.stream, piece.ready, 0))
        lane.waited = piece.ready
    if code == 0 and piece.is_computed:
        code = call_driver(calls.copy, (buffer.gpu, buffer.host, piece.n_bytes, lane.stream))
    for number in range(piece.first_part, piece.first_part + piece.n_parts):
        if code:
            break
        part = parts[number]
        if part.kernel:
            arguments[0], arguments[1], arguments[2] = buffer.gpu + part.at, part.n_elements, part.target
            grid, block = (part.n_thread_blocks, 1, 1), (part.n_threads, 1, 1)
            code = call_driver(calls.launch, (part.kernel, *grid, *block, 0, lane.stream, arguments_at + ADDRESSES, 0))
        else:
            code = call_driver(calls.copy, (part.target, buffer.host + part.at, part.n_bytes, lane.stream))
    # After a failure too: the buffer is free once the GPU has got to here.
    buffer.free_at += 1
    failed = call_driver(calls.signal, (lane.stream, buffer.flag, buffer.free_at & 0xFFFFFFFF, 0))
    return code or failed


def pump(lane_at: int) -> int:
    """Take pieces until there are no more, or a thread has failed; the result is how many were taken."""
    lane = carray(pointer(lane_at), 1, LANE)[0]
    job_at, arguments_at = lane.job, lane_at + ARGUMENTS
    job = carray(pointer(job_at), 1, JOB)[0]
    calls = carray(pointer(job.calls), 1, CALLS)[0]
    pieces = carray(pointer(job.pieces), job.n_pieces, PIECE)
    parts = carray(pointer(job.parts), job.n_parts, PART)
    buffers = carray(pointer(lane.buffers), lane.n_buffers, BUFFER)
    count = 0
    call_driver(calls.set_context, (lane.context,))
    while True:
        if call(calls.wait_for_piece, (job.pieces_planned, lane_at + TOKEN, 8)) != 8:
            continue
        if look(job_at + IS_OVER):
            return count
        index = atomic("add", job_at + CLAIMED, 1)
        if index >= look(job_at + PLANNED):
            return count
        piece, buffer = pieces[index], buffers[lane.turn]
        while look(buffer.flag) != buffer.free_at & 0xFFFFFFFF:
            if look(job_at + IS_OVER):
                return count
            call(calls.pause, (PAUSE,))
        place = IN_FILE
        code, done = read_piece(calls, piece, buffer.host)
        if code == 0:
            place, code = IN_GPU, send_piece(calls, piece, parts, buffer, lane, arguments_at)
            lane.turn = (lane.turn + 1) % lane.n_buffers
        if code:
            if atomic("add", job_at + FAULTS, 1) == 0:
                job.fault_piece, job.fault_place, job.fault_code = index, place, code
                job.fault_offset = piece.offset + done
                atomic("xchg", job_at + IS_OVER, 1)
                call(calls.tell, (job.progress, job.one, 8))
            return count
        is_complete = False
        for number in range(piece.first_part, piece.first_part + piece.n_parts):
            part = parts[number]
            atomic("or", job.written + 8 * part.tensor, 1 << lane.number)
            is_complete |= atomic("sub", job.left + 8 * part.tensor, part.n_bytes) == part.n_bytes
        atomic("add", job_at + TAKEN, piece.n_bytes)
        if is_complete:
            call(calls.tell, (job.progress, job.one, 8))
        count += 1
