"""Write docs/ranks-cost.md and its charts: predicted load times of plans, beside the measured ones.

python benchmarks/report_ranks.py [benchmarks/results]

Rates come from results/ranks-machine.json, which says where each of them is from. The script calculates all predictions
and keeps them in results/ranks-predicted.json, from which it writes the page. Loads by several ranks come from
results/ranks.json, and layers from results/ranks-layer.json, if these exist. Both have the predictions that were made
before the measurement.
"""

import json
import statistics
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from math import prod
from pathlib import Path

import models
from tables import Results, described_line, table

import numba_dequant as nd
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.parallel import Machine, Part, Plan, RankPlan, llama_rules, plan, predict

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "ranks-cost.md"
PREDICTED = "ranks-predicted.json"
RANKS = (1, 2, 4, 8, 64, 256, 1024)
STAGES_OF, ELSEWHERE_OF = (1, 8, 64, 1024), (8, 64, 256)
# The first one is the file that test_loading.py measures.
MODELS = {
    "like Llama-3.1-8B, 56 layers": {"n_layers": 56},
    "like Llama-3.1-70B": {"n_layers": 80, "n_embd": 8192, "n_ff": 28_672, "n_q": 8192},
}
MEASURED_MODEL = next(iter(MODELS))
WAYS = ("sharded", "replicated")

PAGE_TEXT = """\
# Several GPUs and machines: predicted load times

`numba_dequant.parallel.predict` calculates the load time of [a plan](ranks.md) from the bytes that each rank moves and
from the rates of a machine. `benchmarks/report_ranks.py` writes this page.

- **Predicted**: the chart, the tables of *Times*, *Stages* and *Where the file is*, and the columns named so.
- **Measured**: the columns named so, on one, two and four GPUs of a host, and the rates that *The machine* calls
  measured.
- **Assumed**: the other rates of *The machine*: those of the network and of the disks, and the latency. Every
  prediction for a plan contains the latency. Predictions for more than one host also contain the rate of the network.

The bytes are not only calculated: tests compare them with those that `load_file` reads and sends for up to six ranks.

```python
import numba_dequant as nd
from numba_dequant.parallel import Machine, llama_rules, plan, predict

machine = Machine(page_cache=94e9, bus=52e9, nvlink=359e9, network=50e9, memory=3e12)  # bytes per second
model = nd.open("model.gguf")
found = predict(plan(model.tensors.values(), 16, llama_rules(model.metadata)), machine)
print(found.seconds, found.overlapped_seconds, found.bottleneck)
```

<picture>
  <source media="(prefers-color-scheme: dark)" srcset="../benchmarks/results/ranks-dark.svg">
  <img alt="predicted load time against ranks, for two models" src="../benchmarks/results/ranks-light.svg">
</picture>

- **Sharded**: by the rules of `llama_rules`. **Replicated**: each rank holds the whole model.
- **Overlapped**: all stages run at the same time, and the longest one decides. `nd.load` does this for one GPU.
- **Exchanged last**: reading and copying run at the same time. When all ranks have finished them, they exchange, and
  then dequantize.
- `load_file(plan=...)` reads and copies the next batches of tensors while a batch is exchanged and dequantized. Tensors
  that no rank exchanges are read last.
- **Bottleneck**: the link that bounds the longest stage of *overlapped*.
- 1 GB is 10^9 bytes. All values become FP16. The shapes are those of Llama. With 56 layers, the model is the file that
  [the benchmarks](../benchmarks/README.md#loading) load.

## Times

All times are predicted. A host has {size} GPUs and one network link. Each host has the file in its page cache.

{times}

On one host, each rank reads an equal piece of the file and receives all others. On several hosts, the ranks of a host
that hold columns read some rows each, and send each other their columns. In both cases, each byte is read once per
host. With hundreds of ranks, rows have fewer blocks than there are ranks. Many ranks then hold no columns of some
tensors, and do not read them.

## Stages

All times are predicted. *wait* is the latency of all collectives.

{stages}

## Where the file is

All times are predicted. If only one host has the file, its ranks read for all others. A rank reads the same bytes once,
and sends them to each rank that holds them.

{elsewhere}

## Predicted and measured

Files are in the page cache. In the first table, the measured times of the H200 follow from rates of the file, in GB/s,
which have no results file. The rate of the page cache comes from the row of the two processes, so the ratio of this row
says nothing about the model.

{beside}

{loads}

{layers}

## The machine

{rates}

## What the model leaves out

- **The plan.** Each rank makes the plan of all ranks, and a digest of it. This takes processor time that grows with the
  number of ranks and tensors: with 1024 ranks, it takes seconds, much longer than the sharded load that this page
  predicts.
- The bytes of what ranks tell each other: the name of the host and two digests each, and the plan, which one rank sends
  to all others if any of them lacks the file. The latency of these collectives is part of *wait*.
- The time of the first connection between two ranks.
- Opening the file, allocating memory, and launching kernels.
- Lower rates: of small pieces, and of links while other links are busy.
- Latencies that grow with the number of ranks. A collective is a ring in the order of the ranks.
"""


