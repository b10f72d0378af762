"""Write the gallery: a page with the pictures and tables of the notebooks, and the pictures as files.

python notebooks/gallery.py        # notebooks/run.py does this too
"""

import base64
import re
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


def shown(notebook):
    """For each picture or table: the heading above it, its title, the file extension (None: table), the content."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)
            heading = headings[-1] if headings else heading
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/svg+xml" in data:
                drawn = data["image/svg+xml"]
                yield heading, re.search("<title>(.*?)</title>", drawn)[1], "svg", f"{drawn}\n".encode()
            elif "image/png" in data:
                yield heading, heading, "png", base64.b64decode(data["image/png"])
            elif "text/markdown" in data:
                yield heading, heading, None, data["text/markdown"]


def write(docs=DOCS):
    """Write docs/gallery.md, and docs/gallery/."""
    folder = docs / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    lines = ["# Gallery", "", "The pictures and tables of the notebooks. Each notebook runs without a GPU."]
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title, text = notebook.cells[0].source.removeprefix("# ").split("\n\n")[:2]
        lines += ["", f"## [{title}](../notebooks/{path.name})", "", text]
        above, number = title, 0
        for heading, what, ending, content in shown(notebook):
            if heading != above:
                lines += ["", f"### {heading}"]
                above = heading
            if ending is None:
                lines += ["", content]
                continue
            number += 1
            name = f"{path.stem}-{number}.{ending}"
            (folder / name).write_bytes(content)
            lines += ["", f"![{what}](gallery/{name})"]
    (docs / "gallery.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(write())
