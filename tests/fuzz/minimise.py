"""Chooses the corpus of a target: `python tests/fuzz/minimise.py TARGET FOLDER` looks at the inputs in the folder.

It keeps few and short inputs that together reach every step from line to line in the package that all of them reach.
Without a folder it makes inputs of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGE = str(HERE.parents[1] / "numba_dequant")
Step = tuple[str, int, int]


class Steps:
    """Records steps from line to line in files of the package."""

    def __init__(self) -> None:
        self.found: set[Step] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return None
        before = frame.f_code.co_firstlineno

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            if event == "line":
                self.found.add((name, before, frame.f_lineno))
                before = frame.f_lineno
            return line

        return line


def steps_of(target: Any, data: bytes) -> set[Step]:
    """The steps of one execution, and its outcome."""
    steps = Steps()
    sys.settrace(steps)
    threading.settrace(steps)
    try:
        outcome = target(data)
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    return {*steps.found, (outcome, 0, 0)}


def chosen(inputs: list[bytes], steps: list[set[Step]]) -> list[bytes]:
    """Few inputs that reach what all reach."""
    left, kept = set().union(*steps), []
    while left:
        best = max(range(len(inputs)), key=lambda number: (len(steps[number] & left), -len(inputs[number])))
        kept.append(inputs[best])
        left -= steps[best]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="inputs to make without a folder")
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import targets

    chance = random.Random(options.target)
    made = [chance.randbytes(60) for _ in range(options.count)]
    inputs = made if options.folder is None else [path.read_bytes() for path in sorted(options.folder.iterdir())]
    kept = chosen(inputs, [steps_of(targets.TARGETS[options.target], data) for data in inputs])
    corpus = HERE / "corpus" / options.target
    corpus.mkdir(parents=True, exist_ok=True)
    for old in corpus.iterdir():
        old.unlink()
    for data in kept:
        (corpus / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    print(f"{len(kept)} of {len(inputs)} inputs, {sum(map(len, kept)):,} bytes, in {corpus}")


if __name__ == "__main__":
    main()