def rate(entry, folder):
    """Bytes per second of an entry, which has the number itself or says which result it is."""
    if "from" in entry:
        file, test, parameters = entry["from"]
        return 1e9 * Results(folder / file).one(test, **parameters)["GB/s"]
    return 1e9 * entry["GB/s"]


def machine_of(found, folder):
    """The machine with the file in the page cache, and the rate of its disk."""
    assumed = found["assumed"]
    rates = {name: rate(entry, folder) for name, entry in found["measured"].items()}
    others = {"gpus_per_host": assumed["gpus_per_host"]["GPUs"], "latency": assumed["latency"]["us"] / 1e6}
    network, disk = (rate(assumed[name], folder) for name in ("network", "disk"))
    return Machine(network=network, **rates, **others), disk


@cache
def tensors_of(model):
    found, offset = [], 0
    for name, kind, shape in models.tensors("Llama-3.1-8B", "Q4_K_M", **MODELS[model]):
        fmt = nd.FORMATS[kind]
        found.append(
            TensorInfo(name, fmt, shape, "model.gguf", offset, fmt.n_bytes(shape), prod(shape), "little", None)
        )
        offset += fmt.n_bytes(shape)
    return tuple(found)


def bytes_of(model):
    return sum(tensor.n_bytes for tensor in tensors_of(model))


def plan_of(model, way, ranks):
    metadata = {"general.architecture": "llama", "llama.attention.key_length": 128}
    return plan(tensors_of(model), ranks, llama_rules(metadata) if way == "sharded" else [])


def entry_of(found):
    """What the page shows of a prediction, in seconds and bytes; bytes are the most of a rank."""

    def most(*links):
        return max(sum(rank.moved[link] for link in links) for rank in found.ranks)

    return {
        "overlapped": found.overlapped_seconds,
        "exchanged last": found.seconds,
        "bottleneck": found.bottleneck,
        "stages": {stage.name: stage.seconds for stage in found.stages},
        "most bytes": {"file": most("file"), "bus": most("bus"), "other GPUs": most("NVLink in", "network in")},
    }


def predictions(folder=RESULTS, counts=RANKS):
    """All predictions of the page for these numbers of ranks: model, way, where the file is, ranks -> entry."""
    machine, disk = machine_of(json.loads((folder / "ranks-machine.json").read_text()), folder)
    places = {"page caches": (machine, "every host"), "disks": (replace(machine, disk=disk), "every host")}
    places["one host"] = machine, "one host"
    found = {}
    for model, way, ranks in product(MODELS, WAYS, counts):
        of_ranks = plan_of(model, way, ranks)
        for place, (on, files) in places.items():
            if place == "page caches" or (model == MEASURED_MODEL and ranks in ELSEWHERE_OF):
                found[key(model, way, place, ranks)] = entry_of(predict(of_ranks, on, files=files))
    return found


def key(model, way, place, ranks):
    return f"{model}; {way}; {place}; {ranks}"


def whole_reads(ranks, tensors=None):
    """A plan with which each rank loads a file of its own."""
    plans = []
    for rank in range(ranks):
        own = [tensor._replace(name=f"{rank}.{tensor.name}") for tensor in tensors or tensors_of(MEASURED_MODEL)]
        plans.append(RankPlan(rank, 0, {tensor.name: Part(tensor) for tensor in own}))
    return Plan(tuple(plans), ())


def ms(seconds):
    return f"{1e3 * seconds:,.1f}"


