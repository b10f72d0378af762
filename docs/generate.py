"""The pages of the site that are made from the code, the results of the benchmarks, and files outside of docs/.

conf.py calls `write` before each build:

- formats/: a page for each format, from its `Format` and from benchmarks/results;
- notebooks/: the notebooks with their stored outputs;
- repository/: pages that lie elsewhere in the repository, such as SECURITY.md.

`on_site` changes the text of a page: links to these files become links to their pages, and pictures follow the theme.
"""

import inspect
import json
import posixpath
import re
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from tables import Results, machine_line, table  # noqa: E402

import numba_dequant as nd  # noqa: E402
from numba_dequant.dtypes import NAMES  # noqa: E402
from numba_dequant.explain.block_picture import INK  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COPIED = {
    "SECURITY.md": "repository/security.md",
    "CONTRIBUTING.md": "repository/contributing.md",
    "CHANGELOG.md": "repository/changelog.md",
    "benchmarks/README.md": "repository/benchmarks.md",
    "tests/fuzz/README.md": "repository/fuzzing.md",
}
"""Files of the repository that become pages."""
PAGES = {
    **COPIED,
    "README.md": "index.md",
    **{f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in NOTEBOOKS},
}
"""File of the repository -> its page on the site. Other files outside of docs/ have none."""
LOSSES, SHARE = ROOT / "notebooks" / "04_what_each_format_loses.ipynb", "as a share of the spread"
"""The notebook that quantizes, and the column of its table that the pages show."""
SHAPE = {"n_rows": 14336, "n_elements": 4096}
"""The product that the pages of formats show."""

CODE = "`dequantize` is the specification. `decode` returns eight elements. Kernels and the CPU path are made from it."
MORE = "`nd.explain` shows a real block: [exploring blocks](../exploring-blocks.md). [All formats](index.md)."


def quantized():
    """The formats that have a page: those with blocks."""
    return [fmt for fmt in nd.FORMATS.values() if fmt.block_size > 1]


def page_of(fmt):
    """The file name of the page of a format, without its ending."""
    return fmt.name.lower()


def write(docs):
    """Write all generated pages below `docs`, and remove those that are no longer generated."""
    pages = {f"formats/{page_of(fmt)}.md": format_page(fmt) for fmt in quantized()}
    pages["formats/index.md"] = format_index()
    pages |= {f"notebooks/{path.stem}.md": notebook_page(path) for path in NOTEBOOKS}
    pages["notebooks/index.md"] = notebook_index()
    pages |= {page: (ROOT / source).read_text(encoding="utf-8") for source, page in COPIED.items()}
    for folder in {name.partition("/")[0] for name in pages}:
        (docs / folder).mkdir(exist_ok=True)
        for old in (docs / folder).glob("*.md"):
            if f"{folder}/{old.name}" not in pages:
                old.unlink()
    for name, text in pages.items():
        path = docs / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # Sphinx reads changed pages only
            path.write_text(text, encoding="utf-8")


def format_index():
    """The list of all formats."""
    head = ["format", "id", "elements per block", "bytes per block", "bits per weight", "a block is"]
    rows = [
        [
            f"[{fmt.name}]({page_of(fmt)}.md)",
            *(fmt.ggml_id, fmt.block_size, fmt.type_size, f"{fmt.bits_per_weight:.4g}", fmt.summary),
        ]
        for fmt in quantized()
    ]
    names = ", ".join(fmt.name for fmt in nd.FORMATS.values() if fmt.block_size == 1)
    pages = "\n".join(page_of(fmt) for fmt in quantized())
    return f"""# Formats

Each page has the formula of a format, a picture of its block, the code that decodes it, and what was measured.

{table(head, rows).replace("--: |" + chr(10), "--- |" + chr(10), 1)}

These types have no blocks: {names}. F32, F16 and BF16 are cast or passed on. The others are returned as they are.

```{{toctree}}
:hidden:

{pages}
```
"""


