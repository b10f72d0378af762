"""Breaks of one rule each: functions that change the description of a file."""

from __future__ import annotations

from collections.abc import Callable

from choices import Choices
from specification import ARRAY, BLOCKS, STRING
from structured import HUGE, KEYS, NAMES, TEXTS, Entry, File, Tensor, entry, tensor

Break = Callable[[Choices, File], None]


def magic(choices: Choices, file: File) -> None:
    file.magic = choices.pick([b"GGML", b"FUGG", b"gguf", b"", b"GGU", b"PK\3\4", b"GGUF\0"])


def version(choices: Choices, file: File) -> None:
    file.version = choices.pick([0, 1, 2, 4, 3 << 24, 2 << 24, 3 << 16, 0xFFFFFFFF])


def order(choices: Choices, file: File) -> None:
    """The whole file in the other order, except for what is changed after this."""
    file.order = "<" if file.order == ">" else ">"


def n_tensors(choices: Choices, file: File) -> None:
    file.n_tensors = choices.pick([len(file.tensors) + 1, max(len(file.tensors) - 1, 0), *HUGE])


def n_entries(choices: Choices, file: File) -> None:
    file.n_entries = choices.pick([len(file.entries) + 1, max(len(file.entries) - 1, 0), *HUGE])


def one_entry(choices: Choices, file: File) -> Entry:
    if not file.entries:
        file.entries.append(entry(choices, "k"))
    return choices.pick(file.entries)


def one_tensor(choices: Choices, file: File) -> Tensor:
    if not file.tensors:
        file.tensors.append(tensor(choices, "t"))
    return choices.pick(file.tensors)


def key(choices: Choices, file: File) -> None:
    one_entry(choices, file).key = choices.pick([*TEXTS, b"k" * 65535, b"k" * 65536, b"general.alignment\0"])


def key_length(choices: Choices, file: File) -> None:
    one_entry(choices, file).key_length = choices.pick(HUGE)


def key_twice(choices: Choices, file: File) -> None:
    found = one_entry(choices, file)
    file.entries.append(Entry(found.key + choices.pick([b"", b"\0", b" "]), found.kind, found.value, found.item))


def value_type(choices: Choices, file: File) -> None:
    """Another type; the bytes of the value stay if the type is unknown."""
    found = one_entry(choices, file)
    found.kind, found.value = choices.pick([13, 255, 1 << 31, 0xFFFFFFFF]), choices.bytes(8)


def item_type(choices: Choices, file: File) -> None:
    found = one_entry(choices, file)
    found.kind, found.item, found.value = ARRAY, choices.pick([9, 13, 77, 0xFFFFFFFF]), [choices.bytes(12)] * 2


def value_length(choices: Choices, file: File) -> None:
    """The length of a string or of an array, which is longer or shorter than what follows."""
    found = one_entry(choices, file)
    if found.kind not in (STRING, ARRAY):
        found.kind, found.value = STRING, b"text"
    found.length = choices.pick([len(found.value) + 1, max(len(found.value) - 1, 0), *HUGE])


def item_length(choices: Choices, file: File) -> None:
    """An array of one string whose length is not that of its bytes."""
    raw = choices.pick(HUGE).to_bytes(8, "little" if file.order == "<" else "big")
    strings = [choices.pick(TEXTS) for _ in range(choices.pick([0, 1, 64, 80]))]
    # As items of a type that does not exist, bytes are written as they are.
    found = Entry(b"strings", ARRAY, strings, STRING, length=len(strings) + choices.pick([1, 2, 70]))
    file.entries.append(found)
    file.entries.append(Entry(raw, 0, 0, key_length=choices.pick(HUGE)))


def alignment(choices: Choices, file: File) -> None:
    file.alignment = 32
    file.entries = [found for found in file.entries if found.key != b"general.alignment"]
    kind = choices.pick([4, 4, 4, 5, 10, 6, 8])
    value = choices.pick([0, 24, 33, 1 << 20, 1 << 21, 3, 64, 1 << 31])
    file.entries.append(Entry(b"general.alignment", kind, b"32" if kind == STRING else min(value, (1 << 31) - 1)))


def name(choices: Choices, file: File) -> None:
    one_tensor(choices, file).name = choices.pick([*TEXTS, b"n" * 64, b"n" * 65535, b"n" * 65536])


def name_length(choices: Choices, file: File) -> None:
    one_tensor(choices, file).name_length = choices.pick(HUGE)


def name_twice(choices: Choices, file: File) -> None:
    found = one_tensor(choices, file)
    file.tensors.append(Tensor(found.name + choices.pick([b"", b"\0"]), found.kind, found.shape, found.data))


def n_dimensions(choices: Choices, file: File) -> None:
    found = one_tensor(choices, file)
    found.n_dimensions = choices.pick([0, len(found.shape) + 1, max(len(found.shape) - 1, 0), 8, 9, *HUGE]) % (1 << 32)


