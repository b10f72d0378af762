"""Write docs/products.md from the results of the benchmarks of products.

python -m pytest benchmarks/test_products.py --benchmark-enable --benchmark-json=benchmarks/results/h100-products.json
python benchmarks/accuracy_products.py
python benchmarks/llama_like.py && python benchmarks/llama_like.py --compile
python benchmarks/moe_products.py
python benchmarks/report_products.py [benchmarks/results]

Parts without results are left out. Figures of llama.cpp come from results/products-peers.json.
"""

import json
import sys
from pathlib import Path

from tables import Results, described_line, machine_line, spread_note, table

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "products.md"
PEERS = json.loads((RESULTS / "products-peers.json").read_text())
THEIRS = PEERS["us and error, by format, shape and columns"]

INTRODUCTION = f"""\
# Products with compressed weights: measurements

This page has the times and errors of products of a weight that stays compressed and some columns of activations.
`benchmarks/report_products.py` writes the page. Its docstring has the commands.

- **Floor**: the time of a kernel that only reads the bytes of the weight, 16 per access. It was measured in the same
  run, with several numbers of thread blocks; the shortest time counts. Each launch begins when the preceding one has
  ended.
- **Ours**: the time of our kernel in a series of launches, each of which may read weights before the preceding one has
  ended. `linear` does this with `weight_is_constant=True`, and `QuantizedLinear` always.
- **Apart**: the time of our kernel if each launch reads weights only after the preceding one has ended.
- **cuBLAS**: the time of the product with a float16 weight, in the same run.
- **llama.cpp**: {PEERS["system"]}, on another {PEERS["machine"]}: {PEERS["how"]}.
- The launches use several copies of the weight in turn, more than 400 MB together, so that no cache holds them. The
  columns are float16. A shape is the number of rows of the weight, and the number of elements of a row.

[products-limits.md](products-limits.md) says what limits the products that are far from the floor.
"""

SPREAD_OF_ALL = "The spread is the distance between the shortest and the longest reading, as a share of the median."


def us(seconds):
    return seconds and f"{1e6 * seconds:,.1f}"


def percent(share):
    return f"{share:.1%}"


def times(theirs, ours):
    return theirs and f"{theirs / ours:.2f}"


def theirs_us(name, shape, n_columns):
    """Seconds and the error of llama.cpp, or None twice."""
    found = THEIRS.get(name, {}).get(shape, {}).get(str(n_columns))
    return (found[0] / 1e6, found[1]) if found else (None, None)


def late_note(infos):
    late = sum(info["late"] > 0 for info in infos)
    return (
        f"{late} of {len(infos)} measurements have readings in which the GPU may have waited for launches."
        if late
        else None
    )


def few(results, n_columns):
    """Products with 1 or 8 columns."""
    head = ["format", "shape", "floor, us", "ours, us", "floor / ours", "apart, us", "floor / apart"]
    head += ["llama.cpp, us", "llama.cpp / ours", "cuBLAS, us", "cuBLAS / ours"]
    rows, infos = [], []
    for found, info in results.of("test_product", n_columns=n_columns, overlaps=True):
        sizes = {each: found[each] for each in ("n_rows", "n_elements")}
        shape, name, ours = "{n_rows}x{n_elements}".format(**sizes), found["name"], info["seconds"]
        apart = results.one("test_product", **found | {"overlaps": False})
        dense = results.one("test_cublas", n_columns=n_columns, **sizes)
        share, theirs = info["floor s"] / ours, theirs_us(name, shape, n_columns)[0]
        row = [name, shape, us(info["floor s"]), us(ours), percent(share)]
        row += [us(apart["seconds"]), percent(info["floor s"] / apart["seconds"])] if apart else [None] * 2
        row += [us(theirs), times(theirs, ours)]
        row += [us(dense["seconds"]), times(dense["seconds"], ours)] if dense else [None] * 2
        rows.append(row)
        infos += [each for each in (info, apart, dense) if each]
    error = max(info["error"] for _, info in results.of("test_product", n_columns=n_columns))
    checked = f"The largest relative error of a product with results in float16, compared with float64, is {error:.1e}."
    return [table(head, rows), checked, spread_note(infos), late_note(infos)]


def many(results):
    """More columns: which way is the fastest."""
    head = ["format", "columns", "ours, us", "dequantize first, us", "cuBLAS, us", "llama.cpp, us", "faster of ours"]
    rows, infos, shape = [], [], (14336, 4096)
    for found, fused in results.of("test_many_columns", way="fused"):
        name, n_columns = found["name"], found["n_columns"]
        whole = results.one("test_many_columns", **found | {"way": "dequantize first"})
        dense = results.one("test_cublas", n_rows=shape[0], n_elements=shape[1], n_columns=n_columns)
        seconds = [each and each["seconds"] for each in (fused, whole, dense)]
        theirs = theirs_us(name, f"{shape[0]}x{shape[1]}", n_columns)[0]
        faster = whole and ("blocks" if seconds[0] < seconds[1] else "dequantize first")
        rows.append([name, n_columns, *map(us, seconds), us(theirs), faster])
        infos += [each for each in (fused, whole, dense) if each]
    text = (
        f"The weight has the shape {shape[0]}x{shape[1]}. *Ours* is the time of the kernels that multiply the blocks. "
        "`linear` uses them for up to 128 columns. On GPUs other than those of compute capability 9.0, it uses them "
        "for up to 32 columns if the weight has few rows. Otherwise it dequantizes first. `matmul` does the same if "
        "the program has imported PyTorch."
    )
    return [text, table(head, rows), spread_note(infos), late_note(infos)]


