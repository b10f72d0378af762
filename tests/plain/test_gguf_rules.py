"""What the reader makes of headers that real programs have written, and of what no program should."""

import struct

import gguf
import numpy as np
import pytest
from gguf_bytes import (
    BOOL,
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    counted,
    entry,
    floats,
    value,
)
from gguf_bytes import gguf as gguf_file

import numba_dequant as nd
from numba_dequant.gguf.file import open_gguf

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def load(model, name):
    return model.load(name, "float32", device="reference")


@pytest.mark.parametrize("length", [63, 64, 77, 127, 128, 65535])
def test_names_of_any_length_load(length):
    name = "model.diffusion_model.".ljust(length, "x")[:length]
    np.testing.assert_array_equal(load(nd.open(gguf_file([(name, *floats(2, 3))])), name), counted(2, 3))


def test_a_name_longer_than_any_key_is_refused():
    with pytest.raises(nd.GgufError, match="at byte 24: name of tensor 0 has 65536 bytes; at most 65535 are allowed"):
        nd.open(gguf_file([("x" * 65536, *floats(1))]))


@pytest.mark.parametrize("n_dimensions", range(9))
def test_up_to_8_dimensions_load(n_dimensions):
    shape = (2, 1, 3, 2, 1, 1, 2, 2)[:n_dimensions]
    for order in "<>":
        raw = counted(*shape).astype(f"{order}f4").tobytes()
        model = nd.open(gguf_file([("t", shape, "F32", raw)], order=order))
        assert model.tensors["t"].shape == shape
        np.testing.assert_array_equal(load(model, "t"), counted(*shape))


def test_a_9th_dimension_is_refused():
    with pytest.raises(nd.GgufError, match="at byte 33: tensor 't' has 9 dimensions; at most 8 are allowed"):
        nd.open(gguf_file([("t", (1,) * 9, "F32", bytes(4))]))


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_the_smallest_entry_of_a_tensor_may_be_the_end_of_a_file(order):
    """A count that the rest of a file cannot hold is refused. This one fills it to the last byte."""
    start = b"GGUF" + struct.pack(f"{order}IQQ", 3, 1, 0)
    entry = struct.pack(f"{order}QIIQ", 0, 0, 0, 0)
    assert nd.open(start + entry, allow_truncated=True).tensors[""].shape == ()


def test_nuls_at_the_end_of_keys_strings_and_names_are_cut_off():
    entries = [value("general.name\0", STRING, "LLaMA v2\0\0"), value("tokens\0\0", STRING, ["a\0", "\0", "b\0c"])]
    model = nd.open(gguf_file([("token_embd.weight\0", *floats(4))], entries))
    assert dict(model.metadata) == {"general.name": "LLaMA v2", "tokens": ["a\0", "\0", "b\0c"]}
    np.testing.assert_array_equal(load(model, "token_embd.weight"), counted(4))


def test_split_keys_and_the_alignment_may_end_in_a_nul():
    entries = [value("general.alignment\0", UINT32, 64), value("split.count\0", UINT16, 1)]
    model = nd.open(gguf_file([("a", *floats(1)), ("b", *floats(2))], entries, alignment=64))
    np.testing.assert_array_equal(load(model, "b"), counted(2))


@pytest.mark.parametrize("alignment", [1, 2, 1 << 20])
def test_every_power_of_two_up_to_1_mib_is_an_alignment(alignment):
    entries = [value("general.alignment", UINT32, alignment)]
    model = nd.open(gguf_file([("a", *floats(3)), ("b", *floats(2))], entries, alignment=alignment))
    assert model.tensors["b"].offset - model.tensors["a"].offset == max(alignment, 12)
    np.testing.assert_array_equal(load(model, "b"), counted(2))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("order", "byte_order"), [("<", "little"), (">", "big")])
def test_a_file_has_the_version_the_byte_order_and_the_alignment_of_its_header(version, order, byte_order):
    entries = [value("general.alignment", UINT32, 64, order)]
    file = open_gguf(gguf_file([("t", *floats(2))], entries, order=order, version=version, alignment=64))
    assert (file.version, file.byte_order, file.alignment) == (version, byte_order, 64)
    assert (file.path, file.shards, file.missing_shards) == ("<memory>", ("<memory>",), ())
    assert open_gguf(gguf_file()).alignment == 32
    with pytest.raises(AttributeError):
        file.path = "another"