def format_page(fmt):
    """The page of a format."""
    # A paragraph is one line: a line that begins with "1." would become a list.
    first, *paragraphs = (" ".join(paragraph.split()) for paragraph in fmt.description.split("\n\n"))
    formula, _, facts = first.partition(": ")[2].partition("; ")
    least, greatest = fmt.value_range
    rows = [
        ["id in a file", fmt.ggml_id],
        ["elements per block", fmt.block_size],
        ["bytes per block", fmt.type_size],
        ["bits per weight", f"{fmt.bits_per_weight:g}"],
        ["alignment of a block in bytes", fmt.alignment],
        ["values, where the floats of the block are 1", f"{least:.6g} to {greatest:.6g}"],
    ]
    picture = fmt.picture()
    fields = [[f"`{each.name}`", bytes_of(each), each.kind, each.decides] for each in picture.fields]
    module = inspect.getmodule(fmt.dequantize).__name__.replace(".", "/")
    code = f"{inspect.getsource(fmt.dequantize)}\n\n{inspect.getsource(fmt.decode)}"
    parts = [
        f"# {fmt.name}",
        f"{fmt.summary[0].upper()}{fmt.summary[1:]}. There are {facts}",
        f"```\n{formula}\n```",
        f"## The block\n\n{framed(picture.svg)}",
        table(["field", "bytes", "type", "a bit decides"], fields).replace("--:", "---"),
        *paragraphs,
        table(["property", "value"], rows),
        "## The code",
        f"This is `{module}.py`. {CODE}",
        f"```python\n{code}```",
        rounding(fmt),
        quantizing(fmt),
        speed(fmt),
        f"In a notebook, `nd.FORMATS[{fmt.name!r}]` shows this picture. {MORE}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def bytes_of(field):
    """Where a field lies in its block."""
    return f"{field.start}" if field.n_bytes == 1 else f"{field.start} to {field.start + field.n_bytes - 1}"


def framed(svg):
    """A picture in the page, which has the text colour of the theme, and scrolls where the page is narrow."""
    return f'<div class="block-picture" tabindex="0">{svg.replace(INK, "").strip()}</div>'


def rounding(fmt):
    """What rounding the values costs, where it was measured."""
    text = """## Rounding

Values are computed in FP32, as GGML computes them, and rounded once to the nearest FP16 or BF16, ties to even. FP32
results are those of GGML, bit for bit. The tests compare every path with vectors of GGML's own C code."""
    found = json.loads((RESULTS / "accuracy.json").read_text())["errors"].get(fmt.name)
    products = json.loads((RESULTS / "products-accuracy.json").read_text())
    product = products["like a model"].get(fmt.name)
    if found:
        rows = [[way, f"{error:.1e}", f"{share:.0%}"] for way, (error, share) in found.items()]
        text += f"""

What this and other ways of rounding cost was measured on random blocks. *Exact* is what this package does. *Error* is
the root mean square of the differences from the FP32 values, divided by that of the values.
[What changes in the values](../programs.md#what-changes-in-the-values) explains the ways.

{table(["way", "error", "values that are not the exact ones"], rows)}"""
    if product:
        ways = {"ours, FP32 results": "FP32", "ours, FP16 results": "FP16"}
        errors = " and ".join(f"{product[way]:.1e} with results in {name}" for way, name in ways.items())
        text += f"""

The error of `matmul` on {products["gpu"]} is {errors}, relative to the product in FP64."""
    return text


def quantizing(fmt):
    """What storing weights in the format costs, where the notebook has measured it; otherwise an empty string."""
    notebook = json.loads(LOSSES.read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    for output in outputs:
        head, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in "".join(output.get("data", {}).get("text/markdown", [])).splitlines() or [""]
        ]
        if SHARE in head:
            for row in rows:
                if row[0] == fmt.name:
                    return f"""## What it loses

The weights of a small network, stored in this format, differ from the original by {row[head.index(SHARE)]} of their
spread (root mean square). [What each format loses](../notebooks/{LOSSES.stem}.md) compares the formats."""
    return ""


def speed(fmt):
    """What was measured on a GPU and on a CPU; an empty string if nothing was."""
    results, peers = Results(RESULTS / "h100.json"), json.loads((RESULTS / "peers.json").read_text())["GB/s"]
    theirs = peers.get(fmt.name, {}).get("llama.cpp", {})
    rows = []
    for dtype in NAMES:
        found = results.one("test_kernel", name=fmt.name, dtype=dtype, mapping="tile")
        if found:
            other = theirs.get(dtype)
            rows.append([dtype, f"{found['GB/s']:.0f}", f"{found['share']:.1%}", other and f"{other:.0f}"])
    if not rows:
        return ""
    text = f"""## Speed

GB/s are bytes read and written per second, the median of several readings. The roofline is the memory roofline of the
same run: a kernel that moves as many bytes and computes nothing. [Performance](../performance.md) says how it was
measured.

{table(["to", "GB/s", "of the roofline", "llama.cpp, GB/s"], rows)}"""
    host = Results(RESULTS / "h100-host.json")
    cpu, gguf = (host.one(test, name=fmt.name) for test in ("test_cpu", "test_gguf_py"))
    if cpu:
        text += f"\n\nOn the CPU of this machine, with {cpu['threads']} threads: {cpu['GB/s']:.1f} GB/s to FP16"
        text += f"; gguf-py: {gguf['GB/s']:.2f} GB/s." if gguf else "."
    products = Results(RESULTS / "h100-products.json")
    product = products.one("test_product", name=fmt.name, n_columns=1, overlaps=True, **SHAPE)
    if product:
        size = "{n_rows}x{n_elements}".format(**SHAPE)
        text += f"""

The product of a compressed weight of {size} and one column takes {1e6 * product["seconds"]:.1f} us. Reading the weight
takes {1e6 * product["floor s"]:.1f} us. [Products](../products.md) has other shapes."""
    return f"{text}\n\n{machine_line(results)}"


def notebook_index():
    """The list of the notebooks."""
    lines = []
    for path in NOTEBOOKS:
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title, text = first.removeprefix("# ").split("\n\n")[:2]
        lines.append(f"## [{title}]({path.stem}.md)\n\n{text}")
    pages = "\n".join(path.stem for path in NOTEBOOKS)
    return f"""# Notebooks

They are in the folder `notebooks` of the repository. `pip install '.[notebook]'` installs what they need. All run
without a GPU; the one on a model also needs PyTorch and a model file. [The gallery](../gallery.md) has their pictures.

{chr(10).join(lines)}

```{{toctree}}
:hidden:

{pages}
```
"""


def notebook_page(path):
    """A notebook as a page: its text, its code, and its stored outputs."""
    parts, heading = [], ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            heading = next(reversed(re.findall(r"^#+ (.+)$", source, re.MULTILINE)), heading)
        elif source:
            parts.append(f"```python\n{source}\n```")
            parts += filter(None, (shown(output, heading) for output in cell["outputs"]))
    return "\n\n".join(parts) + "\n"


def shown(output, heading):
    """A stored output of a cell as Markdown; None for what only a running notebook shows.

    `heading` describes a plot to those who do not see it.
    """
    if output["output_type"] == "stream":
        return fenced("".join(output["text"])) if output["name"] == "stdout" else None
    data = output.get("data", {})
    if any(kind.startswith("application/vnd.jupyter.widget") for kind in data):
        return None
    data = {kind: "".join(content) for kind, content in data.items()}
    if "image/png" in data:
        encoded = "".join(data["image/png"].split())
        return f'<img class="plot" alt="{escape(heading)}" src="data:image/png;base64,{encoded}">'
    if "text/markdown" in data:
        return data["text/markdown"]
    if "text/html" in data:
        page = re.sub(r"<style.*?</style>", "", data["text/html"].replace(INK, ""), flags=re.DOTALL)
        return f'<div class="output" tabindex="0">{re.sub(chr(10) + "{2,}", chr(10), page)}</div>'
    return fenced(data["text/plain"]) if "text/plain" in data else None


def fenced(text):
    """Text of an output, without the escapes that colour it."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    return f"````text\n{plain}\n````" if plain else None


def source_of(name):
    """The file of the repository that page `name` was made from, relative to the top level."""
    page = f"{name}.md"
    return next((source for source, target in COPIED.items() if target == page), f"docs/{page}")


def on_site(text, name):
    """The text of page `name` with links and pictures for the site."""
    if name.startswith("notebooks/"):
        folder, page = "notebooks", name
    else:
        folder, page = posixpath.dirname(source_of(name)), name
    text = re.sub(r"<picture>.*?</picture>", lambda match: for_themes(match[0]), text, flags=re.DOTALL)
    text = re.sub(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^()\s]+)\)", lambda match: linked(match, folder, page), text)
    # A comment on a line of its own ends a table; it is for the programs that write the page.
    return re.sub(r"^<!-- .*? -->\n", "", text, flags=re.MULTILINE)


def for_themes(picture):
    """A picture with two sources as two images, of which the theme shows one."""
    dark, light = re.search(r'srcset="([^"]+)"', picture)[1], re.search(r'<img [^>]*src="([^"]+)"', picture)[1]
    alt = re.search(r'alt="([^"]*)"', picture)[1]
    return "\n\n".join(f"![{alt}]({path}){{.only-{theme}}}" for theme, path in (("light", light), ("dark", dark)))


def linked(match, folder, page):
    """A link or an image of a page whose source lies in `folder`, for the site."""
    mark, text, target = match.groups()
    path, hash_mark, anchor = target.partition("#")
    if re.match(r"[a-z]+:", target) or not path:
        return match[0]
    source = posixpath.normpath(posixpath.join(folder, path))
    if mark and source.startswith("docs/gallery/") and source.endswith(".svg"):
        return framed((ROOT / source).read_text(encoding="utf-8"))  # an image would not know the theme
    if source.startswith("docs/"):
        found = source.removeprefix("docs/")
    elif mark or source not in PAGES:
        found = f"../{source}"
        if not mark:
            return f"{text} (`{source}`)" if source not in text else text
    else:
        found = PAGES[source]
    return f"{mark}[{text}]({posixpath.relpath(found, posixpath.dirname(page) or '.')}{hash_mark}{anchor})"


def as_rst(app, what, name, thing, options, lines):
    """A docstring as Sphinx expects it: links to pages, and no type before a colon.

    ``docs/streams.md`` becomes a link. What comes before a colon at the start of *Returns*, or of the docstring of an
    attribute, would be taken for a type; an empty one keeps the sentence.
    """
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"docs/([\w-]+)\.md", r":doc:`/\1`", line)
        is_first = number == 0 and what in ("attribute", "property", "data")
        if ":" in line and (is_first or (number and lines[number - 1].strip() == "Returns:")):
            indent = len(line) - len(line.lstrip())
            lines[number] = f"{line[:indent]}: {lines[number][indent:]}"


def own_signature(app, what, name, thing, options, signature, returned):
    """The signature of a class whose base is a stand-in for one of PyTorch, where Sphinx finds that of the stand-in."""
    if what != "class" or signature != "(*args, **kwargs)" or "__init__" not in vars(thing):
        return None
    parameters = list(inspect.signature(vars(thing)["__init__"]).parameters.values())[1:]
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(bare)), None
