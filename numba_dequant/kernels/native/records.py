"""Data that Python and native functions share: records of 64-bit integers and addresses."""

from __future__ import annotations

from typing import Any

import numpy as np


def record(*names: str) -> np.dtype[Any]:
    """A record of 64-bit integers."""
    return np.dtype([(name, np.int64) for name in names])


strings_dtype = record("data", "n_bytes", "at", "left")
"""Bytes in memory, the offset of the first string, and the number of strings to pass."""

chunk_dtype = record(
    *("file", "offset", "n_bytes", "first_part", "n_parts", "is_computed", "ready"),
    *("first_share", "shares_left", "buffer"),
)
"""A range of a file, which threads read in shares. `ready` is the event after which its target memory may be used.
`buffer` is the index of its buffer plus one, or 0."""

slice_dtype = record("tensor", "at", "n_bytes", "target", "kernel", "n_thread_blocks", "n_threads", "n_elements")
"""The bytes of one tensor in a chunk, and the launch for them; without a kernel they are copied."""

buffer_dtype = record("host", "gpu", "stream", "stream_bit", "waited", "flag", "free_at", "is_taken")
"""A buffer in pinned memory, one of the same size on the GPU, and the stream that uses them. `waited` is the last event
that the stream waited for. The GPU counts uses at `flag`; the buffers are free when this count equals `free_at` and
`is_taken` is 0. The count is in pinned memory, because querying the driver would make threads wait for each other."""

thread_dtype = record(
    *("job", "number", "data", "n_elements", "out", "data_at", "n_elements_at", "out_at", "token"),
    *("has_failed", "fault_chunk", "fault_place", "fault_code", "fault_offset"),
)
"""The state of one thread: the three kernel arguments and their addresses for a launch; `token`, which is read for each
share of a chunk; and the fault, if any. The records of all threads follow one another."""

job_dtype = record(
    *("calls", "context", "buffers", "most_buffers", "n_buffers"),
    *("chunks", "parts", "n_chunks", "n_parts", "left", "written"),
    *("share_size", "shares_planned", "progress", "one"),
    *("claimed", "planned", "bytes_read", "is_over"),
    *("threads", "n_threads", "attributes"),
)
"""The state that all threads of a load share: addresses of tables, two event descriptors, counters, the address of the
thread handles, their number, and the address of the attributes for new threads. The first `n_buffers` of `most_buffers`
buffers may be used."""

crew_dtype = record("join", "threads", "count")
"""The address of pthread_join, the address of the thread handles (0 for none), and their number."""

calls_dtype = record(
    *("set_context", "wait_for_share", "read", "error", "tell"),
    *("pause", "let_gpu_wait", "copy", "launch", "signal"),
    *("create", "read_and_send"),
)
"""Addresses of functions of the C library and of the CUDA driver, and of the function that the threads run."""

FAULT_READ, FAULT_GPU = 0, 1
"""Kinds of faults: reading the file, or calling the driver."""

END_OF_FILE = -1
"""Used instead of an errno: the file has no more bytes."""