def test_a_header_may_end_where_the_file_ends():
    """The shortest tensor: a scalar without a name. Its data is missing."""
    file = gguf_file([("", (), "F32", b"")])[: 24 + 24]
    (tensor,) = nd.open(file, allow_truncated=True).tensors.values()
    assert (tensor.name, tensor.shape) == ("", ())
    for content in (gguf_file()[:24], gguf_file()):
        assert len(nd.open(content, limits=nd.Limits(header_bytes=24)).tensors) == 0


def test_names_that_are_equal_once_nuls_are_cut_off_are_refused():
    with pytest.raises(nd.GgufError, match="tensor name 't' appears twice"):
        nd.open(gguf_file([("t", *floats(1)), ("t\0", *floats(1))]))
    with pytest.raises(nd.GgufError, match="metadata key 'k' appears twice"):
        nd.open(gguf_file(entries=[value("k\0", UINT8, 1), value("k", UINT8, 2)]))


def test_a_nul_within_a_key_or_a_string_stays_and_within_a_name_is_refused():
    assert dict(nd.open(gguf_file(entries=[value("k\0k", STRING, "a\0b")])).metadata) == {"k\0k": "a\0b"}
    with pytest.raises(nd.GgufError, match=r"tensor name 'a\\x00b' contains a NUL"):
        nd.open(gguf_file([("a\0b", *floats(1))]))


@pytest.mark.parametrize("key", ["", "\0", "\0\0"])
def test_an_empty_key_is_refused(key):
    with pytest.raises(nd.GgufError, match="metadata key 1 is empty"):
        nd.open(gguf_file(entries=[value("k", UINT8, 1), value(key, UINT8, 1)]))


@pytest.mark.parametrize("stored", [0, 1, 2, 127, 128, 255])
def test_a_bool_is_true_unless_it_is_0_alone_and_in_arrays(stored):
    metadata = nd.open(gguf_file(entries=[value("one", BOOL, stored), value("many", BOOL, [stored, 0])])).metadata
    assert metadata["one"] is bool(stored)
    assert [metadata["many"][0], *metadata["many"]] == [bool(stored), bool(stored), False]
    assert metadata["many"][0] is bool(stored)


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (b"/data/\xe6\xa8\xa1\xe5\x9e", f"/data/模{UNKNOWN}"),
        ("C:/modèles".encode("cp1252"), f"C:/mod{UNKNOWN}les"),
        (b"\xed\xa0\x80", UNKNOWN * 3),
        (b"a\xff\0", f"a{UNKNOWN}"),
    ],
    ids=["cut within a character", "cp1252", "a surrogate", "before a NUL"],
)
def test_a_string_that_is_not_utf8_costs_nothing_else(stored, shown):
    entries = [value("path", STRING, stored), value("tokens", STRING, ["good", stored.rstrip(b"\0")])]
    model = nd.open(gguf_file([("t", *floats(2))], entries))
    assert dict(model.metadata) == {"path": shown, "tokens": ["good", shown]}
    model._repr_html_().encode()
    np.testing.assert_array_equal(load(model, "t"), counted(2))


@pytest.mark.parametrize("key", [b"k\xff", b"\xff"])
def test_a_key_or_a_name_that_is_not_utf8_is_refused(key):
    at = 24 + 8 + key.index(b"\xff")
    with pytest.raises(nd.GgufError, match=f"at byte {at}: metadata key 0 is not valid UTF-8: byte 0xff"):
        nd.open(gguf_file(entries=[entry(key, UINT8, b"\1")]))
    with pytest.raises(nd.GgufError, match=f"at byte {at}: name of tensor 0 is not valid UTF-8: byte 0xff"):
        nd.open(gguf_file([(key, *floats(1))]))


def test_only_three_split_keys_mean_anything():
    entries = [
        value("split.name", STRING, "train"),
        value("split.sizes", INT32, [1, 2]),
        value("split.ratio", FLOAT32, 0.5),
        value("split.no.more", BOOL, 1),
        value("split.", STRING, "x"),
    ]
    assert nd.open(gguf_file(entries=entries)).metadata["split.name"] == "train"


