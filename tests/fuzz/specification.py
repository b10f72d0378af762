"""What a GGUF file says, read by the rules of ggml's docs/gguf.md. Nothing of the package is used here.

Where the rules leave a choice, this reader chooses as the docstring of `numba_dequant/gguf/file.py` says. It reads the
whole file at once, item by item, and is written to be compared with the rules, not to be fast.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any

# ggml_type -> elements and bytes of a block, from ggml-common.h
BLOCKS = {
    0: (1, 4),
    1: (1, 2),
    30: (1, 2),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    9: (32, 36),
    20: (32, 18),
    39: (32, 17),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
    16: (256, 66),
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    29: (256, 56),
    34: (256, 54),
    35: (256, 66),
    40: (64, 36),
    41: (128, 18),
    42: (64, 18),
}

# gguf_metadata_value_type -> format character of struct; 8 is a string, 9 an array
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
BOOL, STRING, ARRAY, UINT32 = 7, 8, 9, 4
SPLIT = ("split.no", "split.count", "split.tensors.count")


class ViolationError(Exception):
    """The file breaks a rule."""


@dataclass
class Contents:
    """What the file says. A tensor is (ggml_type, shape with rows first, first byte, bytes)."""

    order: str
    version: int
    alignment: int = 32
    metadata: dict[str, Any] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, tuple[int, tuple[int, ...], int, int]] = field(default_factory=dict)
    end: int = 0


def must(rule: object, what: str) -> None:
    if not rule:
        raise ViolationError(what)


class Reader:
    def __init__(self, content: bytes, at: int) -> None:
        self.content, self.at, self.order = content, at, "<"

    def raw(self, n: int) -> bytes:
        must(self.at + n <= len(self.content), "the file ends too early")
        self.at += n
        return bytes(self.content[self.at - n : self.at])

    def number(self, code: str) -> Any:
        return struct.unpack(self.order + code, self.raw(struct.calcsize("=" + code)))[0]

    def string(self, most: int) -> bytes:
        length = self.number("Q")
        must(length <= most, "the string is too long")
        return self.raw(length)

    def name(self) -> str:
        try:
            return self.string(65535).rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise ViolationError("a name is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string(1 << 26).rstrip(b"\0").decode(errors="replace")
        if kind == ARRAY:
            return self.array()
        must(kind in NUMBERS, "the value type is unknown")
        number = self.number(NUMBERS[kind])
        return bool(number) if kind == BOOL else number

    def array(self) -> list[Any]:
        kind, length = self.number("I"), self.number("Q")
        must(kind == STRING or kind in NUMBERS, "the item type is unknown, or an array")
        must(length <= 1 << 26, "the array has too many items")
        if kind == STRING:
            # Every string has a length of eight bytes; without this test a long array would take long to refuse.
            must(8 * length <= len(self.content) - self.at, "the file ends too early")
            return [self.string(1 << 26).decode(errors="replace") for _ in range(length)]
        code = NUMBERS[kind]
        raw = self.raw(length * struct.calcsize("=" + code))
        items = list(struct.unpack(f"{self.order}{length}{code}", raw))
        return [bool(item) for item in items] if kind == BOOL else items


def padded(n: int, alignment: int) -> int:
    return (n + alignment - 1) // alignment * alignment


def read(content: bytes, offset: int = 0, *, allow_truncated: bool = False) -> Contents:
    """The contents of a file that begins at byte `offset`, or ViolationError."""
    reader = Reader(content, offset)
    must(reader.raw(4) == b"GGUF", "the magic is wrong")
    raw = reader.raw(4)
    little, big = struct.unpack("<I", raw)[0], struct.unpack(">I", raw)[0]
    must(little in (2, 3) or big in (2, 3), "the version is unknown")
    reader.order = "<" if little in (2, 3) else ">"
    contents = Contents(reader.order, min(little, big))
    n_tensors, n_entries = reader.number("Q"), reader.number("Q")
    for _ in range(n_entries):
        key, kind = reader.name(), reader.number("I")
        must(key, "a key is empty")
        must(key not in contents.metadata, "a key appears twice")
        contents.metadata[key], contents.types[key] = reader.value(kind), kind
        must(key not in SPLIT or kind in INTEGERS, "a split key is no integer")
        if key == "general.alignment":
            alignment = contents.metadata[key]
            must(kind == UINT32 and alignment in [1 << bit for bit in range(21)], "the alignment is wrong")
            contents.alignment = alignment
    entries = [entry(reader, contents) for _ in range(n_tensors)]
    contents.end = reader.at
    place(contents, entries, offset + padded(reader.at - offset, contents.alignment))
    must(allow_truncated or not entries or contents.end <= len(content), "the data ends too early")
    return contents


def entry(reader: Reader, contents: Contents) -> tuple[int, int]:
    """Read a tensor entry; returns its bytes and its offset."""
    name = reader.name()
    must("\0" not in name, "a NUL within a name")
    must(name not in contents.tensors, "a name appears twice")
    n_dimensions = reader.number("I")
    must(n_dimensions <= 8, "too many dimensions")
    shape = tuple(reader.number("Q") for _ in range(n_dimensions))[::-1]
    kind, offset = reader.number("I"), reader.number("Q")
    must(math.prod(max(extent, 1) for extent in shape) < 1 << 60, "too many elements")
    must(kind in BLOCKS, "the type is unknown")
    block, size = BLOCKS[kind]
    must((shape[-1] if shape else 1) % block == 0, "a row is not whole blocks")
    n_bytes = math.prod(shape) // block * size
    contents.tensors[name] = kind, shape, 0, n_bytes
    return n_bytes, offset


def place(contents: Contents, entries: list[tuple[int, int]], start: int) -> None:
    """The data of each tensor is aligned, and follows that of the tensor before it."""
    expected = 0
    for name, (n_bytes, offset) in zip(contents.tensors, entries, strict=True):
        must(offset == expected, "the offset is wrong")
        kind, shape, _, _ = contents.tensors[name]
        contents.tensors[name] = kind, shape, start + offset, n_bytes
        contents.end = start + offset + n_bytes
        expected += padded(n_bytes, contents.alignment)
