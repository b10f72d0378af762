"""`accelerate("gguf")`: values, fields and errors are those of gguf-py, compared with gguf-py itself."""

import copy
import pickle
from collections import OrderedDict
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
from blocks import DATA, QUANTIZED, assert_same_bits, random_blocks
from gguf_bytes import ARRAY, BOOL, FLOAT32, INT16, STRING, UINT8, UINT32, entry, floats, gguf, text, value

import numba_dequant as nd

gguf_py = pytest.importorskip("gguf")

if np.lib.NumpyVersion(np.__version__) >= "2.0.0" and version("gguf").startswith("0.10."):
    pytest.skip("the reader of this version of gguf needs NumPy 1", allow_module_level=True)

HANGS = "array_len_huge"  # an array of 2**62 items, which gguf-py makes one by one
FILES = sorted(path for path in (DATA / "gguf").glob("*/*.gguf") if path.stem != HANGS)
Types = gguf_py.GGMLQuantizationType
THEIRS = SimpleNamespace(reader=gguf_py.GGUFReader, dequantize=gguf_py.dequantize)
"""The originals, where `accelerate` does not find them: it replaces them in this module too."""
KNOWN = [name for name in QUANTIZED if getattr(Types, name, None) in gguf_py.quants._type_traits]


@pytest.fixture
def accelerated():
    with nd.accelerate("gguf"):
        yield


# dequantize


def data_and_values(name):
    data = random_blocks(name, 6 * 32).reshape(2, 3, -1)
    with np.errstate(all="ignore"):
        return data, THEIRS.dequantize(data, Types[name])


@pytest.mark.parametrize("name", [*KNOWN, "BF16"])
def test_every_format_has_the_values_of_gguf_py(name):
    """On the device "reference", which compiles nothing; other tests compare the devices."""
    data, expected = data_and_values(name)
    assert_same_bits(nd.dequantize(data, name, "float32", shape=expected.shape, device="reference"), expected)


@pytest.mark.parametrize("name", ["BF16", "Q4_0", "Q4_K", "IQ1_S"])
def test_values_are_those_of_gguf_py(accelerated, name):
    data, expected = data_and_values(name)
    assert_same_bits(gguf_py.dequantize(data, Types[name]), expected)


def test_every_function_is_replaced(accelerated):
    assert gguf_py.dequantize is gguf_py.quants.dequantize is not THEIRS.dequantize
    assert gguf_py.dequantize.__module__ == "numba_dequant.integrations.gguf"
    assert gguf_py.GGUFReader is gguf_py.gguf_reader.GGUFReader is not THEIRS.reader
    assert issubclass(gguf_py.GGUFReader, THEIRS.reader)


def test_types_that_gguf_py_does_not_dequantize(accelerated):
    """Q2_0 has no member in gguf-py 0.19; Q8_K has one, but no function."""
    for name, qtype in (("Q2_0", 42), ("Q8_K", Types.Q8_K)):
        data = random_blocks(name, 6).reshape(3, -1)
        found = gguf_py.dequantize(data, qtype)
        expected = nd.dequantize(data, name, "float32", device="reference").reshape(3, -1)
        assert_same_bits(found, expected)


def test_f32_stays_a_view_and_f16_is_converted(accelerated):
    data = np.arange(8, dtype=np.float32)
    assert gguf_py.dequantize(data, Types.F32).base is data
    assert_same_bits(gguf_py.dequantize(data.astype(np.float16).view(np.uint8), Types.F16), data)


def test_strided_data_and_memory_maps(accelerated, tmp_path):
    data = random_blocks("Q4_0", 24).reshape(6, -1)
    data.tofile(tmp_path / "blocks")
    mapped = np.memmap(tmp_path / "blocks", mode="r").reshape(6, -1)
    for each in (
        data[::2],
        data[:, :36],
        data[::-1],
        mapped,
        mapped[1::2],
        data.view(np.int8),
        np.asfortranarray(data),
    ):
        found = gguf_py.dequantize(each, Types.Q4_0)
        assert type(found) is np.ndarray
        assert_same_bits(found, THEIRS.dequantize(np.array(each), Types.Q4_0))


@pytest.mark.parametrize(
    ("data", "qtype"),
    [
        (np.zeros((2, 17), np.uint8), Types.Q4_0),  # no whole block
        (np.zeros((2, 18), np.uint16), Types.Q4_0),  # not bytes
        (np.zeros((3, 0), np.uint8), Types.Q4_0),
        (np.zeros((0, 18), np.uint8), Types.Q4_0),
        (np.zeros((), np.uint8), Types.Q4_0),
        (np.zeros((2, 8), np.uint8), Types.I64),
        (np.zeros((2, 8), np.uint8), Types.F64),
        (np.zeros((2, 360), np.uint8), Types.Q8_1),  # 40 bytes for gguf-py, 36 for GGML
        (np.zeros((2, 18), np.uint8), "no type"),
        (b"bytes", Types.Q4_0),
    ],
)
def test_what_gguf_py_refuses(accelerated, data, qtype):
    """The same exception, or, for what gguf-py accepts, the same result."""

    def outcome(function):
        try:
            return function(data, qtype).shape
        except Exception as error:
            return type(error), str(error)

    assert outcome(gguf_py.dequantize) == outcome(THEIRS.dequantize)