def times(found):
    """Every model, way and number of ranks, if all hosts have the file in their page cache."""
    head = ["model and way", "ranks", "overlapped, ms", "bottleneck", "exchanged last, ms"]
    head += ["most of a rank, GB: from the file", "over the bus", "from other GPUs"]
    rows = []
    for model, way, ranks in product(MODELS, WAYS, RANKS):
        one = found[key(model, way, "page caches", ranks)]
        row = [f"{model}, {bytes_of(model) / 1e9:.2f} GB, {way}", ranks, ms(one["overlapped"]), one["bottleneck"]]
        row += [ms(one["exchanged last"]), *(f"{n_bytes / 1e9:,.2f}" for n_bytes in one["most bytes"].values())]
        rows.append(row)
    return table(head, rows)


def stages(found):
    """The seconds of each stage for some numbers of ranks."""
    of_rows = {
        (way, ranks): found[key(MEASURED_MODEL, way, "page caches", ranks)]["stages"]
        for way, ranks in product(WAYS, STAGES_OF)
    }
    names = list(next(iter(of_rows.values())))
    rows = [[*row, *map(ms, of_row.values())] for row, of_row in of_rows.items()]
    return table([f"{MEASURED_MODEL}, ms", "ranks", *names], rows)


def elsewhere(found):
    """The file on disks, and on one host alone."""
    rows = []
    for way, ranks in product(WAYS, ELSEWHERE_OF):
        row = [way, ranks]
        for place in ("page caches", "disks", "one host"):
            one = found[key(MEASURED_MODEL, way, place, ranks)]
            row += [ms(one["overlapped"]), one["bottleneck"]]
        rows.append(row)
    head = [f"{MEASURED_MODEL}, overlapped, ms", "ranks", "page caches", "bottleneck", "disks", "bottleneck"]
    return table([*head, "page cache of one host", "bottleneck"], rows)


def rates(found, folder):
    """Each rate, and where it is from."""
    rows = []
    for kind in ("measured", "assumed"):
        for name, entry in found[kind].items():
            other = next((f"{entry[unit]} {unit}" for unit in ("us", "GPUs") if unit in entry), None)
            where = f"`results/{entry['from'][0]}`" if "from" in entry else "no results file"
            is_from = f"{kind}, {where}" if kind == "measured" else kind
            rows.append([f"`{name}`", other or f"{rate(entry, folder) / 1e9:,.1f} GB/s", is_from, entry["source"]])
    return table(["of `Machine`", "rate", "measured or assumed", "source"], rows)


def measured(folder, name):
    """The results of a script, if it was run."""
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None


def beside(rates, folder):
    """The predictions of `nd.load` beside what was measured."""
    machine, _ = machine_of(rates, folder)
    rows, n_bytes = [], bytes_of(MEASURED_MODEL)
    for load in rates["loads"]:
        seconds = n_bytes / rate(load, folder)
        # `nd.load` has no collectives.
        prediction = predict(whole_reads(load["ranks"]), replace(machine, latency=0)).overlapped_seconds
        rows.append([load["title"], ms(prediction), ms(seconds), f"{prediction / seconds:.2f}"])
    head = [f"load of {n_bytes / 1e9:.2f} GB", "predicted, overlapped, ms", "measured, ms", "predicted / measured"]
    return table(head, rows)


def loads(rates, folder):
    """Loads by plans on several GPUs, beside the predictions that were made before."""
    results = measured(folder, "ranks.json")
    if results is None:
        return "No load with a plan has been measured yet."
    known, rows = machine_of(rates, folder)[0].bus, []
    measured_roofs = results.get("bytes per second", {})
    for one in results["loads"]:
        median, n_bytes = statistics.median(one["seconds"]), one["file bytes"]
        way = f"{one['way']}, {'blocks' if one['blocks'] else 'FP16'}"
        least, most = ms(min(one["seconds"])), ms(max(one["seconds"]))
        # The file crosses the buses once, or to each GPU if all read it whole.
        copied = n_bytes * (one["gpus"] if one["way"] == "together" else 1)
        used = 1 if one["way"] == "alone" else one["gpus"]
        predicted = one["predicted"]
        bus = (measured_roofs.get(str(one["gpus"])) or {"bus, alone": known})["bus, alone"]
        rows.append([
            f"{n_bytes / 1e9:.2f} GB, {way}", one["gpus"], ms(predicted["overlapped"]), ms(predicted["exchanged last"]),
            ms(median), f"{least} to {most}", f"{predicted['overlapped'] / median:.2f}", f"{copied / median / 1e9:.1f}",
            f"{copied / median / (used * bus):.0%}", f"{one['host MB']:,.0f}",
        ])  # fmt: skip
    head = ["load", "GPUs", "predicted: overlapped, ms", "exchanged last, ms", "measured: median, ms", "range, ms"]
    head += ["overlapped / measured", "GB/s of the file", "share of the buses", "host memory, MB"]
    notes = (
        "*Alone*: one process reads the whole file, with `nd.load`. *Together*: each process does, at the same time. "
        "*Apart*: each process loads every n-th tensor with `nd.load`, without a plan and without an exchange. "
        "The share is that of the sum of the rates of the buses of the GPUs that load. The host memory is what the "
        "first load of that kind adds to its process at its peak; the first loads of a process also import modules and "
        "allocate buffers."
    )
    parts = [table(head, rows), notes, *roofs(results), f"{results['machine']}. {described_line(results)}"]
    return "\n\n".join(parts)


