import re
import time

import gguf
import numpy as np
import pytest
from blocks import (
    DECODED,
    DTYPES,
    GOLDEN,
    QUANTIZED,
    SCALES_OF_ONE_BYTE,
    assert_same_bits,
    every_scale,
    golden,
    random_blocks,
    rounded,
)

import numba_dequant as nd
from numba_dequant.backends import reference
from numba_dequant.format import Format, block_layout
from numba_dequant.formats import REMOVED_IDS, format_with_id, plain, register
from numba_dequant.kernels import intrinsics_cpu

# What gguf-py 0.19 has wrong (Q8_1) or not at all: GGML's own numbers.
GGML_SIZES = {"Q8_1": (32, 36), "Q2_0": (64, 18)}
IN_GGUF_PY = {kind.name for kind in gguf.quants._type_traits} & set(QUANTIZED)


def units(data, source):
    return data.view(f"u{source.alignment}")


@pytest.mark.parametrize("name", nd.FORMATS)
def test_layout_has_ggml_s_size(name):
    source = nd.FORMATS[name]
    if name in GGML_SIZES:
        expected = GGML_SIZES[name]
    elif name in gguf.GGMLQuantizationType.__members__:
        kind = gguf.GGMLQuantizationType[name]
        assert kind.value == source.ggml_id
        expected = gguf.GGML_QUANT_SIZES[kind]
    else:
        data, values = golden(name)
        expected = (values.shape[1], data.shape[1])
    assert (source.block_size, source.type_size) == expected


@pytest.mark.parametrize("name", nd.FORMATS)
def test_documentation_begins_with_the_formula(name):
    source = nd.FORMATS[name]
    if source.decode is None:
        heading, _, costs = plain.__doc__.partition(": x = ")
        cost = dict(zip(heading.split(", "), re.findall("[0-9]+", costs), strict=True))[name]
        assert cost == f"{source.bits_per_weight:g}"
        return
    line = source.description.splitlines()[0]
    weights = f"{source.block_size} weights.*, " if source.block_size > 1 else ""
    assert re.fullmatch(f"{name}: x = .+; {weights}{source.bits_per_weight:g} bits per weight\\.", line), line


def test_formats_are_ordered_by_id():
    ids = [source.ggml_id for source in nd.FORMATS.values()]
    assert ids == sorted(set(ids))


def test_golden_vectors_cover_every_quantized_format():
    assert set(QUANTIZED) <= set(GOLDEN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, device, dtype):
    data, values = golden(name)
    found = nd.dequantize(data, name, dtype, shape=values.shape, device=device)
    assert_same_bits(found, rounded(values, dtype))


