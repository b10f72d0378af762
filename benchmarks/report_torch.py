"""The parts of the published pages that are about PyTorch; report.py calls them."""

import json
import statistics
from pathlib import Path

from tables import Results, machine_line, spread, spread_note, table


def _us(info):
    return info and f"{1e6 * info['seconds']:,.1f}"


def operators(results: Results) -> str:
    """Every format: the operator beside the bare kernel and the arithmetic of programs."""
    head = ["format", "elements", "us", "of the bare kernel", "share of the roofline"]
    head += ["eager, us", "times ours", "bytes per value", "not exactly rounded", "compiled, us", "times ours"]
    head += ["transformers, us", "times ours", "bytes per value", "not exactly rounded"]
    rows = []
    found = results.of("test_operator")
    for parameters, info in found:
        row = [parameters["name"], f"2^{parameters['n_elements'].bit_length() - 1}", _us(info)]
        row += [f"{info['seconds'] / info['kernel s']:.3f}", f"{info['share']:.1%}"]
        eager, compiled = (
            results.one("test_arithmetic_of_programs", way=way, **parameters) for way in ("eager", "compiled")
        )
        if eager:
            row += [_us(eager), f"{eager['seconds'] / info['seconds']:.1f}", f"{eager['peak bytes per value']:.1f}"]
            row += [f"{eager['not exactly rounded']:.0%}"]
            row += [_us(compiled), f"{compiled['seconds'] / info['seconds']:.1f}"]
        else:
            row += [None] * 6
        theirs = results.one("test_transformers", **parameters)
        if theirs:
            row += [_us(theirs), f"{theirs['seconds'] / info['seconds']:.1f}", f"{theirs['peak bytes per value']:.1f}"]
            row += [f"{theirs['not exactly rounded']:.0%}"]
        else:
            row += [None] * 4
        rows.append(row)
    extra = max(info["extra bytes"] for _, info in found)
    ratios = [info["seconds"] / info["kernel s"] for _, info in found]
    note = (
        f"The operator takes {min(ratios):.3f} to {max(ratios):.3f} of the bare kernel's time "
        f"(median {statistics.median(ratios):.3f}), and {extra} bytes of memory beside the result."
    )
    # Older results are of several cores of a machine.
    calls = [
        [f"`{each['name']}`", each.get("core", ""), _us(info), spread(info)]
        for each, info in results.of("test_host_time")
    ]
    host = table(["one call, nothing awaited", "core", "host time, us", "spread"], sorted(calls))
    measured = ("test_operator", "test_arithmetic_of_programs", "test_transformers")
    spreads = spread_note([info for test in measured for _, info in results.of(test)])
    return "\n\n".join([table(head, rows), note, spreads, host, machine_line(results)])


def stacks(results: Results) -> str:
    """Forwards of a diffusion transformer's layers, and decoding."""
    head = ["format", "way", "ms per forward", "spread", "error against float64", "MB beside the weights"]
    rows = [
        [
            each["name"],
            each["way"],
            f"{1e3 * info['seconds']:.2f}",
            spread(info),
            f"{info['error']:.2e}",
            f"{info['peak bytes'] / 1e6:.0f}",
        ]
        for each, info in results.of("test_diffusion_stack")
    ]
    decoded = [
        [
            each["name"],
            each["way"],
            f"{info['tokens per second']:.0f}",
            spread(info),
            f"{info['difference of logits']:.1e}",
            f"{info['bytes of weights'] / 1e6:.0f}",
        ]
        for each, info in results.of("test_decoding")
    ]
    head_of_decoded = ["format", "way", "tokens per second", "spread", "difference of logits", "MB of weights"]
    notes = [spread_note(info for _, info in results.of(test)) for test in ("test_diffusion_stack", "test_decoding")]
    return "\n\n".join([table(head, rows), notes[0], table(head_of_decoded, decoded), notes[1]])


LOADS = Path(__file__).parent / "results" / "transformers-load.json"
"""What transformers_load.py has measured."""


def transformers(results: Results) -> str:
    """Loading by transformers, alone and accelerated."""
    found = json.loads(LOADS.read_text())
    rows = []
    for title, readings in zip(("transformers", "accelerated"), zip(*found["readings"], strict=True), strict=True):
        seconds = [each["seconds"] for each in readings]
        memory = [f"{max(each[name] for each in readings):.0f}" for name in ("MiB", "MiB before")]
        figures = (min(seconds), statistics.median(seconds), max(seconds))
        rows.append([title, *(f"{figure:.2f}" for figure in figures), *memory])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    note = (
        f"{found['weights'] / 1e6:.0f} million weights, {found['tokens']:,} tokens, {found['bytes'] / 2**20:.0f} MiB; "
        f"{len(found['readings'])} loads of each kind, in turn. {found['cores']} cores, {found['processor']}; "
        f"the load of the system was {found['load']:.1f}. Python {found['python']}, {versions}. "
        "`python benchmarks/transformers_load.py`"
    )
    head = ["", "least, s", "median, s", "most, s", "peak, MiB", "of which before the load, MiB"]
    return "\n\n".join([table(head, rows), note])
