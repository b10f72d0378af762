import doctest
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import numba_dequant as nd

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["api", "explain", "format", "kernels.dequantize"])
def test_examples_in_docstrings(module):
    found = doctest.testmod(importlib.import_module(f"numba_dequant.{module}"), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


def test_published_figures_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report

    for page in report.PARTS:
        assert page.read_text() == report.filled(page, report.RESULTS), (
            f"{page} is not what benchmarks/report.py writes"
        )


def test_published_figures_come_with_their_spread(tmp_path, monkeypatch):
    """Quartiles where the results have them; nothing where there are too few readings; words where it is wide."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report

    content = json.loads((report.RESULTS / report.RUNS["loading"]).read_text())
    for entry in content["benchmarks"]:
        if entry["name"].startswith("test_load_gpu"):
            median, is_wide = entry["stats"]["median"], "pageable" in entry["name"]
            entry["stats"] |= {"q1": 0.99 * median, "q3": 1.01 * median, "iqr": (0.2 if is_wide else 0.02) * median}
    (tmp_path / report.RUNS["loading"]).write_text(json.dumps(content))
    shown = report.loading(report.of_part(tmp_path, "loading"))
    rows = {tuple(cells[1:3]): cells for cells in (line.split(" | ") for line in shown.splitlines()) if len(cells) == 9}
    results = report.of_part(tmp_path, "loading")
    ours = 1e3 * results.one("test_load_gpu", name="Gemma-3-270M", way="ours")["seconds"]
    assert rows["ours", f"{ours:,.1f}"][3:5] == [f"{0.99 * ours:,.1f} to {1.01 * ours:,.1f}", "2.0%"]
    slow = 1e3 * results.one("test_load_gpu", name="Gemma-3-270M", way="gguf-py")["seconds"]
    assert rows["gguf-py", f"{slow:,.1f}"][3:5] == ["", ""]
    assert "It is at most 20.0% here, and over 10% for 3 of 12: a difference smaller than" in shown


def test_the_page_of_products_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report_products

    page = report_products.PAGE.read_text() if report_products.PAGE.exists() else None
    assert page == report_products.page(), "run benchmarks/report_products.py"


def test_the_page_of_products_divides_by_the_floor(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report_products

    def entry(test, us, **parameters):
        stats = {"median": us / 1e6, "q1": us / 1e6, "q3": us / 1e6, "iqr": 0.01 * us / 1e6, "rounds": 9}
        extra = {"floor s": 20e-6, "error": 2e-4, "late": 0}
        return {"name": f"{test}[{us}]", "params": parameters, "extra_info": extra, "stats": stats}

    sizes = {"n_rows": 14336, "n_elements": 4096}
    entries = [entry("test_cublas", 43, n_columns=1, **sizes), entry("test_cublas", 45, n_columns=64, **sizes)]
    for name, us in (("Q8_0", 25), ("TQ1_0", 21)):
        for overlaps in (True, False):
            more = 0 if overlaps else 5
            entries.append(entry("test_product", us + more, name=name, n_columns=1, overlaps=overlaps, **sizes))
    for way, us in (("fused", 80), ("dequantize first", 97)):
        entries.append(entry("test_many_columns", us, name="Q4_K", n_columns=64, way=way))
    for way, us in (("get_rows", 60), ("dequantize", 50)):
        entries.append(entry("test_rows", us, name="Q4_K", way=way))
        entries[-1]["extra_info"]["bytes"] = 150_000_000
    machine = {"gpu": "a GPU", "driver": "a driver", "cpu": "a CPU", "python": "3", "versions": {}, "command": "pytest"}
    (tmp_path / "h100-products.json").write_text(json.dumps({"machine_info": machine, "benchmarks": entries}))
    page = report_products.page(tmp_path)
    assert "| Q8_0 | 14336x4096 | 20.0 | 25.0 | 80.0% | 30.0 | 66.7% | 25.3 | 1.01 | 43.0 | 1.72 |" in page
    assert "| TQ1_0 | 14336x4096 | 20.0 | 21.0 | 95.2% | 26.0 | 76.9% |  |  | 43.0 | 2.05 |" in page
    assert "| Q4_K | 60.0 | 2,500 | 50.0 | 3,000 |" in page
    assert "| Q4_K | 64 | 80.0 | 97.0 | 45.0 | 71.6 | blocks |" in page


def test_several_runs_are_combined(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import merge
    import tables

    def run(*medians, gpu="a GPU"):
        machine = {"gpu": gpu, "driver": "1", "cpu": "a CPU", "python": "3", "versions": {}, "command": "pytest"}
        entries = [
            {
                "name": f"test_size[{number}]",
                "params": {"number": number},
                "extra_info": {"GB/s": 10 / median, "way": "ours", "checked": True},
                "stats": {"median": median, "q1": 0, "q3": 0, "iqr": 0, "rounds": 9, "iterations": 2},
            }
            for number, median in enumerate(medians)
        ]
        return {"machine_info": machine, "benchmarks": entries}

    runs = [run(4.0, 9.0), run(2.0, 9.0, 9.0), run(5.0, 9.0)]
    (tmp_path / "runs.json").write_text(json.dumps(merge.merged(runs)))
    results = tables.Results(tmp_path / "runs.json")
    assert [parameters for parameters, _ in results.of("test_size")] == [{"number": 0}, {"number": 1}]
    info = results.one("test_size", number=0)
    assert info["seconds"] == 4.0
    assert info["quartiles"] == (3.0, 4.5)
    assert info["spread"] == 1.5 / 4
    assert (info["GB/s"], info["way"], info["checked"]) == (2.5, "ours", True)
    assert "quartiles of the medians of 3 runs" in tables.spread_note([info])
    assert tables.machine_line(results).endswith("`pytest`, the medians of 3 runs")
    with pytest.raises(SystemExit, match="the runs differ in gpu"):
        merge.merged([run(1.0), run(1.0, gpu="another")])


def test_the_page_of_limits_is_that_of_the_counters(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report_limits

    assert report_limits.PAGE.read_text() == report_limits.page(), "run benchmarks/report_limits.py"


def test_what_counters_say_of_a_product(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report_limits

    row = {"n_rows": 4096, "n_elements": 4096, "n_columns": 1, "issue": 0.5, "busy": 0.9, "ns": 10_000, "kernels": 1}
    row |= {"pipes": {"FP32": 0.2, "loads": 0.4}, "stalls": {"memory": 0.3, "barrier": 0.1, report_limits.ISSUES: 0.5}}
    assert report_limits.aim(row) == 0.85
    assert report_limits.aim(row | {"n_rows": 14336}) == 0.9
    assert report_limits.aim(row | {"n_columns": 8}) == 0.8
    assert report_limits.slots_needed(row, 5e-6) == pytest.approx(0.9)
    assert report_limits.limits(row, 4e-6) == "instructions"
    assert report_limits.limits(row, 9e-6) == "waits: memory"
    assert report_limits.limits(row | {"pipes": {"loads": 0.7}, "busy": 0.8}, 9e-6) == (
        "the pipe for loads, begin and end of a short kernel"
    )
    assert "the kernel before it" in report_limits.limits(row | {"kernels": 2}, 9e-6)


def test_counters_of_the_profiler_are_read(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import profile_products

    lines = ["==PROF== Connected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    for kernel, value in ((0, "50"), (1, "1,000")):
        lines += [f'"{kernel}","k","{metric}","%","{value}"' for metric in profile_products.METRICS]
    first, second = profile_products.read("\n".join(lines))
    found = profile_products.summary(first)
    assert (found["issue"], found["pipes"]["FP32"], found["ns"]) == (0.5, 0.5, 50)
    assert sum(found["stalls"].values()) == pytest.approx(1, abs=0.01)
    assert profile_products.summary(second)["ns"] == 1000


@pytest.fixture
def report_ranks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("report_ranks")


def test_the_page_of_load_times_is_that_of_the_predictions(report_ranks):
    """Those of few ranks are calculated again; those of many ranks would take many seconds."""
    stored = json.loads((report_ranks.RESULTS / report_ranks.PREDICTED).read_text())
    calculated = report_ranks.predictions(counts=[ranks for ranks in report_ranks.RANKS if ranks <= 64])
    assert calculated.keys() == {key for key in stored if int(key.rpartition("; ")[2]) <= 64}
    for key, entry in calculated.items():
        for name, found in entry.items():
            expected = found if isinstance(found, str) else pytest.approx(found)
            assert stored[key][name] == expected, f"{key}: run benchmarks/report_ranks.py"
    assert report_ranks.PAGE.read_text() == report_ranks.page(stored), "run benchmarks/report_ranks.py"


def test_the_page_of_load_times_shows_what_is_measured(report_ranks, tmp_path):
    """It has no measured loads until there is a result, and then the ratio to what was predicted."""
    for name in ("ranks-machine.json", "h100-loading.json", "h100-host.json"):
        (tmp_path / name).write_text((report_ranks.RESULTS / name).read_text())
    stored = json.loads((report_ranks.RESULTS / report_ranks.PREDICTED).read_text())
    page = report_ranks.page(stored, tmp_path)
    assert "No load with a plan has been measured yet." in page
    assert "No layer has been measured yet." in page
    described = {"gpu": "a GPU", "python": "3", "versions": {}, "command": "python"}
    one = {"file bytes": 10**10, "gpus": 2, "blocks": False, "host MB": 5, "seconds": [0.5, 0.4, 0.6]}
    loads = [
        {**one, "way": way, "predicted": {"overlapped": 0.25, "exchanged last": 0.3}} for way in ("sharded", "together")
    ]
    (tmp_path / "ranks.json").write_text(json.dumps({**described, "machine": "two of them", "loads": loads}))
    layers = [{"gpus": gpus, "tokens": 1, "seconds": [2e-4 / gpus], "predicted": 5e-5, "error": 0} for gpus in (1, 2)]
    (tmp_path / "ranks-layer.json").write_text(json.dumps({**described, "layers": layers}))
    lines = report_ranks.page(stored, tmp_path).splitlines()
    assert "two of them. a GPU; Python 3, . `python`" in lines
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines if line.startswith("| 10.00 GB")}
    sharded, together = rows["| 10.00 GB, sharded, FP16"], rows["| 10.00 GB, together, FP16"]
    assert sharded[:7] == ["2", "250.0", "300.0", "500.0", "400.0 to 600.0", "0.50", "20.0"]
    assert together[6] == "40.0"
    assert "| 1 | 2 | 50 | 100 | 0.50 | 2.00 | 0.0e+00 |" in lines


def test_the_example_of_the_page_of_load_times(report_ranks, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", report_ranks.PAGE.read_text(), re.DOTALL)[1]
    tensors = {tensor.name: tensor for tensor in report_ranks.tensors_of(report_ranks.MEASURED_MODEL)}
    metadata = {"general.architecture": "llama", "llama.attention.key_length": 128}
    monkeypatch.setattr(nd, "open", lambda path: SimpleNamespace(tensors=tensors, metadata=metadata))
    exec(code, {})
    assert capsys.readouterr().out.endswith(" page cache\n")


@pytest.mark.long
def test_benchmarks_run_where_there_is_no_gpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert " passed" in found.stdout
