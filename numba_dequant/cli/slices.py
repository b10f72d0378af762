"""Streams slices of tensors to host memory, for commands whose memory must not grow with the model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.backends.devices import available_cores
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.loading.requests import request_for
from numba_dequant.model import Model

MAX_READERS = 16
"""Maximum number of threads; each has a buffer of 1 MiB."""


def stream_slices(
    model: Model,
    slices: Sequence[TensorInfo],
    dtype: str | None,
    device: Any,
    progress: bool | None = None,
) -> Generator[NDArray[Any], None, None]:
    """The values of slices of tensors, in order, in host memory; two are read ahead. No tensor need fit in memory.

    Args:
        model: the model of the tensors.
        slices: slices, as `requests.cut` returns them.
        dtype: the name of an output type, or None for the compressed bytes.
        device: as for `Model.load`.
        progress: as for `Model.load_all`.

    Raises:
        NumbaDequantError: as for `Model.load_all`.
    """
    chosen = [request_for(each, dtype) for each in slices]
    threads = min(available_cores(), MAX_READERS)
    for _, result in model._named(chosen, device, None, threads, 2, progress, None):
        values = result.data if dtype is None else result
        yield values if isinstance(values, np.ndarray) else values.copy_to_host()
