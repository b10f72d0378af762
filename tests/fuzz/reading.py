"""Targets for the reader: the bytes of a file, and files with broken rules.

A target takes bytes and returns what happened, in a word. Any exception that leaves it is a fault.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import specification
import structured
from breaks import broken
from choices import Choices
from common import check_said, folder, patched

import numba_dequant as nd
from numba_dequant.gguf import header as header_module
from numba_dequant.gguf import metadata as metadata_module
from numba_dequant.kernels import native

WINDOWS = [(1 << 18, 1 << 12), (64, 64), (256, 64), (1000, 77), (1 << 12, 1 << 12)]


@contextlib.contextmanager
def way(number: int) -> Iterator[None]:
    """One of the ways through the reader.

    Windows have other sizes, the compiled walk is there or not, and strings that are long stay in the file.
    """
    window, small_window = WINDOWS[number // 2 % len(WINDOWS)]
    with patched(
        (header_module, "WINDOW", window),
        (header_module, "SMALL_WINDOW", small_window),
        (metadata_module, "LONG_STRING", 1 << 20 if number % 3 else 20),
        (native, "is_loaded", lambda: bool(number % 2)),
    ):
        yield


def opened(source: Any, **options: Any) -> nd.Model | nd.NumbaDequantError:
    try:
        return nd.open(source, **options)
    except nd.GgufError as error:
        check_said(error)
        return error


def plain(value: Any) -> Any:
    """A value such that equal values are equal, also NaN and True beside 1."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return repr(value)


def assert_same(model: nd.Model, contents: specification.Contents, content: bytes) -> None:
    """The model says what the independent reader says."""
    assert {key: plain(value) for key, value in model.metadata.items()} == {
        key: plain(value) for key, value in contents.metadata.items()
    }
    assert list(model.metadata) == list(contents.metadata)
    assert list(model.tensors) == list(contents.tensors)
    for name, (kind, shape, start, n_bytes) in contents.tensors.items():
        tensor = model.tensors[name]
        found = tensor.format.ggml_id, tensor.shape, tensor.offset, tensor.n_bytes
        assert found == (kind, shape, start, n_bytes), name
        if start + n_bytes > len(content) and n_bytes:
            try:
                model.read(name)
            except nd.GgufError:
                continue
            raise AssertionError(f"{name} was read, but is not there")
        if contents.order == "<" and n_bytes < 1 << 20:
            assert model.read(name).tobytes() == content[start : start + n_bytes], name


def count_of_shards(contents: specification.Contents) -> int:
    return int(contents.metadata.get("split.count", 0))


def judged(content: bytes, *, allow_truncated: bool, offset: int = 0) -> specification.Contents | None:
    """What the rules say of one file that is not a shard; None if it must be refused."""
    try:
        contents = specification.read(content, offset, allow_truncated=allow_truncated)
    except specification.ViolationError:
        return None
    # A shard alone has no name, so that the others cannot be found.
    return contents if 0 <= count_of_shards(contents) <= 1 else None


def check(content: bytes, number: int, offset: int = 0) -> str:
    """The reader and the rules agree on a file, by one of the ways."""
    allow_truncated = bool(number & 64)
    contents = judged(content, allow_truncated=allow_truncated, offset=offset)
    with way(number):
        model = opened(bytearray(content), allow_truncated=allow_truncated, offset=offset)
        if isinstance(model, nd.NumbaDequantError):
            assert contents is None, f"refused, but no rule is broken: {model}"
            return "refused"
        assert contents is not None, "opened, but a rule is broken"
        assert_same(model, contents, content)
        shown = model.metadata.shown()
        assert sum(1 for _ in shown) == len(contents.metadata)
        if number & 128:
            check_use(model)
    return "opened"


def check_use(model: nd.Model) -> None:
    """Tables, original shapes, rows and values."""
    model._repr_html_()
    repr(model.tensors)
    for value in model.metadata.values():
        if isinstance(value, metadata_module.MetadataArray):
            check_array(value)
    for name, tensor in model.tensors.items():
        if tensor.n_elements > 1 << 16 or tensor.offset + tensor.n_bytes > tensor.source.stamp.size:
            continue
        with contextlib.suppress(nd.DeviceError):  # a shape without elements that is too large to hold
            values = model.load(name, "float32", device="reference")
            assert values.shape == tensor.shape
            if tensor.shape:
                assert model.load(name, "float32", device="reference", rows=slice(0, 0)).shape[0] == 0