@pytest.mark.parametrize("name", GOLDEN)
def test_decode_in_plain_python(name):
    source = nd.FORMATS[name]
    data, values = golden(name)
    data, values = data.reshape(-1), values.reshape(-1)
    step = max(source.block_size, 8)
    n_steps = min(values.size // step, 40)
    block = units(data.copy(), source)  # of just the alignment that the kernels promise: the loads check it
    with np.errstate(all="ignore"):
        runs = [
            source.decode(block, index * step // source.block_size * source.type_size, run)
            for index in range(n_steps)
            for run in range(step // 8)
        ]
    assert_same_bits(np.concatenate(runs), values[: n_steps * step])


def test_decode_of_stored_floats_in_plain_python():
    values = np.float32([0, -0.0, 1.5, -3e38, np.inf, -np.inf, 1e-45, 7])
    assert_same_bits(nd.FORMATS["F32"].decode(np.concatenate([values, values]).view(np.uint32), 32, 0), values)


def test_every_byte_of_base_3_digits_is_decoded():
    source = nd.FORMATS["TQ1_0"]
    data = np.repeat(np.arange(256, dtype=np.uint8)[:, None], source.type_size, axis=1)
    data.view(source.layout)["d"] = 1
    block = units(data.reshape(-1).copy(), source)
    found = [source.decode(block, number * source.type_size, run) for number in range(256) for run in range(32)]
    assert_same_bits(np.concatenate(found), nd.dequantize(data, "TQ1_0", "float32", device="reference"))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_the_reference_gives_a_row_for_each_block(name, n_blocks):
    source = nd.FORMATS[name]
    with np.errstate(all="ignore"):
        values = source.dequantize(random_blocks(name, n_blocks).view(source.layout))
    assert (values.shape, values.dtype) == ((n_blocks, source.block_size), np.float32)


@pytest.mark.parametrize("name", SCALES_OF_ONE_BYTE)
def test_every_scale_is_decoded(name):
    source, data = nd.FORMATS[name], every_scale(name)
    with np.errstate(all="ignore"):
        found = [
            source.decode(units(data, source), at, run)
            for at in range(0, data.size, source.type_size)
            for run in range(source.block_size // 8)
        ]
    assert_same_bits(np.concatenate(found), nd.dequantize(data, name, "float32", device="reference"))


def test_gguf_py_knows_as_many_formats_as_ever():
    assert len(IN_GGUF_PY) == 23


@pytest.mark.parametrize("name", sorted(IN_GGUF_PY))
def test_gguf_py_agrees(name):
    data = random_blocks(name, 200)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data.reshape(200, -1), gguf.GGMLQuantizationType[name])
    assert_same_bits(nd.dequantize(data, name, "float32", shape=expected.shape, device="reference"), expected)


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("n_elements", [0, 1, 7, 8, 9, 4095, 4097])
def test_sizes_on_the_cpu(name, n_elements):
    source = nd.FORMATS[name]
    data = random_blocks(name, -(-n_elements // source.block_size))
    out = np.full(source.n_elements(data.size), 77, np.float16)
    assert nd.dequantize(data, name, device="cpu", out=out) is out
    assert_same_bits(out, nd.dequantize(data, name, device="reference"))


@pytest.mark.parametrize("sizes", [{"MINIMUM_SHARE": 1 << 15}, {"LARGE_SHARE": 1 << 13}], ids=["7", "28"])
@pytest.mark.parametrize("name", ["Q4_K", "F16", "Q8_0"])
def test_many_threads_cover_everything(name, sizes, monkeypatch):
    from numba_dequant.backends import cpu

    monkeypatch.setattr(cpu, "available_cores", lambda: 7)
    for size, elements in sizes.items():
        monkeypatch.setattr(cpu, size, elements)
    source = nd.FORMATS[name]
    data = random_blocks(name, 300_000 // source.block_size)
    out = np.full(source.n_elements(data.size), 77, np.float32)
    nd.dequantize(data, name, "float32", device="cpu", out=out)
    assert_same_bits(out, nd.dequantize(data, name, "float32", device="reference"))


def test_rounding_on_the_cpu_is_numpy_s_for_every_float16_and_its_neighbours():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    near = (halves[:, None] + np.array([-1, 0, 1, 4095, 4096, 4097, 8191], np.int64)).astype(np.uint32).reshape(-1)
    values = np.concatenate([near, np.random.default_rng(1).integers(0, 2**32, 1 << 20, np.uint32)]).view(np.float32)
    for dtype in DTYPES:
        assert_same_bits(nd.dequantize(values, "F32", dtype, device="cpu"), rounded(values, dtype))


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize(("name", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("F32", "float32")])
def test_floats_that_are_passed_on_keep_every_bit(name, device, dtype):
    """Quiet and signalling NaNs with their payloads, subnormals, both zeros."""
    if name == "F32":
        bits = np.random.default_rng(0).integers(0, 2**32, 65536 + 5, np.uint32)
        bits[:4] = 0x7F800001, 0xFFC12345, 0x80000000, 1
    else:
        bits = np.arange(65536, dtype=np.uint16)
    out = nd.dequantize(bits, name, dtype, device=device)
    np.testing.assert_array_equal(out.view(bits.dtype), bits)
    unaligned = np.frombuffer(b"\0" + bits.tobytes(), np.uint8)[1:]
    into = np.empty(bits.size + 1, out.dtype)[1:]
    assert nd.dequantize(unaligned, name, dtype, device=device, out=into) is into
    np.testing.assert_array_equal(into.view(bits.dtype), bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_16_bit_float_is_converted_right(name, dtype):
    bits = np.arange(65536, dtype=np.uint16)
    expected = bits.view(rounded(np.zeros(0, np.float32), "float16" if name == "F16" else "bfloat16").dtype)
    with np.errstate(all="ignore"):
        expected = rounded(expected.astype(np.float32), dtype)
    for n in (65536, 65533):  # one ends within a run
        assert_same_bits(nd.dequantize(bits[:n], name, dtype, device="cpu"), expected[:n])


def test_a_format_of_the_user_s_own_is_not_taken_for_a_plain_float():
    """It has the name and the layout of F16, and another meaning."""
    from numba_dequant.bits import load_8_halves, to_float

    half = Format(
        "F16", 901, 1, block_layout(x="f2"), "twice as much",
        lambda blocks: np.float32(2) * blocks["x"].astype(np.float32)[:, None],
        lambda block, at, run: to_float(2) * load_8_halves(block, at),
    )  # fmt: skip
    for device in ("reference", "cpu"):
        found = nd.dequantize(np.arange(9, dtype=np.float16), half, device=device)
        np.testing.assert_array_equal(found, 2 * np.arange(9, dtype=np.float16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_f16_is_not_slower_than_bf16(dtype):
    """It was ten times slower, because its eight elements were converted one by one.

    BF16 is converted to float16: to bfloat16 it is only copied.
    """
    data, seconds = np.ones(1 << 20, np.float16), {}
    for _ in range(3):
        for name, output in (("F16", dtype), ("BF16", "float16")):
            out = np.empty(data.size, rounded(np.zeros(0, np.float32), output).dtype)
            for _ in range(7):
                start = time.process_time()  # what else the machine does is not in it
                nd.dequantize(data, name, output, device="cpu", out=out)
                seconds[name] = min(seconds.get(name, 1e9), time.process_time() - start)
    assert seconds["F16"] < 4 * seconds["BF16"]


@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64", "F64"])
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_plain_types_are_returned_as_they_are(name, device):
    kind = nd.FORMATS[name].stored_dtype
    values = np.arange(6, dtype=kind)
    found = nd.dequantize(values, name, "float16", shape=(2, 3), device=device)
    assert found.dtype == kind
    np.testing.assert_array_equal(found, values.reshape(2, 3))


def test_ids_that_ggml_removed_are_refused():
    for removed in REMOVED_IDS:
        with pytest.raises(nd.UnknownFormatError, match="removed"):
            format_with_id(removed)
    with pytest.raises(nd.UnknownFormatError, match="43"):
        format_with_id(43)


def test_a_layout_with_padding_is_refused():
    padded = np.dtype({"names": ["d", "qs"], "formats": ["<f2", ("u1", 16)], "offsets": [0, 4]})
    with pytest.raises(ValueError, match="must have named fields and no padding"):
        Format("PADDED", 999, 32, padded, "")


def test_a_registered_format_must_be_new():
    with pytest.raises(ValueError, match="clashes with Q8_0"):
        register(Format("Q8_0", 1000, 1, block_layout(value="u2"), ""))


def test_a_format_of_the_user_s_own_runs_on_the_cpu(request):
    from numba_dequant.bits import load_8_bytes, load_u8, to_float, unsigned_bytes

    layout = block_layout(scale="u1", quants=("u1", 16))

    def dequantize(blocks):
        quants = np.stack([blocks["quants"] & 15, blocks["quants"] >> 4], axis=1).reshape(-1, 32)
        return blocks["scale"].astype(np.float32)[:, None] * quants.astype(np.float32)

    def decode(block, at, run):
        packed = load_8_bytes(block, at + 1 + 8 * (run & 1)) >> (4 * (run >> 1))
        return to_float(load_u8(block, at)) * unsigned_bytes(packed & 0x0F0F0F0F0F0F0F0F)

    toy = Format("TOY", 900, 32, layout, "a toy", dequantize, decode)
    data = np.random.default_rng(0).integers(0, 256, 17 * 50, np.uint8)
    assert_same_bits(nd.dequantize(data, toy, device="cpu"), nd.dequantize(data, toy, device="reference"))
    assert intrinsics_cpu.target.registered >= {decode}


@pytest.mark.parametrize(
    ("layout", "block_size"),
    [
        (block_layout(v="u2", w="u2"), 1),
        (block_layout(v=("u1", 32)), 32),
        (block_layout(v="u1"), 8),
        (block_layout(v=("f4", 4)), 1),
    ],
)
def test_values_without_a_decode_are_single_numbers(layout, block_size):
    with pytest.raises(nd.OptionError, match="M: without `decode`, values are passed on as they are stored"):
        nd.Format("M", 5103, block_size, layout, "stored")


def test_fields_must_not_overlap():
    layout = np.dtype({"names": ["a", "b"], "formats": ["u1", "u1"], "offsets": [0, 0], "itemsize": 2})
    with pytest.raises(nd.OptionError, match="no padding"):
        nd.Format("M", 5103, 1, layout, "stored")


@pytest.mark.parametrize("count", [8, 24])
def test_a_specification_returns_a_value_for_each_element(count):
    def dequantize(blocks):
        return np.zeros((len(blocks), count), np.float32)

    fmt = nd.Format("M", 5104, 16, block_layout(q=("i1", 16)), "wrong", dequantize, nd.FORMATS["Q8_0"].decode)
    with pytest.raises(nd.OptionError, match=f"M: dequantize returned {2 * count} values, but the blocks have 32 elem"):
        nd.dequantize(bytes(32), fmt, device="reference")


@pytest.mark.parametrize("kind", [np.int32, np.uint16, np.int64, int])
def test_the_bytes_of_a_shape_do_not_wrap_around(kind):
    """Extents are often integers of NumPy, whose product has their size."""
    shape = (kind(60_000), kind(60_000), kind(64_000))
    n_bytes = nd.FORMATS["Q8_0"].n_bytes(shape)
    assert n_bytes == 60_000 * 60_000 * 2_000 * 34
    assert type(n_bytes) is int


@pytest.mark.parametrize(("chunk", "steps"), [(1, [1] * 10), (32, [1] * 10), (100, [3, 3, 3, 1]), (1 << 20, [10])])
def test_the_reference_takes_steps_of_whole_blocks(chunk, steps, monkeypatch):
    source, found = nd.FORMATS["Q4_0"], []

    def dequantize(blocks):
        found.append(len(blocks))
        return source.dequantize(blocks)

    data = random_blocks("Q4_0", 10)
    with np.errstate(all="ignore"):
        expected = source.dequantize(data.view(source.layout)).reshape(-1)
    counted = nd.Format("COUNTED", 5105, 32, source.layout, "Q4_0", dequantize, source.decode)
    monkeypatch.setattr(reference, "CHUNK", chunk)
    assert_same_bits(nd.dequantize(data, counted, "float32", device="reference"), expected)
    assert found == steps
