import pytest

from numba_dequant.kernels.gpu_packages import is_there

# These put something in place of a GPU under the packages that a GPU needs, or look at what they compile.
collect_ignore_glob = [] if is_there("cuda.core") and is_there("numba_cuda") else ["test_*.py"]


SEEDS = [0, 1, 2, 3, "small files 0", "small files 1"]


def installed(request, monkeypatch):
    import late_gpu

    kind, _, seed = str(request.param).rpartition(" ")
    tuning = late_gpu.WITH_SMALL_FILES if kind == "small files" else late_gpu.TUNING
    yield from late_gpu.installed(int(seed), monkeypatch, has_threads=kind != "no threads", tuning=tuning)


@pytest.fixture(params=SEEDS)
def late_with_threads(request, monkeypatch):
    """A GPU that is late, in several orders of things."""
    yield from installed(request, monkeypatch)


@pytest.fixture(params=[*SEEDS, "no threads 0"])
def late(request, monkeypatch):
    """A GPU that is late, in several orders of things, and one whose system or driver lacks what threads need."""
    yield from installed(request, monkeypatch)
