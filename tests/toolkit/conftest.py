import pytest

from numba_dequant.kernels.gpu_packages import is_there

# These put something in place of a GPU under the packages that a GPU needs, or look at what they compile.
collect_ignore_glob = [] if is_there("cuda.core") and is_there("numba_cuda") else ["test_*.py"]


@pytest.fixture(params=[0, 1, 2, 3, "alone", "no signals"])
def late(request, monkeypatch):
    """Four orders of things, a system without what the threads need, and a driver."""
    import late_gpu

    yield from late_gpu.installed(request.param, monkeypatch)


@pytest.fixture
def with_threads(late):
    """For what only threads do: not where a system or a driver lacks what they need."""
    from small_model import has_threads

    if not has_threads():
        pytest.skip("no threads read here")
