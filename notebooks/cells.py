"""Cells of a notebook that others run too: the kernels of one are timed by a benchmark and checked by a test."""

import json
from pathlib import Path

HERE = Path(__file__).parent


def run_tagged(notebook, tag):
    """Run the cells with a tag; the result is the names that they define."""
    names = {}
    for cell in json.loads((HERE / notebook).read_text())["cells"]:
        if tag in cell["metadata"].get("tags", ()):
            exec("".join(cell["source"]), names)  # noqa: S102 the notebook is ours
    return names
