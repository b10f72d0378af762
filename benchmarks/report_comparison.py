"""The parts of README that compare this package with other programs; report.py calls them.

Speeds and errors are those of the results. What is not a figure was read in the sources of the versions below.
"""

import json
import statistics
import textwrap
from pathlib import Path

from tables import Results, table

import numba_dequant as nd

FOLDER = Path(__file__).parent / "results"
PROGRAMS = {
    "numba_dequant": nd.__version__,
    "gguf-py": "0.19.0",
    "llama.cpp": "d99724f2",
    "ComfyUI-GGUF": "795e451",
    "transformers": "5.24.0",
    "libgguf": "0.2.2",
}
"""The programs, and the version or the commit that was measured or read."""

FORMAT, SHAPE = "Q4_K", "14336x4096"
"""What the speeds and errors are of."""


def _result(name):
    return json.loads((FOLDER / name).read_text())


def _times_llama_cpp(results):
    """How many times as fast as llama.cpp each format is, to FP16."""
    peers = _result("peers.json")["GB/s"]
    found = {}
    for name in results.formats:
        theirs = peers.get(name, {}).get("llama.cpp", {}).get("float16")
        if theirs:
            found[name] = results.one("test_kernel", name=name, dtype="float16", mapping="tile")["GB/s"] / theirs
    return found


def headline(results):
    """What the chart shows, in a sentence."""
    shares = [info["share"] for _, info in results.of("test_kernel", mapping="tile")]
    times = _times_llama_cpp(results)
    least, most = min(times, key=times.get), max(times, key=times.get)
    text = (
        f"The chart is of one {results.machine['gpu']}, to FP16. All {len(results.formats)} formats run at "
        f"{min(shares):.0%} to {max(shares):.0%} of the memory roofline, to FP16, BF16 and FP32. To FP16, this is "
        f"{times[least]:.1f} ({least}) to {times[most]:.1f} ({most}) times the speed of the CUDA kernels of llama.cpp, "
        f"{statistics.median(times.values()):.1f} times in the median."
    )
    return textwrap.fill(text, 120)


def _formats(torch):
    """Quantized formats that each program dequantizes on a GPU."""
    peers = _result("peers.json")["GB/s"]
    counts = {system: sum(system in found for found in peers.values()) for system in ("llama.cpp", "ComfyUI-GGUF")}
    theirs = {parameters["name"] for parameters, _ in torch.of("test_transformers")}
    ours = sum(each.block_size > 1 for each in nd.FORMATS.values())
    comfyui = f"{counts['ComfyUI-GGUF']}; others on the CPU"
    return [ours, "none; 23 on the CPU", counts["llama.cpp"], comfyui, len(theirs), "24, it says"]


def _speeds(results, torch):
    peers = _result("peers.json")["GB/s"][FORMAT]
    ours = results.one("test_kernel", name=FORMAT, dtype="float16", mapping="tile")["GB/s"]
    transformers = torch.one("test_transformers", name=FORMAT, n_elements=2**28)["GB/s"]
    llama_cpp, eager, compiled = (
        f"{peers[name]['float16']:,.0f}" for name in ("llama.cpp", "ComfyUI-GGUF", "ComfyUI-GGUF, compiled")
    )
    return [f"{ours:,.0f}", "", llama_cpp, f"{eager}; compiled {compiled}", f"{transformers:,.0f}", ""]


def _inexact(torch):
    """The share of FP16 values that are not those of the FP32 values, rounded once."""
    exact, comfyui = (_result("accuracy.json")["errors"][FORMAT][way][1] for way in ("FP16, exact", "FP16 by FP16"))
    compiled, transformers = (
        torch.one(test, name=FORMAT, n_elements=2**28, **way)["not exactly rounded"]
        for test, way in (("test_arithmetic_of_programs", {"way": "compiled"}), ("test_transformers", {}))
    )
    return [f"{exact:.0%}", "0%", "", f"{comfyui:.0%}; compiled {compiled:.0%}", f"{transformers:.0%}", "0%, it says"]


def _on_the_cpu():
    results = Results(FOLDER / "h100-host.json")
    ours, theirs = (results.one(test, name=FORMAT) for test in ("test_cpu", "test_gguf_py"))
    cells = [f"{each['GB/s']:.3g}, {each['threads']} threads" for each in (ours, theirs)]
    return [cells[0], cells[1].replace("1 threads", "1 thread"), *[""] * 4]


def _products():
    rows, elements = map(int, SHAPE.split("x"))
    wanted = {"name": FORMAT, "n_rows": rows, "n_elements": elements, "n_columns": 1}
    found = Results(FOLDER / "h100-products.json")
    ours, apart = (found.one("test_product", **wanted, overlaps=overlaps) for overlaps in (True, False))
    us, error = _result("products-peers.json")["us and error, by format, shape and columns"][FORMAT][SHAPE]["1"]
    cell = f"{1e6 * ours['seconds']:.1f} us ({1e6 * apart['seconds']:.1f} apart), error {ours['error']:.0e}"
    return [cell, "no", f"{us:.1f} us, error {error:.0e}", "no", "yes, not measured", ""]


def comparison(results):
    """This package and the others, a row for each question."""
    torch = Results(FOLDER / "h100-torch.json")
    install = ["pip", "pip", "CMake and nvcc, or a binary", "a custom node", "pip; kernels from the Hub"]
    rows = [
        ["formats on a GPU", *_formats(torch)],
        [f"{FORMAT} to FP16, H100, GB/s", *_speeds(results, torch)],
        [f"{FORMAT} to FP16, CPU, GB/s", *_on_the_cpu()],
        ["FP16 values that are inexact", *_inexact(torch)],
        [f"product {SHAPE}, one column", *_products()],
        ["install", *install, "pip; GPU: CMake and nvcc"],
        ["several GPUs", "yes", "no", "yes", "", "", ""],
    ]
    return table(["", *(f"{name} {version}" for name, version in PROGRAMS.items())], rows)
