"""Run the notebooks from top to bottom, and save their outputs in them and in the gallery.

python notebooks/run.py            # all of them
python notebooks/run.py --check    # save nothing; fail if a cell fails or warns
"""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from queue import Empty

import gallery
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"


class Client(NotebookClient):
    """A client that looks for replies once a second.

    While it waits, it sends messages to interactive widgets on the same socket. That may swallow the only notice of a
    reply, and the client would wait until its timeout.
    """

    async def async_start_new_kernel_client(self):
        client = await super().async_start_new_kernel_client()
        client.shell_channel.get_msg = in_slices(client.shell_channel.get_msg)
        return client


def in_slices(get_message):
    """`get_message` with a timeout, called with timeouts of at most a second until that one is over."""

    async def sliced(timeout):
        end = time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            try:
                return await get_message(timeout=max(0, min(left, 1)))
            except Empty:
                if left <= 1:
                    raise

    return sliced


def run(path):
    """The notebook with new outputs, and what its cells wrote to stderr."""
    notebook = nbformat.read(path, as_version=4)
    Client(notebook, timeout=300, resources={"metadata": {"path": str(HERE)}}).execute()
    complaints = []
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            complaints += [output.text for output in cell.outputs if output.get("name") == "stderr"]
            # Interactive widgets do not work without a kernel, so they are not saved.
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook, complaints


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="prefixes of notebook names, such as 01; default: all")
    parser.add_argument("--check", action="store_true", help="save nothing")
    options = parser.parse_args()
    failed = False
    for path in sorted(HERE.glob("*.ipynb")):
        if options.names and not path.name.startswith(tuple(options.names)):
            continue
        if "numba_dequant.torch" in path.read_text() and find_spec("torch") is None:
            print(f"{path.name}: not run, it needs PyTorch")
            continue
        notebook, complaints = run(path)
        print(f"{path.name}: {''.join(complaints) or 'no complaints'}")
        failed |= bool(complaints)
        if not options.check:
            nbformat.write(notebook, path)
    if not options.check:
        gallery.write()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
