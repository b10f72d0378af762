"""GGUF files that are right but for one rule or two: a description of a file, breaks of rules, and its bytes."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any

from choices import Choices
from specification import ARRAY, BLOCKS, NUMBERS, STRING, UINT32, padded

KINDS = sorted(BLOCKS)
HUGE = [0, 1, 7, 8, 31, 33, 255, 256, 257, 65535, 65536, (1 << 26) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
HUGE += [1 << 60, (1 << 60) - 256, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 8, (1 << 64) - 1]
TEXTS = [b"", b"\0", b"a", b"a\0", b"a\0b", b"\xff", b"\xed\xa0\x80", "ü模".encode(), b"\x1b[2J", b"\r\n", b"x" * 255]
TEXTS += [b"y" * 256, b"z" * 300, bytes(8), b"\1" + bytes(7), bytes(7) + b"\1", b"\xe2\x80\xae", b"{0!r}{}", b"%s%n"]
NAMES = ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_norm.weight", "blk.1.ffn_up.weight", "ids", "", "*"]
NAMES += ["blk.10.attn_q.weight", "output.weight", "[a-z]", "t", "T", "ü", "a.b", "?", "very." * 30 + "long"]
KEYS = [
    "general.architecture",
    "general.name",
    "llama.block_count",
    "tokenizer.ggml.tokens",
    "a",
    "b",
    "c",
    "split.nox",
]
KEYS += [
    "general.file_type",
    "tokenizer.chat_template",
    "x.y.z",
    "comfy.gguf.orig_shape.t",
    "comfy.gguf.orig_shape.ids",
]


@dataclass
class Entry:
    """A metadata entry. `item` is the type of an array's items; the counts are written instead of the true ones."""

    key: bytes
    kind: int
    value: Any
    item: int = 0
    key_length: int | None = None
    length: int | None = None


@dataclass
class Tensor:
    """A tensor entry and its data; `shape` has rows first."""

    name: bytes
    kind: int
    shape: tuple[int, ...]
    data: bytes
    n_dimensions: int | None = None
    name_length: int | None = None
    offset: int | None = None
    moved: int = 0


@dataclass
class File:
    """A description of a file; what is None is computed."""

    order: str = "<"
    magic: bytes = b"GGUF"
    version: int = 3
    entries: list[Entry] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    n_tensors: int | None = None
    n_entries: int | None = None
    alignment: int = 32
    before: bytes = b""
    after: bytes = b""
    cut: int = 0

    def pack(self, code: str, value: Any) -> bytes:
        return struct.pack(self.order + code, value)

    def text(self, raw: bytes, length: int | None = None) -> bytes:
        return self.pack("Q", len(raw) if length is None else length) + raw

    def one(self, kind: int, value: Any) -> bytes:
        """A value of a type; bytes stand for a value of a type that does not exist."""
        if kind == STRING:
            return self.text(value)
        return self.pack(NUMBERS[kind], value) if kind in NUMBERS else bytes(value)

    def entry(self, entry: Entry) -> bytes:
        head = self.text(entry.key, entry.key_length) + self.pack("I", entry.kind)
        if entry.kind != ARRAY:
            if entry.kind == STRING:
                return head + self.text(entry.value, entry.length)
            return head + self.one(entry.kind, entry.value)
        count = len(entry.value) if entry.length is None else entry.length
        items = b"".join(self.one(entry.item, item) for item in entry.value)
        return head + self.pack("I", entry.item) + self.pack("Q", count) + items

    def header(self) -> bytes:
        head = self.magic + self.pack("I", self.version)
        head += self.pack("Q", len(self.tensors) if self.n_tensors is None else self.n_tensors)
        head += self.pack("Q", len(self.entries) if self.n_entries is None else self.n_entries)
        head += b"".join(self.entry(entry) for entry in self.entries)
        at = 0
        for tensor in self.tensors:
            shape = tensor.shape
            head += self.text(tensor.name, tensor.name_length)
            head += self.pack("I", len(shape) if tensor.n_dimensions is None else tensor.n_dimensions)
            head += b"".join(self.pack("Q", extent) for extent in reversed(shape)) + self.pack("I", tensor.kind)
            head += self.pack("Q", (at if tensor.offset is None else tensor.offset) + tensor.moved & (1 << 64) - 1)
            at += padded(len(tensor.data), self.alignment)
        return head

    def content(self) -> bytes:
        """The bytes of the file."""
        header = self.header()
        data = header + bytes(-len(header) % self.alignment)
        for tensor in self.tensors:
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
        data += self.after
        return self.before + data[: max(len(data) - self.cut, 0)]


