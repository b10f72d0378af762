import gc
import os
import signal
from itertools import count

import pytest

from numba_dequant import FORMATS
from numba_dequant.backends import cpu
from numba_dequant.backends.devices import is_simulated, why_no_cuda
from numba_dequant.kernels import compiler


def pytest_collection_modifyitems(config, items):
    problem = "the CUDA simulator is on" if is_simulated() else why_no_cuda()
    asked = config.option.markexpr
    if problem and "gpu" in asked and "not gpu" not in asked:
        # Who asks for these tests and no others must not take "all skipped" for a success.
        raise pytest.UsageError(f"-m {asked!r}, but there is no GPU that can be used: {problem}")
    no_toolkit = (
        next((item for item in items if item.get_closest_marker("toolkit")), None) and compiler.why_no_toolkit()
    )
    for item in items:
        if no_toolkit and item.get_closest_marker("toolkit"):
            item.add_marker(pytest.mark.skip(reason=no_toolkit))
        if problem and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {problem}"))
    # What takes long comes first: other processes then have something to do until it ends.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


# Numba makes many objects while it compiles. Looking for garbage less often saves a fourteenth of the processor time.
gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def listen_to_ctrl_c():
    """Python does not, where a shell has started the tests in the background."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests neither use nor fill the user's cache. Processes of one run of the tests share one: each compiles less."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared_cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(folder))
        yield


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect():
    """Many tests collect garbage; what a test file before this one has imported and compiled is none."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(tmp_path))
    cpu._compile.cache_clear()
    yield tmp_path
    cpu._compile.cache_clear()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where tests of PyTorch and of programs compute."""
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request):
    return request.param


NUMBERS = count()


@pytest.fixture
def own_format():
    """A format that is not registered. If a test registers it, that is undone."""
    from numba_dequant import formats

    known, ids = dict(formats._formats), dict(formats._with_id)
    ours = FORMATS["Q8_0"]
    # Another test's format of the same fields, if something keeps it, would be what unpickling returns.
    summary = f"of one's own, number {next(NUMBERS)}"
    yield formats.Format("OWN_by_hand", 907, 32, ours.layout, summary, ours.dequantize, ours.decode)
    for kept, before in ((formats._formats, known), (formats._with_id, ids)):
        kept.clear()
        kept.update(before)