@pytest.mark.parametrize("key", ["split.no", "split.count", "split.tensors.count"])
@pytest.mark.parametrize(("kind", "content"), [(STRING, "1"), (FLOAT32, 1.0), (BOOL, 1), (UINT8, [1])])
def test_the_three_split_keys_are_integers(key, kind, content):
    with pytest.raises(
        nd.GgufError, match=f"at byte {32 + len(key)}: {key} is a value of type .*; it must be an integer"
    ):
        nd.open(gguf_file(entries=[value(key, kind, content)]))


@pytest.mark.parametrize(
    "shape",
    [(0, 1 << 62), (1 << 62, 0), (0, 4, 1 << 62), (0, 1 << 30, 1 << 30), (1 << 60,), (0, (1 << 64) - 1), (0, 1 << 60)],
)
def test_shapes_that_numpy_cannot_hold_are_refused_when_opened(shape):
    with pytest.raises(nd.GgufError, match=r"at byte 37: tensor 't' has shape .*; use fewer than 2\*\*60"):
        nd.open(gguf_file([("t", shape, "F32", b"")]))


@pytest.mark.parametrize("kind", ["F32", "I64", "F64", "Q8_0", "IQ1_S"])
@pytest.mark.parametrize("shape", [(0, (1 << 60) - 256), (0, 0, 256), (1 << 29, 0, 1 << 30)])
def test_shapes_without_elements_load_where_numpy_holds_them(kind, shape):
    model = nd.open(gguf_file([("t", shape, kind, b"")]))
    for device in ("cpu", "reference"):
        assert model.load("t", "float32", device=device).shape == shape
        assert model.load_all(device=device)["t"].shape == shape


def test_numbers_and_arrays_of_every_type_are_those_of_gguf_py(tmp_path):
    for order, endianess in (("<", gguf.GGUFEndian.LITTLE), (">", gguf.GGUFEndian.BIG)):
        path = tmp_path / "types.gguf"
        writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
        writer.add_array("ints", [-1, 0, 7])
        writer.add_array("floats", [0.5, -2.0])
        writer.add_array("strings", ["ü", "", "token"])
        writer.add_bool("yes", True)
        writer.add_int64("low", -(1 << 63))
        writer.add_uint64("high", (1 << 64) - 1)
        writer.add_float64("pi", 3.141592653589793)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        metadata = nd.open(path).metadata
        expected = {"ints": [-1, 0, 7], "floats": [0.5, -2.0], "strings": ["ü", "", "token"], "yes": True}
        expected |= {"low": -(1 << 63), "high": (1 << 64) - 1, "pi": 3.141592653589793}
        assert {key: metadata[key] for key in expected} == expected, order


NUMBERS = {
    UINT8: (0, 1, 255),
    INT8: (-128, 1, 127),
    UINT16: (0, 1, 65535),
    INT16: (-32768, 1, 32767),
    UINT32: (0, 1, 2**32 - 1),
    INT32: (-(2**31), 1, 2**31 - 1),
    UINT64: (0, 1, 2**64 - 1),
    INT64: (-(2**63), 1, 2**63 - 1),
    FLOAT32: (-0.5, 1.0, 2.0**100),
    FLOAT64: (-0.1, 1.0, 1e300),
}


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_the_extreme_numbers_of_every_type_are_read(kind, order):
    entries = [value(f"n{at}", kind, number, order) for at, number in enumerate(NUMBERS[kind])]
    entries += [value("a", kind, NUMBERS[kind], order)]
    metadata = nd.open(gguf_file(entries=entries, order=order)).metadata
    assert [metadata[f"n{at}"] for at in range(3)] == metadata["a"].to_list() == list(NUMBERS[kind])
    assert {type(metadata["n1"]), type(metadata["a"][1])} == {type(NUMBERS[kind][1])}


@pytest.mark.parametrize("kind", [kind for kind in NUMBERS if kind not in (FLOAT32, FLOAT64)])
def test_integers_are_integers_whatever_their_type(kind):
    keys = ("split.count", "split.no", "split.tensors.count")
    entries = [value(key, kind, 1) for key in keys] + [value("comfy.gguf.orig_shape.t", kind, [1, 1])]
    model = nd.open(gguf_file([("t", *floats(1))], entries), orig_shapes=True)
    assert model.tensors["t"].shape == (1, 1)