def number(choices: Choices, kind: int) -> Any:
    """A number of a type, from its bytes."""
    code = NUMBERS[kind]
    if choices.one_in(3):
        return struct.unpack("<" + code, choices.bytes(struct.calcsize("=" + code)))[0]
    return choices.below(100)


def entry(choices: Choices, key: str) -> Entry:
    """A metadata entry of any type."""
    kind = choices.below(13)
    if kind == STRING:
        return Entry(key.encode(), kind, choices.pick(TEXTS))
    if kind != ARRAY:
        return Entry(key.encode(), kind, number(choices, kind))
    item = choices.pick([STRING, STRING, *NUMBERS])
    count = choices.pick([0, 1, 2, 3, 3, 17, 64, 65, 200])
    if item == STRING:
        texts = choices.some(TEXTS, 3) or [b"token"]
        return Entry(key.encode(), kind, [texts[i % len(texts)] for i in range(count)], item)
    some = [number(choices, item) for _ in range(min(count, 4))]
    return Entry(key.encode(), kind, [some[i % len(some)] for i in range(count)], item)


def tensor(choices: Choices, name: str, kinds: list[int] = KINDS) -> Tensor:
    """A small tensor of any type, sometimes without dimensions or without elements."""
    kind = choices.pick(kinds)
    block, size = BLOCKS[kind]
    shape = tuple(choices.pick([1, 2, 3, 1, 5, 0]) for _ in range(choices.pick([0, 1, 1, 1, 2, 3, 7])))
    row = choices.pick([1, 2, 3, 0, 1]) * block if block > 1 else choices.pick([1, 2, 5, 8, 33, 0])
    if shape or block > 1 or not choices.one_in(8):
        shape = (*shape, row)
    while math.prod(shape) > 1 << 16:
        shape = shape[1:]
    n_bytes = size * math.prod(shape)
    seed = choices.bytes(2)
    data = (seed * (n_bytes // block // 2 + 1))[: n_bytes // block]
    return Tensor(name.encode(), kind, shape, data)


def valid(choices: Choices, kinds: list[int] = KINDS) -> File:
    """A file that breaks no rule."""
    file = File(choices.pick("<<<>"), version=choices.pick([3, 3, 3, 2]))
    for key in dict.fromkeys(choices.some(KEYS, 5)):
        file.entries.append(entry(choices, key))
    if choices.one_in(4):
        file.alignment = 1 << choices.below(9)
        file.entries.append(Entry(b"general.alignment", UINT32, file.alignment))
    for name in dict.fromkeys(choices.some(NAMES, 5)):
        file.tensors.append(tensor(choices, name, kinds))
    return file


def split(choices: Choices) -> list[File]:
    """The shards of a model that breaks no rule; a list of one is a whole model."""
    whole = valid(choices)
    count = choices.pick([1, 1, 2, 2, 3, 4])
    kind = choices.pick([2, 5, 0, 10, 4])
    shards = [File(whole.order, alignment=whole.alignment) for _ in range(count)]
    shards[0].entries = whole.entries
    for number_, shard in enumerate(shards):
        shard.tensors = whole.tensors[number_::count]
        if number_ and whole.alignment != 32:
            shard.entries = [Entry(b"general.alignment", UINT32, whole.alignment)]
        if count > 1 or choices.one_in(4):
            shard.entries = [
                *shard.entries,
                Entry(b"split.no", kind, number_),
                Entry(b"split.count", kind, count),
                Entry(b"split.tensors.count", kind, len(whole.tensors)),
            ]
    return shards