def test_lazy_tensors_are_gguf_pys(accelerated):
    lazy = gguf_py.LazyNumpyTensor.from_eager(random_blocks("Q4_0", 2).reshape(1, -1))
    found = gguf_py.dequantize(lazy, Types.Q4_0)
    assert type(found) is type(lazy)


# GGUFReader


def described(array):
    """What there is to compare of an array of the reader."""
    return type(array), array.dtype.str, array.shape, array.tobytes(), getattr(array, "mode", None)


def described_field(field):
    # Parts of ours are plain arrays that share the memory map.
    parts = [(part.dtype.str, part.shape, part.tobytes(), part.flags.writeable) for part in field.parts]
    # Whoever wrote a string that is not UTF-8 gets an error from both.
    try:
        contents = field.contents() if hasattr(field, "contents") else None
    except UnicodeDecodeError as error:
        contents = str(error)
    return type(field), field.offset, field.name, parts, field.data, field.types, repr(contents)


def described_reader(reader):
    fields = {name: described_field(reader.fields[name]) for name in reader.fields}
    tensors = [
        (each[:2], described(each.shape), each[3:6], described(each.data), described_field(each.field))
        for each in reader.tensors
    ]
    order = getattr(reader, "endianess", None), reader.byte_order
    return list(fields.items()), tensors, reader.alignment, reader.data_offset, order, described(reader.data)


def outcome(reader, path, mode="r"):
    try:
        return described_reader(reader(path, mode))
    except Exception as error:
        return type(error), str(error)


