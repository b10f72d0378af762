"""Processes that meet at an empty cache."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context

import numpy as np

from numba_dequant import disk_cache


def meet(barrier, folder):
    os.environ[disk_cache.VARIABLE] = folder
    barrier.wait(timeout=300)


def call(function):
    return function()


def assert_processes_keep(n_processes, function, store, n_entries, preload):
    """All of them return the same from `function`; `store` then has so many entries, and nothing else.

    Where the system can, they are forked from a new process that has imported `preload` and has done nothing: their
    imports would take longer than what is tested.
    """
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload(preload)
    arguments = context.Barrier(n_processes), str(store)
    with ProcessPoolExecutor(n_processes, context, meet, arguments) as pool:
        first, *others = pool.map(call, [function] * n_processes)
    assert len(others) == n_processes - 1
    for found in others:
        np.testing.assert_array_equal(found, first)
    assert len(list(store.iterdir())) == len(disk_cache.entries()) == n_entries
    assert all(disk_cache.read(name) is not None for name in disk_cache.entries())