def test_an_array_of_more_items_than_ggml_takes_is_refused(tmp_path):
    path = tmp_path / "many.gguf"
    for kind, item in ((UINT8, 1), (STRING, 8), (INT64, 8)):
        head = gguf_file(entries=[entry("k", 9, struct.pack("<IQ", kind, (1 << 26) + 1))])[:49]
        path.write_bytes(head)
        with path.open("r+b") as file:
            file.truncate(49 + ((1 << 26) + 1) * item)
        with pytest.raises(nd.GgufError, match="at byte 41: metadata 'k' has 67108865 items; at most 67108864"):
            nd.open(path)


@pytest.mark.parametrize(
    ("ggml_id", "message"),
    [
        (36, "I2_S of Microsoft's BitNet"),
        (37, "I8_S of Microsoft's BitNet"),
        (38, "TL1 of Microsoft's BitNet"),
        (36, "in files of 2024, IQ4_NL_4_4, which GGML has removed"),
        (37, "in files of 2024, IQ4_NL_4_8, which GGML has removed"),
        (38, "in files of 2024, IQ4_NL_8_8, which GGML has removed"),
        (4, "Q4_2, a format that GGML has removed"),
        (5, "Q4_3, a format that GGML has removed"),
        (31, "Q4_0_4_4, a format that GGML has removed"),
        (32, "Q4_0_4_8, a format that GGML has removed"),
        (33, "Q4_0_8_8, a format that GGML has removed"),
        (97, "Q8_0_X4 of ik_llama.cpp"),
        (99, "Q8_2_X4 of ik_llama.cpp"),
        (133, "Q6_0 of ik_llama.cpp"),
        (137, "IQ2_K of ik_llama.cpp"),
        (144, "IQ4_KS of ik_llama.cpp"),
        (156, "IQ3_KS of ik_llama.cpp"),
        (158, "IQ1_KT of ik_llama.cpp"),
        (202, "Q4_0_R8 of ik_llama.cpp"),
        (206, "Q5_0_R4 of ik_llama.cpp"),
        (208, "Q8_0_R8 of ik_llama.cpp"),
        (214, "Q6_K_R4 of ik_llama.cpp"),
        (223, "IQ4_XS_R8 of ik_llama.cpp"),
        (230, "BF16_R16 of ik_llama.cpp"),
        (233, "Q6_0_R4 of ik_llama.cpp"),
        (335, "IQ2_BN_R4 of ik_llama.cpp"),
        (340, "IQ5_K_R4 of ik_llama.cpp"),
        (344, "IQ4_KS_R4 of ik_llama.cpp"),
        (353, "MXFP4_R8 of ik_llama.cpp"),
        (399, "Q8_K_R8 of ik_llama.cpp"),
        (159, "unknown ggml type 159; install a newer numba_dequant"),
        (400, "unknown ggml type 400"),
    ],
)
def test_an_unknown_type_says_whose_it_is(ggml_id, message):
    with pytest.raises(nd.GgufError, match="at byte 45: tensor 't' has an unknown ggml type") as caught:
        nd.open(gguf_file([("t", (256,), ggml_id, bytes(200))]))
    assert message in str(caught.value)


def test_looking_for_a_name_among_many_is_quick_and_get_suggests_nothing(monkeypatch):
    import difflib

    real, compared = difflib.get_close_matches, []

    def get_close_matches(name, names, **options):
        compared.extend((name, *names))
        return real(name, names, **options)

    monkeypatch.setattr(difflib, "get_close_matches", get_close_matches)
    names = [f"{'ab' * 27}{number:08x}" for number in range(20_000)]
    tensors = nd.open(gguf_file([(name, (0,), "I8", b"") for name in names])).tensors
    with pytest.raises(nd.TensorNotFoundError, match=f"did you mean .*{names[77]}"):
        tensors[names[77][:20] + "c" + names[77][21:]]
    with pytest.raises(nd.TensorNotFoundError, match=f"did you mean .*{names[19_977][:60]}"):
        tensors[names[19_977][:-1]]
    with pytest.raises(nd.TensorNotFoundError):
        tensors["x" * 60_000]
    assert len(compared) < 2000
    assert max(map(len, compared)) < 1000
    monkeypatch.setattr(difflib, "get_close_matches", None)
    assert tensors.get("nope") is None
    assert tensors.get("nope", 5) == 5
    assert tensors.get(names[3]).name == names[3]
    assert ["nope"] not in tensors
    with pytest.raises(nd.TensorNotFoundError, match=r"there is no tensor \['nope'\]"):
        tensors[["nope"]]