def roofs(results):
    """What the buses and the page cache gave in the same run, if that was measured."""
    found = {int(gpus): rates for gpus, rates in results.get("bytes per second", {}).items() if rates}
    if not found:
        return []
    ways = list(next(iter(found.values())))
    rows = [[gpus, *(f"{rates[way] / 1e9:.1f}" for way in ways)] for gpus, rates in found.items()]
    n_bytes = results.get("bytes of a copy", 1 << 20)  # so much before it was written down
    text = (
        f"Roofs of the same run, in GB/s of all processes: copies of {n_bytes >> 20} MiB of pinned memory to the GPUs, "
        "and copies of different parts of the file from the page cache to pinned memory by the threads of each process."
        " Loads copy 8 MiB at a time, which is faster than smaller copies."
    )
    return [text, table(["GPUs", *ways], rows)]


def layers(folder):
    """The matrices of a layer on several GPUs, beside the predictions that were made before."""
    results = measured(folder, "ranks-layer.json")
    if results is None:
        return "No layer has been measured yet."
    rows = []
    for one in results["layers"]:
        median = statistics.median(one["seconds"])
        alone = next(each for each in results["layers"] if (each["gpus"], each["tokens"]) == (1, one["tokens"]))
        rows.append([
            one["tokens"], one["gpus"], f"{1e6 * one['predicted']:.0f}", f"{1e6 * median:.0f}",
            f"{one['predicted'] / median:.2f}", f"{statistics.median(alone['seconds']) / median:.2f}",
            f"{one['error']:.1e}",
        ])  # fmt: skip
    head = ["tokens", "GPUs", "predicted, us", "measured, us", "predicted / measured", "times one GPU", "difference"]
    notes = (
        "These are the seven matrices of a layer of Llama-3.1-70B, divided by `QuantizedColwiseParallel` and "
        "`QuantizedRowwiseParallel`, in a CUDA graph. The prediction counts only the bytes of the blocks and those of "
        "two all-reduces, not the arithmetic. The difference is the relative one from the results of one GPU."
    )
    return "\n\n".join([notes, table(head, rows), described_line(results)])


def page(found, folder=RESULTS):
    """The text of the page, with these predictions."""
    of_machine = json.loads((folder / "ranks-machine.json").read_text())
    return PAGE_TEXT.format(
        size=machine_of(of_machine, folder)[0].gpus_per_host,
        times=times(found),
        stages=stages(found),
        elsewhere=elsewhere(found),
        beside=beside(of_machine, folder),
        loads=loads(of_machine, folder),
        layers=layers(folder),
        rates=rates(of_machine, folder),
    )


def series(found):
    """The lines of the chart: model -> way -> (overlapped, exchanged last), seconds for each number of ranks."""

    def line(model, way, how):
        return tuple(found[key(model, way, "page caches", ranks)][how] for ranks in RANKS)

    return {
        f"{model}, {bytes_of(model) / 1e9:.3g} GB": {
            way: (line(model, way, "overlapped"), line(model, way, "exchanged last")) for way in WAYS
        }
        for model in MODELS
    }


def main():
    import chart

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    found = predictions(folder)
    (folder / PREDICTED).write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found, folder))
    for theme in ("light", "dark"):
        chart.ranks(RANKS, series(found), theme, folder / f"ranks-{theme}.svg")


if __name__ == "__main__":
    main()