def check_array(array: metadata_module.MetadataArray) -> None:
    """An array is a list: by item, by slice, and as a whole."""
    items = array.to_list()
    fresh = pickle.loads(pickle.dumps(array))  # which has read nothing so far
    fresh._items = None
    n = len(items)
    assert len(fresh) == n
    for part in (slice(1, None, 2), slice(None, None, -3), slice(5, 2), slice(-2, 1 << 70), slice(n // 2, n)):
        assert plain(fresh[part]) == plain(items[part]), part
    for index in (0, -1, n // 2, n, -n - 1, n - 1):
        if -n <= index < n:
            assert plain(fresh[index]) == plain(items[index]), index
        else:
            with contextlib.suppress(IndexError):
                raise AssertionError(f"item {index} of {n}: {fresh[index]!r}")
    assert plain(list(fresh)) == plain(items)
    assert plain(fresh[::-1]) == plain(list(reversed(array)))
    assert plain([*fresh, *fresh[:1]]) == plain(items + items[:1])


def header(data: bytes) -> str:
    """The bytes of a file as they are."""
    return check(data, zlib.crc32(data))


def files(data: bytes) -> str:
    """A file that breaks one rule or two."""
    choices = Choices(data)
    file = broken(choices, structured.valid(choices))
    content = file.content()
    number = choices.below(256)
    if choices.one_in(8):
        before = choices.bytes(choices.below(100))
        return check(before + content, number, len(before))
    if b"comfy.gguf" in content:
        check_original_shapes(content)
    if choices.one_in(16):
        check_path(content)
    if choices.one_in(16):
        check_gguf_py(content)
    return check(content, number)


def check_original_shapes(content: bytes) -> None:
    """With `orig_shapes` a file opens with the shapes that it names, or one of them is wrong."""
    model = opened(bytearray(content), orig_shapes=True)
    contents = judged(content, allow_truncated=False)
    if contents is None:
        assert not isinstance(model, nd.Model)
        return
    wrong, shapes = False, {name: found[1] for name, found in contents.tensors.items()}
    for name, shape in shapes.items():
        key = f"comfy.gguf.orig_shape.{name}"
        if key not in contents.metadata:
            continue
        extents = contents.metadata[key]
        if extents == []:
            return  # of which type its items are is not kept
        is_list = isinstance(extents, list) and len(extents) <= 8
        is_list = is_list and all(type(extent) is int and extent >= 0 for extent in extents)
        if not is_list or product(extents) != product(shape) or product(max(n, 1) for n in extents) >= 1 << 60:
            wrong = True
        else:
            shapes[name] = tuple(extents)
    if isinstance(model, nd.Model):
        assert {name: tensor.shape for name, tensor in model.tensors.items()} == shapes
    else:
        assert wrong, f"refused, but the shapes are right: {model}"


def product(extents: Any) -> int:
    total = 1
    for extent in extents:
        total *= extent
    return total


def check_path(content: bytes) -> None:
    """A path and memory give the same."""
    path = folder() / "path.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    found, other = opened(path), opened(bytearray(content))
    assert isinstance(found, nd.Model) == isinstance(other, nd.Model)
    if isinstance(found, nd.Model) and isinstance(other, nd.Model):
        assert plain(list(found.metadata.items())) == plain(list(other.metadata.items()))
        for name in found.tensors:
            assert found.read(name).tobytes() == other.read(name).tobytes()
    elif isinstance(found, nd.GgufError) and isinstance(other, nd.GgufError):
        assert (found.field, found.offset) == (other.field, other.offset)


def check_gguf_py(content: bytes) -> None:
    """What gguf-py reads too, is the same. It believes more than we do, and has limits of its own."""
    model = opened(bytearray(content))
    if not isinstance(model, nd.Model) or len(model.tensors) > 50:
        return
    path = folder() / "other.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = gguf.GGUFReader(path)
    except Exception:  # it refuses in many ways
        return
    if any("\0" in key for key in theirs.fields):
        return  # to us it is the key without NULs, which may be that of the alignment
    names = {tensor.name.rstrip("\0"): tensor for tensor in theirs.tensors}
    if len(names) != len(model.tensors):
        return
    for name, tensor in names.items():
        mine = model.tensors[name]
        if mine.format.name == "Q8_1" or not mine.shape:  # gguf-py: 40 bytes a block; no scalars
            continue
        assert mine.offset == tensor.data_offset
        assert mine.shape == tuple(int(extent) for extent in reversed(tensor.shape))
        if mine.byte_order == "little":
            assert model.read(name).tobytes() == np.ascontiguousarray(tensor.data).tobytes()
    for key, field in theirs.fields.items():
        if key.startswith("GGUF.") or key not in model.metadata:
            continue
        try:
            value = field.contents()
        except UnicodeDecodeError:
            continue
        if not isinstance(value, str) or "\0" not in value:
            assert same_value(model.metadata[key], value), key


def same_value(mine: Any, other: Any) -> bool:
    if isinstance(other, list):
        return len(mine) == len(other) and all(map(same_value, mine, other))
    # It takes a bool as NumPy does, and a number as Python's.
    return repr(mine) == repr(other) or bool(mine == other)