def shape(choices: Choices, file: File) -> None:
    """One extent becomes another, mostly such that the data no longer fits."""
    found = one_tensor(choices, file)
    extents = list(found.shape) or [1]
    extents[choices.below(len(extents))] = choices.pick([*HUGE, 0, 2, 32, 255, 1 << 29])
    found.shape = tuple(extents)


def no_elements(choices: Choices, file: File) -> None:
    """An extent of 0 beside huge ones."""
    found = one_tensor(choices, file)
    block, _ = BLOCKS.get(found.kind, (1, 1))
    found.shape = (*choices.some([0, 1 << 29, 1 << 30, 1 << 59, 1 << 62], 5), 0, choices.pick([block, 0, 1 << 30]))
    found.data = b""


def many_dimensions(choices: Choices, file: File) -> None:
    found = one_tensor(choices, file)
    found.shape = (1,) * choices.between(1, 9) + found.shape


def tensor_type(choices: Choices, file: File) -> None:
    one_tensor(choices, file).kind = choices.pick([4, 5, 31, 33, 36, 38, 43, 255, 1 << 31, 0xFFFFFFFF, *BLOCKS])


def offset(choices: Choices, file: File) -> None:
    one_tensor(choices, file).offset = choices.pick(HUGE)


def moved(choices: Choices, file: File) -> None:
    """An offset beside the right one: a gap, an overlap, or out of alignment."""
    one_tensor(choices, file).moved = choices.pick([1, -1, 8, 16, 32, -32, 64, 1 << 32, 1 << 63])


def swapped(choices: Choices, file: File) -> None:
    """Two tensors exchange their offsets."""
    if len(file.tensors) > 1:
        first, last = file.tensors[0], file.tensors[-1]
        last.offset, first.moved = 0, choices.pick([32, 64, 96])


def cut(choices: Choices, file: File) -> None:
    file.cut = choices.below(max(len(file.content()), 1)) + 1


def cut_little(choices: Choices, file: File) -> None:
    file.cut = choices.between(1, 40)


def longer(choices: Choices, file: File) -> None:
    """Bytes after the last tensor, which are allowed."""
    file.after = choices.bytes(choices.between(1, 200))


def split_key(choices: Choices, file: File) -> None:
    found = choices.pick([b"split.no", b"split.count", b"split.tensors.count", b"split.count\0"])
    file.entries = [each for each in file.entries if each.key != found] if choices.one_in(2) else file.entries
    kind = choices.pick([0, 1, 2, 3, 5, 10, 11, 6, 7, 8, 12])
    file.entries.append(Entry(found, kind, b"1" if kind == STRING else choices.pick([0, 1, 2, 3, 7, 127])))


def split_number(choices: Choices, file: File) -> None:
    """A split key of an integer type with a number that is out of its range, or of another shard."""
    found = choices.pick([b"split.no", b"split.count", b"split.tensors.count"])
    file.entries = [each for each in file.entries if each.key != found]
    kind, values = choices.pick(
        [(5, [-1, 65536, -(1 << 31)]), (11, [1 << 62, -1, 65535]), (10, [(1 << 64) - 1, 65536])]
    )
    file.entries.append(Entry(found, kind, choices.pick([*values, 0, 1, 2])))


def original_shape(choices: Choices, file: File) -> None:
    """A shape for `orig_shapes` that is right or wrong."""
    found = one_tensor(choices, file)
    extents = choices.pick([list(found.shape), [1, *found.shape], [*found.shape, 2], [0], [-1], [1 << 62, 0], [1] * 9])
    key_of = b"comfy.gguf.orig_shape." + found.name
    file.entries = [each for each in file.entries if each.key != key_of]
    kind = choices.pick([11, 11, 5, 12])
    most = 1 << 31 if kind == 5 else 1 << 63
    if all(-most <= extent < most for extent in extents):
        file.entries.append(Entry(key_of, ARRAY, extents, kind))


def more_entries(choices: Choices, file: File) -> None:
    """Many entries of all types; no rule is broken unless a key is there already."""
    for number in range(choices.below(30)):
        file.entries.append(entry(choices, f"{choices.pick(KEYS)}.{number}"))


def more_tensors(choices: Choices, file: File) -> None:
    for number in range(choices.below(30)):
        file.tensors.append(tensor(choices, f"{choices.pick(NAMES)}.{number}"))


BREAKS: list[Break] = [
    *(magic, version, order, n_tensors, n_entries, key, key_length, key_twice, value_type, item_type, value_length),
    *(item_length, alignment, name, name_length, name_twice, n_dimensions, shape, no_elements, many_dimensions),
    *(tensor_type, offset, moved, swapped, cut, cut_little, longer, split_key, split_number, original_shape),
    *(more_entries, more_tensors),
]


def broken(choices: Choices, file: File) -> File:
    """The file with no rule broken, or one, or two."""
    for _ in range(choices.pick([0, 1, 1, 1, 2, 2])):
        choices.pick(BREAKS)(choices, file)
    return file
