"""Twenty processes that meet at an empty cache."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from numba_dequant import disk_cache

N_PROCESSES = 20


def meet(barrier):
    barrier.wait(timeout=300)


def call(function):
    return function()


def assert_twenty_processes_keep(function, store, n_entries):
    """All of them return the same from `function`; `store` then has so many entries, and nothing else."""
    context = get_context("spawn")
    with ProcessPoolExecutor(N_PROCESSES, context, meet, (context.Barrier(N_PROCESSES),)) as pool:
        first, *others = pool.map(call, [function] * N_PROCESSES)
    assert len(others) == N_PROCESSES - 1
    for found in others:
        np.testing.assert_array_equal(found, first)
    assert len(list(store.iterdir())) == len(disk_cache.entries()) == n_entries
    assert all(disk_cache.read(name) is not None for name in disk_cache.entries())