def some_rows(results):
    """Some rows of a weight."""
    head = ["format", "rows at random, us", "GB/s", "rows in order, us", "GB/s"]
    lines, infos = [], []
    for found, info in results.of("test_rows", way="get_rows"):
        in_order = results.one("test_rows", **found | {"way": "dequantize"})
        line = [found["name"]]
        for each in (info, in_order):
            line += [us(each["seconds"]), f"{each['bytes'] / each['seconds'] / 1e9:,.0f}"]
        lines.append(line)
        infos += [info, in_order]
    text = (
        "`get_rows` dequantizes 16384 of 131072 rows of 4096 elements to FP16. GB/s counts the bytes that are read and "
        "written. For comparison, `dequantize` does the same with as many consecutive rows."
    )
    return [text, table(head, lines), spread_note(infos), late_note(infos)]


def errors(found):
    ways = [way for way in next(iter(found["like a model"].values())) if way != "weights"]
    n_rows, n_elements = found["shapes"][0]
    head, rows = ["format", "weights", *ways, "llama.cpp"], []
    for name, each in found["like a model"].items():
        theirs = theirs_us(name, f"{n_rows}x{n_elements}", found["columns"])[1]
        rows.append([name, each["weights"], *(f"{each[way]:.1e}" for way in ways), theirs and f"{theirs:.1e}"])
    text = (
        "These are the relative errors of results, compared with products in float64 of the values of the blocks. The "
        f"weight has the shape {n_rows}x{n_elements}, and the {found['columns']} columns are normal random numbers in "
        "float16. The weights are normal random numbers, quantized by gguf-py. If gguf-py cannot quantize to a format, "
        'the blocks are random. "FP16 weights" means that cuBLAS multiplies the dequantized weights, rounded to '
        "float16. llama.cpp quantizes the columns to Q8_1."
    )
    head_of_bytes = ["format", *(f"{way}: {what}" for way in ways for what in ("finite", "largest error"))]
    rows_of_bytes = []
    for name, each in found["random bytes"].items():
        row = [name]
        for way in ways:
            share, largest = each[way]["finite"], each[way]["largest error"]
            row += [None if share is None else f"{share:.2%}", None if largest is None else f"{largest:.1e}"]
        rows_of_bytes.append(row)
    text_of_bytes = (
        "Blocks of random bytes have huge, tiny and infinite scales. In the next table, the weight has the shape "
        f"{found['shapes'][1][0]}x{found['shapes'][1][1]}. The table counts only results whose exact "
        "value is a normal number in the type of the results. It shows the share of these that is finite, and the "
        "largest error of the finite ones, divided by the sum of the absolute values of all terms."
    )
    return [text, table(head, rows), text_of_bytes, table(head_of_bytes, rows_of_bytes), described_line(found)]


def decoding(found):
    head = [
        "way",
        "sequences",
        "tokens per second",
        "us per step",
        "spread",
        "floor / time",
        "difference of logits",
    ]
    rows = [
        [
            each["way"],
            each["batch"],
            f"{each['tokens per second']:,.0f}",
            us(each["seconds"]),
            f"{each['spread']:.1%}",
            percent(each["share of the floor"]),
            f"{each['difference of logits']:.1e}",
        ]
        for each in found["rows"]
    ]
    text = (
        f"The model has {found['weights'] / 1e9:.2f} billion weights, which take {found['bytes'] / 1e6:.0f} MB in "
        "blocks. Each step writes one token per sequence and is one CUDA graph. The floor, which is the time to read "
        f"all blocks, is {us(found['floor s'])} us. {SPREAD_OF_ALL} The last column is the difference from the logits "
        "with FP16 weights."
    )
    return [text, table(head, rows), described_line(found)]


def experts(found):
    head = ["format", "size of an expert", "tokens", "distinct experts", "us", "spread", "MB to read", "floor, us"]
    rows = [
        [
            each["format"],
            f"{each['rows']}x{each['elements']}",
            each["tokens"],
            f"{each['distinct experts']:.1f}",
            us(each["seconds"]),
            f"{each['spread']:.1%}",
            f"{each['bytes'] / 1e6:.1f}",
            us(each["floor s"]),
            percent(each["floor s"] / each["seconds"]),
        ]
        for each in found["rows"]
    ]
    text = (
        f"`ggml.mul_mat_id` multiplies each token with {found['chosen']} of {found['experts']} experts. The floor is "
        f"the time to read the chosen experts once. {SPREAD_OF_ALL}"
    )
    return [text, table([*head, "floor / time"], rows), late_note(found["rows"]), described_line(found)]


def page(folder=RESULTS):
    """The text of the page, or None if there are no results."""
    parts = []
    measured = folder / "h100-products.json"
    if measured.exists():
        results = Results(measured)
        for n_columns, title in ((1, "One column"), (8, "Eight columns")):
            if results.of("test_product", n_columns=n_columns, overlaps=True):
                parts += [f"## {title}", *few(results, n_columns)]
        if results.of("test_many_columns", way="fused"):
            parts += ["## More columns", *many(results)]
        if results.of("test_rows", way="get_rows"):
            parts += ["## Rows", *some_rows(results)]
        parts.append(machine_line(results))
    for name, title, part in (
        ("products-accuracy", "Errors", errors),
        ("llama-like", "Decoding", decoding),
        ("llama-like-compiled", "Decoding with torch.compile", decoding),
        ("moe-products", "Experts", experts),
    ):
        path = folder / f"{name}.json"
        if path.exists():
            parts += [f"## {title}", *part(json.loads(path.read_text()))]
    return "\n\n".join([INTRODUCTION.strip(), *filter(None, parts)]) + "\n" if parts else None


def main():
    text = page(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    if text is None:
        raise SystemExit("there are no results; the docstring has the commands")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
