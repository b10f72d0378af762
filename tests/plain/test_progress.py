"""How far loading has got, for people and for programs."""

import io
import sys
from types import SimpleNamespace

import pytest
from blocks import random_blocks, write_model

import numba_dequant as nd
from numba_dequant.loading import progress
from numba_dequant.loading.progress import Progress, Reporter


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "perf_counter", lambda: Clock.now)
    return Clock


def run(clock, terminal, monkeypatch, show=None, seconds=3):
    monkeypatch.setattr(sys, "stderr", terminal)
    report = Reporter(3_000_000, show, None)
    for second in range(1, seconds + 1):
        clock.now = 100.0 + second * 0.99
        report(second * 1_000_000)
    report.close()
    return terminal.getvalue()


def test_a_bar_on_a_terminal(clock, monkeypatch):
    shown = run(clock, Terminal(), monkeypatch)
    assert "3.00M/3.00M" in shown
    assert "B/s" in shown


def test_none_for_what_takes_less_than_a_second(clock, monkeypatch):
    assert run(clock, Terminal(), monkeypatch, seconds=1) == ""


def test_none_in_a_pipe(clock, monkeypatch):
    assert run(clock, io.StringIO(), monkeypatch) == ""


def test_none_if_off(clock, monkeypatch):
    assert run(clock, Terminal(), monkeypatch, show=False) == ""


def test_one_in_a_pipe_if_on(clock, monkeypatch):
    assert "3.00M/3.00M" in run(clock, io.StringIO(), monkeypatch, show=True)


def test_a_notebook_is_watched(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not progress.is_watched()
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert not progress.is_watched()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not progress.is_watched()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None)))
    assert progress.is_watched()


def test_no_stderr_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert not progress.is_watched()


def test_reports_come_no_more_often_than_needed(clock):
    seen = []
    report = Reporter(100, show=False, callback=seen.append)
    for step in range(100):
        clock.now += 0.01
        report(step + 1)
    assert 9 <= len(seen) <= 12
    assert seen[-1].bytes_done == seen[-1].bytes_total == 100
    assert seen[-1].seconds == pytest.approx(1.0)


def test_what_a_report_says():
    half = Progress(50, 100, 2.0)
    assert half.speed == 25
    assert half.seconds_left == 2.0
    assert Progress(0, 100, 0.0).speed == 0
    assert Progress(0, 100, 0.0).seconds_left is None


@pytest.mark.parametrize("threads", [1, 3])
def test_the_last_report_is_of_everything(tmp_path, threads):
    path = write_model(tmp_path / "m.gguf", {"w": ("Q8_0", (4000, 320), random_blocks("Q8_0", 40_000))})
    seen = []
    nd.load(path, device="cpu", callback=seen.append, threads=threads)
    assert [each.bytes_done for each in seen].count(seen[-1].bytes_total) == 1
    assert seen[-1].bytes_done == seen[-1].bytes_total == 40_000 * 34
    seen.clear()
    with nd.open(path) as model:
        for _ in model.stream(device="cpu", callback=seen.append, threads=threads):
            pass
    assert seen[-1].bytes_done == 40_000 * 34
