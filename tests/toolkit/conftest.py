import pytest

from numba_dequant.kernels.gpu_packages import is_there

# These put something in place of a GPU under the packages that a GPU needs, or look at what they compile.
collect_ignore_glob = [] if is_there("cuda.core") and is_there("numba_cuda") else ["test_*.py"]


@pytest.fixture(params=[0, 1, 2, 3])
def late_with_threads(request, monkeypatch):
    """A GPU that is late, in four orders of things."""
    import late_gpu

    yield from late_gpu.installed(request.param, monkeypatch)


@pytest.fixture(params=[0, 1, 2, 3, "no threads"])
def late(request, monkeypatch):
    """A GPU that is late, in four orders of things, and one whose system or driver lacks what reader threads need."""
    import late_gpu

    yield from late_gpu.installed(request.param, monkeypatch, has_threads=request.param != "no threads")
