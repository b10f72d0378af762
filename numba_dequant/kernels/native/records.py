"""What Python and the native functions share: records of 64-bit numbers, addresses among them."""

from __future__ import annotations

from typing import Any

import numpy as np


def record(*names: str) -> np.dtype[Any]:
    """A record of 64-bit numbers."""
    return np.dtype([(name, np.int64) for name in names])


strings_dtype = record("data", "n_bytes", "at", "left")
"""Bytes in memory, where among them strings begin, and how many may be passed."""

chunk_dtype = record(
    *("file", "offset", "n_bytes", "first_part", "n_parts", "is_computed", "ready"),
    *("first_share", "shares_left", "buffer"),
)
"""Bytes of a file, which threads share in reading; `ready` is the event after which memory for them is there. `buffer`
is one more than the number of the one that they have got."""

slice_dtype = record("tensor", "at", "n_bytes", "target", "kernel", "n_thread_blocks", "n_threads", "n_elements")
"""Bytes of one tensor in a chunk, and what becomes of them; those with no kernel are copied."""

buffer_dtype = record("host", "gpu", "stream", "stream_bit", "waited", "flag", "free_at", "is_taken")
"""Pinned memory, as much on the GPU, and the stream that fills and empties the latter; `waited` is the event that it
has waited for last. The GPU counts at `flag` how often both have been used; they are free once it says `free_at`, and
no thread has them. The count lies in pinned memory, because asking the driver makes threads wait for each other."""

thread_dtype = record(
    *("job", "data", "n_elements", "out", "data_at", "n_elements_at", "out_at", "token"),
    *("has_failed", "fault_chunk", "fault_place", "fault_code", "fault_offset"),
)
"""What one thread works with: a launch takes the addresses of its three arguments; `token` is read when there is one
more share of a chunk. What it has failed at, if it has."""

job_dtype = record(
    *("calls", "context", "buffers", "most_buffers", "n_buffers"),
    *("chunks", "parts", "n_chunks", "n_parts", "left", "written"),
    *("share_size", "shares_planned", "progress", "one"),
    *("claimed", "planned", "bytes_read", "is_over"),
)
"""What all threads of a load share: addresses of tables, two event descriptors, and counters. Of `most_buffers` the
first `n_buffers` are there to be used."""

crew_dtype = record("join", "threads", "count")
"""The C library's function, the addresses of threads to be joined, and how many there may be; 0 for none."""

calls_dtype = record(
    *("set_context", "wait_for_share", "read", "error", "tell"),
    *("pause", "let_gpu_wait", "copy", "launch", "signal"),
)
"""Addresses of functions of the C library and of the driver."""

FAULT_READ, FAULT_GPU = 0, 1
"""Places of a fault."""

END_OF_FILE = -1
"""In place of the C library's code of a fault: the file has no more bytes."""