def hand_made():
    words = [value("words", STRING, [f"w{i}" for i in range(100)]), value("n", UINT32, 7)]
    nested = entry("nested", ARRAY, (9).to_bytes(4, "little") + (1).to_bytes(8, "little") + bytes(12))
    return {
        "plain": gguf([("a", *floats(4))], [*words, value("b", BOOL, [True, False]), value("f", FLOAT32, 0.5)]),
        "big-endian": gguf([("a", *floats(4))], [value("s", STRING, ["x", "yz"] * 50, ">")], ">"),
        "empty": gguf(entries=[value("none", STRING, []), value("zero", INT16, [])]),
        "array of arrays": gguf(entries=[*words, nested]),
        "twice": gguf(entries=[*words, *words]),
        "not UTF-8": gguf(entries=[value("s", STRING, b"\xff\xfe"), value("l", STRING, [b"\xff"])]),
        "key is not UTF-8": gguf(entries=[text(b"\xff") + (0).to_bytes(4, "little") + b"\1"]),
        "NULs": gguf(entries=[value(b"key\0", STRING, b"text\0"), value("", UINT8, 1)]),
        "own name": gguf(entries=[value("GGUF.version", UINT32, 1)]),
        "unknown type": gguf(entries=[*words, entry("k", 77, bytes(4))]),
        "long key": gguf(entries=[value("k" * 70000, UINT8, 1)]),
        "alignment 64": gguf([("a", *floats(4))], [value("general.alignment", UINT32, 64)], alignment=64),
        "alignment 0": gguf([("a", *floats(4))], [value("general.alignment", UINT32, 0)]),
        "alignment of a wrong type": gguf([("a", *floats(4))], [value("general.alignment", UINT8, 32)]),
        "truncated": gguf(entries=words)[:900],
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_are_read_or_refused_as_by_gguf_py(accelerated, path):
    assert outcome(gguf_py.GGUFReader, path) == outcome(THEIRS.reader, path)


@pytest.mark.parametrize("name", hand_made())
def test_odd_files_are_read_or_refused_as_by_gguf_py(accelerated, tmp_path, name):
    path = tmp_path / "file.gguf"
    path.write_bytes(hand_made()[name])
    for mode in ("r", "r+", "c"):
        assert outcome(gguf_py.GGUFReader, path, mode) == outcome(THEIRS.reader, path, mode)


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.gguf"
    path.write_bytes(hand_made()["plain"])
    return path


NAMES = ["GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "words", "n", "b", "f"]


def is_made(fields, name):
    """Whether a field has been made, without making it."""
    return isinstance(OrderedDict.__getitem__(fields, name), gguf_py.gguf_reader.ReaderField)


def test_a_field_is_made_when_it_is_looked_at(accelerated, plain):
    fields = gguf_py.GGUFReader(plain).fields
    assert list(fields) == list(fields.keys()) == NAMES
    assert len(fields) == 7
    assert "words" in fields
    assert not any(is_made(fields, name) for name in NAMES[3:])
    assert fields["n"].parts[-1][0] == 7
    assert [name for name in NAMES[3:] if is_made(fields, name)] == ["n"]
    assert fields["n"] is fields.get("n") is fields["n"]
    assert fields.get("nothing") is None
    assert fields.get("nothing", 3) == 3
    with pytest.raises(KeyError):
        fields["nothing"]


def test_fields_of_a_big_endian_file_are_made_when_they_are_looked_at(accelerated, tmp_path):
    path = tmp_path / "big.gguf"
    path.write_bytes(hand_made()["big-endian"])
    fields = gguf_py.GGUFReader(path).fields
    assert not is_made(fields, "s")
    assert bytes(fields["s"].parts[fields["s"].data[1]]) == b"yz"


def test_fields_are_compared_by_their_values(accelerated, tmp_path):
    for number in (7, 8):
        (tmp_path / f"{number}.gguf").write_bytes(gguf(entries=[value("n", UINT32, number)]))
    first, second, same = (gguf_py.GGUFReader(tmp_path / f"{number}.gguf").fields for number in (7, 8, 7))
    assert first != second
    assert not first == second  # noqa: SIM201
    assert first == same


def test_pickled_fields_do_not_hold_the_file(accelerated, plain):
    restored = pickle.loads(pickle.dumps(gguf_py.GGUFReader(plain).fields))
    assert type(restored) is OrderedDict
    assert list(restored) == NAMES


def test_fields_may_be_looked_at_while_they_are_iterated(accelerated, plain):
    fields = gguf_py.GGUFReader(plain).fields
    assert [fields[name].name for name in fields] == NAMES


@pytest.mark.parametrize(
    "whole",
    [
        lambda fields: list(fields.values()),
        lambda fields: [field for _, field in fields.items()],
        lambda fields: [field for _, field in reversed(fields.items())][::-1],
        lambda fields: list(dict(fields).values()),
        lambda fields: list({**fields}.values()),
        lambda fields: list(OrderedDict(fields).values()),
        lambda fields: list(fields.copy().values()),
        lambda fields: list(copy.copy(fields).values()),
        lambda fields: list((fields | {}).values()),
        lambda fields: list(({} | fields).values()),
        lambda fields: list(pickle.loads(pickle.dumps(fields)).values()),
        lambda fields: [fields.setdefault(name) for name in NAMES],
        lambda fields: [fields.pop(name) for name in NAMES],
        lambda fields: [fields.popitem(last=False)[1] for _ in NAMES],
    ],
)
def test_no_way_shows_a_field_that_is_not_made(accelerated, plain, whole):
    found = whole(gguf_py.GGUFReader(plain).fields)
    assert all(type(field) is gguf_py.gguf_reader.ReaderField for field in found)
    assert [field.name for field in found] == NAMES


def test_fields_are_an_ordered_dict(accelerated, plain):
    fields = gguf_py.GGUFReader(plain).fields
    assert isinstance(fields, OrderedDict)
    assert fields == fields.copy()
    assert fields != OrderedDict()
    assert repr(fields) == repr(fields.copy())
    fields["own"] = 3
    del fields["n"]
    fields.move_to_end("words")
    assert list(fields) == ["GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "b", "f", "own", "words"]


def test_parts_write_to_the_file(accelerated, plain):
    reader = gguf_py.GGUFReader(plain, "r+")
    reader.get_field("n").parts[-1][0] = 99
    reader.get_tensor(0).data[0] = 5
    reader.data.flush()
    assert nd.open(plain).metadata["n"] == 99
    assert nd.open(plain).read("a").view(np.float32)[0] == 5


def test_a_subclass_that_wants_to_see_each_field_does(accelerated, plain):
    class Counting(gguf_py.GGUFReader):
        seen = 0

        def _push_field(self, field, skip_sum=False):
            self.seen += 1
            return super()._push_field(field, skip_sum)

    class Named(gguf_py.GGUFReader):
        name = "a subclass that changes nothing"

    assert Counting(plain).seen == 7
    assert described_reader(Counting(plain)) == described_reader(THEIRS.reader(plain))
    assert not is_made(Named(plain).fields, "words")


def test_a_reader_outlives_accelerate(plain):
    with nd.accelerate("gguf"):
        reader = gguf_py.GGUFReader(plain)
    assert gguf_py.GGUFReader is THEIRS.reader
    assert gguf_py.dequantize is gguf_py.quants.dequantize is THEIRS.dequantize
    assert described_reader(reader) == described_reader(THEIRS.reader(plain))
    assert isinstance(reader, THEIRS.reader)
