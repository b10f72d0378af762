"""What must hold of every kernel's PTX."""

import re

WIDE_LOAD = r"ld\.global\S*\.v4\.\w32|ld\.global\S*\.v2\.\w64"
WIDE_STORE = r"st\.global\S*\.v4\.\w32|st\.global\S*\.v2\.\w64"
SLOW = {
    "local memory": r"\.local",
    "a call": r"\bcall\b",
    "double precision": r"\.f64",
    "flushed subnormals": r"\.ftz",
    "a division": r"\b(div|rem)\.",
}


def faults(text):
    """The rules that a kernel's PTX breaks."""
    found = [name for name, pattern in SLOW.items() if re.search(pattern, text)]
    for name, pattern in (("no 16-byte load", WIDE_LOAD), ("no 16-byte store", WIDE_STORE)):
        if not re.search(pattern, text):
            found.append(name)
    return found
