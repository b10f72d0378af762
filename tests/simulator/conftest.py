import os
import random

from numba_dequant.backends.devices import is_simulated

# The simulator has a thread of Python's for each thread of a GPU. One core runs them in half the processor time that
# several take, which hand the interpreter lock to and fro.
if is_simulated() and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
