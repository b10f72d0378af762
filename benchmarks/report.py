"""Write published figures from the results of the benchmarks.

python benchmarks/report.py [benchmarks/results]

It fills the marked parts of README.md, docs/performance.md, benchmarks/README.md and docs/programs.md, and draws the
charts. Formats come from the registry, figures of other systems from results/peers.json, errors from
results/accuracy.json. report_products.py and report_ranks.py write the other pages with figures.
"""

import json
import re
import statistics
import sys
from pathlib import Path

from report_comparison import comparison, headline
from report_torch import operators, stacks, transformers
from tables import Results, factor, machine_line, spread, spread_note, table

import numba_dequant as nd

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DTYPES = ("float16", "bfloat16", "float32")
"""The output types of the tables."""
RUNS = {
    "models": "h100-many.json",
    "start": "h100-start.json",
    "compiling": "h100-host.json",
    "cpu": "h100-host.json",
    "loading": "h100-loading.json",
    "steps": "h100-steps.json",
    "operators": "h100-torch.json",
    "stacks": "h100-torch.json",
}
"""Result files of parts that are measured in a separate run."""
IN_SHORT = ("Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "MXFP4", "NVFP4", "TQ2_0")
"""The formats of README's chart: those of most files, one of each other kind, and the closest peer."""
PEERS = json.loads((HERE / "results" / "peers.json").read_text())
ACCURACY = RESULTS / "accuracy.json"
"""What accuracy.py has measured."""
PROGRAMS = HERE.parent / "docs" / "programs.md"
PERFORMANCE = HERE.parent / "docs" / "performance.md"


def formats(results):
    head = ["format", "id", "elements per block", "bytes per block", "bits per weight", "a block is"]
    rows = [
        [each.name, each.ggml_id, each.block_size, each.type_size, f"{each.bits_per_weight:.4g}", each.summary]
        for each in nd.FORMATS.values()
        if each.block_size > 1
    ]
    return table(head, rows).replace("--: |\n", "--- |\n", 1)


def machine(results):
    return machine_line(results, f"device copy {results.one('test_device_copy')['GB/s']:.0f} GB/s")


def loading(results):
    head = ["file", "way", "ms, median", "quartiles", "spread", "of the file, GB/s", "share of the bus"]
    head += ["of FP16, GB/s", "times safetensors"]
    rows = []
    found = results.of("test_load_gpu")
    for parameters, info in found:
        name, mix, way = parameters["name"], parameters["mix"], parameters["way"]
        theirs = results.one("test_load_gpu", name=name, way="safetensors")
        file = f"FP16, {info['values'] / 1e9:.3g} GB" if way == "safetensors" else f"{info['file_bytes'] / 1e9:.3g} GB"
        quartiles = info["quartiles"] and " to ".join(f"{1e3 * seconds:,.1f}" for seconds in info["quartiles"])
        numbers = [f"{1e3 * info['seconds']:,.1f}", quartiles, spread(info)]
        numbers += [f"{info['GB/s']:.3g}", f"{info['share']:.1%}"]
        numbers += [f"{info['values'] / info['seconds'] / 1e9:.3g}", factor(theirs["seconds"] / info["seconds"])]
        rows.append([f"like {name} {mix}, {file}", way, *numbers])
    opened, theirs = (results.one("test_open", way=way)["seconds"] for way in ("ours", "gguf-py"))
    split = results.one("test_open_split")["seconds"]
    cold = results.one("test_cold")
    bus = statistics.median(info["roof GB/s"] for _, info in found)
    peaks = [info for _, info in results.of("test_memory")]
    host = " and ".join(f"{info['host MiB']:.0f} MiB for a file of {info['bytes'] / 1e9:.3g} GB" for info in peaks)
    notes = f"""\
* {spread_note([info for _, info in found])}
* Opening a file with 262 144 tokens takes {1e3 * opened:.1f} ms, and gguf-py {theirs:.1f} s: {factor(theirs / opened)}
  times as long. Opening a model in 200 files takes {1e3 * split:.0f} ms.
* A file that is not in the page cache is loaded at {cold["GB/s"]:.2f} GB/s: {cold["share"]:.1%} of what
  `dd` reads, in turn with it; the spread is {spread(cold)}.
* Peak of host memory: {host}; of the GPU's, beyond what is loaded: {max(info["GPU MiB"] for info in peaks):.0f} MiB."""
    return "\n\n".join([table(head, rows), notes, machine_line(results, f"copy from pinned memory {bus:.1f} GB/s")])


def speed(results):
    head = ["format", "GB/s to FP16", "share of the roofline: FP16", "BF16", "FP32"]
    head += ["times llama.cpp: FP16", "BF16", "FP32", "PyTorch, GB/s", "one block, GB/s"]
    rows = []
    for name in results.formats:
        tiles = [results.one("test_kernel", name=name, dtype=dtype, mapping="tile") for dtype in DTYPES]
        theirs = PEERS["GB/s"].get(name, {}).get("llama.cpp", {})
        eager = results.one("test_eager_pytorch", name=name)
        block = results.one("test_kernel", name=name, dtype="float16", mapping="block")
        rows.append(
            [
                name,
                f"{tiles[0]['GB/s']:.0f}",
                *(f"{tile['share']:.1%}" for tile in tiles),
                *(
                    f"{tile['GB/s'] / theirs[dtype]:.1f}" if dtype in theirs else None
                    for dtype, tile in zip(DTYPES, tiles, strict=True)
                ),
                eager and f"{eager['GB/s']:.0f}",
                f"{block['GB/s']:.0f}",
            ]
        )
    return "\n\n".join([table(head, rows), spread_note(info for _, info in results.of("test_kernel"))])


def kernels(results):
    head = ["format"] + [f"{dtype}, {what}" for dtype in DTYPES for what in ("GB/s", "roofline", "one block")]
    rows = []
    for name in results.formats:
        row = [name]
        for dtype in DTYPES:
            tile, block = (
                results.one("test_kernel", name=name, dtype=dtype, mapping=mapping) for mapping in ("tile", "block")
            )
            row += [f"{tile['GB/s']:.0f}", f"{tile['roof GB/s']:.0f}", f"{block['GB/s']:.0f}"]
        rows.append(row)
    return "\n\n".join([table(head, rows), spread_note(info for _, info in results.of("test_kernel"))])


def steps(results):
    found = results.of("test_step")
    rows = [[parameters["step"], f"{info['GB/s']:.0f}", f"{info['share']:.1%}"] for parameters, info in found]
    roofline = f"roofline {found[0][1]['roof GB/s']:.0f} GB/s"
    note = spread_note(info for _, info in found)
    return "\n\n".join(
        [table(["Q8_0 to FP16", "GB/s", "share of the roofline"], rows), note, machine_line(results, roofline)]
    )


def models(results):
    head = ["model, compressed on the GPU, to FP16", "way", "GPU or host", "us", "spread"]
    head += ["us per tensor", "times the roofline"]
    rows, infos = [], []
    for test in ("test_gpu", "test_host"):
        for parameters, info in results.of(test):
            way = {"together": "dequantize_many", "one by one": "dequantize, each"}.get(
                parameters.get("way"), "Batch.run"
            )
            clock = "GPU" if test == "test_gpu" else "host"
            seconds = info["seconds"]
            numbers = [f"{info['us per tensor']:.3g}", factor(1 / info["share"])]
            rows.append([parameters["model"], f"`{way}`", clock, f"{1e6 * seconds:.0f}", spread(info), *numbers])
            infos.append(info)
    return "\n\n".join([table(head, sorted(rows, key=lambda row: row[0], reverse=True)), spread_note(infos)])


def sizes(results):
    head = ["elements"]
    columns = {}
    for name in ("Q4_K", "Q8_0"):
        head += [f"{name}, us", "ps per element", "GB/s", "roofline of that size"]
        columns[name] = {parameters["n_elements"]: info for parameters, info in results.of("test_size", name=name)}
    rows = []
    for n_elements in columns["Q4_K"]:
        row = [f"{n_elements:,}" if n_elements > 1 else "one block"]
        for found in columns.values():
            info = found[n_elements]
            roofline = f"{info['roof GB/s']:.0f}" if "roof GB/s" in info else None
            numbers = [f"{1e6 * info['seconds']:.1f}", f"{info['ps per element']:.3g}", f"{info['GB/s']:.0f}", roofline]
            row += numbers
        rows.append(row)
    return "\n\n".join([table(head, rows), spread_note(info for _, info in results.of("test_size"))])


def small(results):
    """What takes a short time: before it was made shorter, and now."""
    before, load, started = (Results(RESULTS / f"h100-{name}.json") for name in ("before", "small", "start"))
    model, way = {"model": "like Gemma-3-270M Q4_K_M", "way": "together"}, {"name": "Gemma-3-270M", "way": "ours"}
    many, loaded = Results(RESULTS / "h100-many.json").one("test_host", **model), load.one("test_load_gpu", **way)
    old_many, old_load = before.one("test_host", **model), before.one("test_load_gpu", **way)
    first = started.one("test_first_value")

    def row(what, old, new, least):
        quartiles = " to ".join(f"{1e3 * seconds:.3g}" for seconds in new["quartiles"])
        return [what, old and f"{1e3 * old['seconds']:.3g}", f"{1e3 * new['seconds']:.3g}", quartiles, least]

    rows = [
        row(
            f"`dequantize_many` of {many['tensors']} tensors of a model like Gemma 3 270M",
            old_many,
            many,
            f"{1e3 * many['seconds'] * many['share']:.3g}, at the roofline",
        ),
        row(
            f"`load` of such a file, {loaded['bytes'] / 1e9:.3g} GB, in a process that has loaded one before",
            old_load,
            loaded,
            f"{1e3 * loaded['seconds'] * loaded['share']:.3g}, at the speed of the bus",
        ),
        row("a new process, until it has printed the first value of 1 MiB of Q4_K", None, first, None),
    ]
    head = ["what", "before, ms", "now, ms", "quartiles", "at least"]
    return f"{table(head, rows)}\n\n{spread_note([many, loaded, first])}\n\n{machine_line(load)}"


def start(results):
    warm = results.one("test_warm_start")
    parts = [[part, f"{warm[part]:.1f}"] for part in warm if part not in ("seconds", "quartiles", "spread", "runs")]
    whole = ["the whole process, with Python's own start and end", f"{1e3 * warm['seconds']:.0f}"]
    return "\n\n".join([table(["a new process, kernels in the cache", "ms"], [*parts, whole]), spread_note([warm])])


def compiling(results):
    found = results.of("test_compile")
    seconds = [info["seconds"] for _, info in found]
    everything = results.one("test_compile_all")
    rows = [[parameters["name"], f"{1e3 * info['seconds']:.0f}"] for parameters, info in found]
    rows.append([f"median of these {len(rows)}", f"{1e3 * statistics.median(seconds):.0f}"])
    rows.append([f"sum of these {len(found)}, one after the other", f"{1e3 * sum(seconds):.0f}"])
    new = f"a new process: {everything['kernels']} kernels (every format, for one tensor and for many), on all cores"
    rows.append([new, f"{1e3 * everything['seconds']:.0f}"])
    return table(["kernel to FP16, nothing kept", "ms"], rows)


def launches(results):
    names = {
        "kernel": "the launch alone: `cuda.dequantize_into`",
        "dequantize out": "`nd.dequantize(tensor, 'Q4_K', out=out)`",
        "dequantize": "`nd.dequantize(tensor, 'Q4_K')`, with memory for the result",
        "dequantize pytorch out": "the same with `out=`, of PyTorch tensors",
        "dequantize pytorch": "the same, of a PyTorch tensor",
        "numba": "the plain Numba way: `kernels.jit('Q4_K')[...](...)`",
    }
    found = results.of("test_launch")
    rows = [[names[each["way"]], f"{1e6 * info['seconds']:.1f}", spread(info)] for each, info in found]
    note = spread_note(info for _, info in found)
    return "\n\n".join([table(["one call, nothing awaited", "us", "spread"], rows), note])


def cpu(results):
    rows = []
    for parameters, ours in results.of("test_cpu"):
        theirs = results.one("test_gguf_py", **parameters)
        row = [parameters["name"], f"{ours['GB/s']:.1f}", spread(ours)]
        row += (
            [f"{theirs['GB/s']:.2f}", spread(theirs), f"{ours['GB/s'] / theirs['GB/s']:.0f}"] if theirs else [None] * 3
        )
        rows.append(row)
    found = [info for test in ("test_cpu", "test_gguf_py") for _, info in results.of(test)]
    head = ["format", f"GB/s, {found[0]['threads']} threads", "spread", "gguf-py, GB/s", "spread", "ratio"]
    return "\n\n".join([table(head, rows), spread_note(found)])


def peers(results):
    lines = [f"* {name}: {what}." for name, what in PEERS["systems"].items()]
    columns = [("llama.cpp", dtype) for dtype in DTYPES]
    columns += [("ComfyUI-GGUF", "float16"), ("ComfyUI-GGUF, compiled", "float16")]
    rows = []
    for name, found in PEERS["GB/s"].items():
        speeds = [found.get(system, {}).get(dtype) for system, dtype in columns]
        rows.append([name, *(speed and f"{speed:.0f}" for speed in speeds)])
    figures = table(["format", *(f"{system}, {dtype}" for system, dtype in columns)], rows)
    return f"On one {PEERS['machine']}; {PEERS['unit']}.\n\n" + "\n".join(lines) + f"\n\n{figures}"


def accuracy(results):
    return accuracy_table(json.loads(ACCURACY.read_text()))


def accuracy_table(found):
    head, rows = ["format"], []
    for way in next(iter(found["errors"].values())):
        head += [f"{way}: error"] if way.endswith(", exact") else [f"{way}: error", "differ"]
    for name, errors in found["errors"].items():
        row = [name]
        for way, (error, share) in errors.items():
            row.append(f"{error:.1e}")
            if not way.endswith(", exact"):
                row.append(f"{share:.0%}")
            elif share:
                raise ValueError(f"{name}, {way}: not rounded correctly")
        rows.append(row)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{table(head, rows)}\n\n{versions}. `{found['command']}`"


PARTS = {
    HERE.parent / "README.md": (headline, comparison),
    PERFORMANCE: (formats, machine, speed, models, small),
    HERE / "README.md": (
        machine,
        kernels,
        steps,
        sizes,
        models,
        loading,
        start,
        compiling,
        launches,
        cpu,
        peers,
        operators,
        stacks,
        transformers,
    ),
    PROGRAMS: (accuracy,),
}


def of_part(folder, name):
    """The results for a part of a page."""
    return Results(folder / RUNS.get(name, "h100.json"))


def filled(path, folder):
    """The text of a page with its marked parts updated."""
    text = path.read_text()
    for part in PARTS[path]:
        name = part.__name__
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        content = f"\n{part(of_part(folder, name))}\n\n"
        text, count = re.subn(
            pattern, lambda match, content=content: match[1] + content + match[2], text, flags=re.DOTALL
        )
        assert count == 1, f"{path}: {count} parts {name}"
    return text


def main():
    import chart

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    for path in PARTS:
        path.write_text(filled(path, folder))
    for theme in ("light", "dark"):
        results = of_part(folder, "speed")
        chart.speed(results, PEERS, theme, folder / f"throughput-{theme}.svg")
        chart.speed(results, PEERS, theme, folder / f"throughput-short-{theme}.svg", IN_SHORT)
        chart.loading(of_part(folder, "loading"), theme, folder / f"loading-{theme}.svg")


if __name__ == "__main__":
    main()
