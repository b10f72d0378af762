"""Write the gallery: a page of the pictures that the notebooks show, and the pictures as files.

python notebooks/gallery.py        # after notebooks/run.py, which does this too
"""

import base64
import re
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


def pictures(notebook):
    """For each picture: the heading above it, what it shows, a file name's ending, and the bytes of the file."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)
            heading = found[-1] if found else heading
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/svg+xml" in data:
                drawn = "".join(data["image/svg+xml"])
                yield heading, re.search("<title>(.*?)</title>", drawn)[1], "svg", f"{drawn}\n".encode()
            elif "image/png" in data:
                yield heading, heading, "png", base64.b64decode(data["image/png"])


def write(docs=DOCS):
    """Write docs/gallery.md, and docs/gallery/."""
    folder = docs / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    lines = ["# Gallery", "", "What the notebooks show. Each of them runs without a GPU, and says what is to be seen."]
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        title, text = notebook.cells[0].source.removeprefix("# ").split("\n\n")[:2]
        lines += ["", f"## [{title}](../notebooks/{path.name})", "", text]
        above = title
        for number, (heading, shown, ending, content) in enumerate(pictures(notebook), 1):
            name = f"{path.stem}-{number}.{ending}"
            (folder / name).write_bytes(content)
            if heading != above:
                lines += ["", f"### {heading}"]
                above = heading
            lines += ["", f"![{shown}](gallery/{name})"]
    (docs / "gallery.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(write())
