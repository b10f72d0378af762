"""Which bits decide which elements, and the pictures made of it."""

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from blocks import QUANTIZED, random_blocks

import numba_dequant as nd
from numba_dequant.explain import bit_map, block_picture

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", QUANTIZED)
def test_no_flipped_bit_changes_anything_else(name):
    """Any bit of any block, infinite and NaN scales included."""
    source = nd.FORMATS[name]
    blocks = np.concatenate(
        [
            random_blocks(name, 24, seed=3).view(source.layout),
            bit_map.random_blocks(source.layout, 40, np.random.default_rng(4)),
        ]
    )
    before = bit_map.bits_of(source.dequantize, blocks)
    for bit in range(8 * source.type_size):
        changed = (bit_map.bits_of(source.dequantize, bit_map.flipped(blocks, [bit])) != before).any(axis=0)
        assert not (changed & ~source.bit_map[bit]).any(), (bit, np.flatnonzero(changed & ~source.bit_map[bit]))


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_bit_that_is_said_to_matter_does(name):
    """The same search with other random blocks finds the same."""
    source = nd.FORMATS[name]
    found = bit_map.bit_map(source.layout, source.block_size, source.dequantize, seed=1)
    np.testing.assert_array_equal(found, source.bit_map)


def bits_of_element(name, element):
    """Byte -> mask of the bits that decide an element."""
    lit = np.packbits(nd.FORMATS[name].bit_map[:, element].reshape(-1, 8), axis=1, bitorder="little").reshape(-1)
    return {int(byte): int(lit[byte]) for byte in np.flatnonzero(lit)}


def test_what_the_layouts_say():
    """Some elements by hand, from the comments in GGML's ggml-common.h and its dequantizers."""
    assert bits_of_element("Q4_0", 17) == {0: 0xFF, 1: 0xFF, 3: 0xF0}
    assert bits_of_element("Q8_0", 31) == {0: 0xFF, 1: 0xFF, 33: 0xFF}
    assert bits_of_element("Q5_1", 4) == {0: 0xFF, 1: 0xFF, 2: 0xFF, 3: 0xFF, 4: 0x10, 12: 0x0F}
    q4_k = {0: 0xFF, 1: 0xFF, 2: 0xFF, 3: 0xFF}
    assert bits_of_element("Q4_K", 32) == q4_k | {5: 0x3F, 9: 0x3F, 16: 0xF0}
    assert bits_of_element("Q4_K", 200) == q4_k | {6: 0xC0, 10: 0xC0, 14: 0xFF, 120: 0x0F}
    assert bits_of_element("Q6_K", 200) == {72: 0xF0, 168: 0x30, 204: 0xFF, 208: 0xFF, 209: 0xFF}
    assert bits_of_element("Q1_0", 9) == {0: 0xFF, 1: 0xFF, 3: 0x02}
    assert bits_of_element("IQ4_NL", 0) == {0: 0xFF, 1: 0xFF, 2: 0x0F}


def test_sums_decide_nothing():
    assert not nd.FORMATS["Q8_1"].bit_map[16:32].any()
    assert not nd.FORMATS["Q8_K"].bit_map[8 * 260 :].any()


@pytest.mark.parametrize("element", [None, 0, 13])
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_svg(name, element):
    source = nd.FORMATS[name]
    root = ET.fromstring(source.picture(element).svg)
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = [box for box in root.iter(f"{SVG}rect") if box.get("height") == str(block_picture.HEIGHT)]
    assert len(boxes) == source.type_size
    places = {(float(box.get("x")), float(box.get("y"))) for box in boxes}
    assert len(places) == source.type_size
    for x, y in places:
        assert 0 <= x <= width - block_picture.WIDTH
        assert 0 <= y <= height - block_picture.HEIGHT
    for text in root.iter(f"{SVG}text"):
        # A monospaced letter is 0.6 of its size wide.
        length = 0.61 * float(text.get("font-size", 12)) * len(text.text)
        room = {None: width - float(text.get("x")), "middle": block_picture.WIDTH, "end": float(text.get("x"))}
        assert length <= room[text.get("text-anchor")], text.text
    lit = [box for box in boxes if box.get("fill-opacity") == "1"]
    expected = source.type_size if element is None else len(bits_of_element(name, element))
    assert len(lit) == expected
    colours = {item.name: box.get("fill") for item in source.picture().fields for box in [boxes[item.start]]}
    assert len(set(colours.values())) == len(colours)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_real_block(name):
    """Its bytes are in the boxes; of the bits that decide the element, what they are."""
    source = nd.FORMATS[name]
    raw = random_blocks(name, 1, seed=5)
    drawn = source.picture(13, raw)
    texts = list(ET.fromstring(drawn.svg).iter(f"{SVG}text"))
    boxes = [text.text for text in texts if text.get("text-anchor") == "middle" and len(text.text) == 2]
    assert bytes.fromhex("".join(boxes)) == raw.tobytes()
    masks = bits_of_element(name, 13)
    bold = [int(text.text) for text in texts if text.get("font-weight") == "bold"]
    lit = [raw[byte] >> bit & 1 for byte, mask in masks.items() for bit in range(8) if mask >> bit & 1]
    assert sorted(bold) == sorted(lit)
    rows = re.findall(r"^  +\d+  ((?:[0-9a-f]{2} )*[0-9a-f]{2})$", drawn.text, re.MULTILINE)
    assert bytes.fromhex("".join(rows)) == raw.tobytes()
    for byte, mask in masks.items():
        digits = "".join(f"{raw[byte]:08b}"[place] if mask >> (7 - place) & 1 else "·" for place in range(8))
        assert f"byte {byte:>3}  {digits}  " in drawn.text


def test_long_names_and_many_fields():
    fields = {f"a_rather_long_name_{number}": ("u1", 4) for number in range(8)}
    layout = nd.format.block_layout(**fields)

    def dequantize(blocks):
        return blocks.view(np.uint8).reshape(-1, 32).astype(np.float32)

    source = nd.Format("LONG", 901, 32, layout, "names", dequantize, nd.FORMATS["Q8_0"].decode)
    root = ET.fromstring(source.picture().svg)
    assert len({box.get("fill") for box in root.iter(f"{SVG}rect")} - {"#000"}) == 8
    rows = {}
    for text in root.iter(f"{SVG}text"):
        length = 0.61 * float(text.get("font-size", 12)) * len(text.text)
        if text.get("text-anchor") == "middle":
            assert length <= block_picture.WIDTH
        elif text.get("text-anchor") is None:
            rows.setdefault(text.get("y"), []).append((float(text.get("x")), length))
    for places in rows.values():
        for (x, length), (following, _) in zip(sorted(places), sorted(places)[1:], strict=False):
            assert x + length <= following


def test_what_a_byte_is_called():
    fields = {item.name: item for item in nd.FORMATS["IQ2_XXS"].picture().fields}
    assert [fields["d"].label(byte) for byte in (0, 1)] == ["d, byte 0", "d, byte 1"]
    assert [fields["qs"].label(byte) for byte in (2, 3, 64)] == ["qs[0], byte 0", "qs[0], byte 1", "qs[31], byte 0"]
    assert [fields["qs"].mark(byte) for byte in (2, 3, 4)] == ["qs", "", "1"]
    assert "16  qs qs" in nd.FORMATS["Q4_0"].picture().text


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_range_of_values(name):
    source = nd.FORMATS[name]
    least, greatest = source.value_range
    blocks = random_blocks(name, 4000, seed=6).view(source.layout)
    for field in source.layout.names:
        if source.layout[field].base.kind == "f":
            blocks[field] = 1
    with np.errstate(all="ignore"):
        values = source.dequantize(blocks)
    values = values[np.isfinite(values)]
    assert least <= values.min()
    assert values.max() <= greatest


def test_ranges_that_are_known():
    known = {"Q4_0": (-8, 7), "Q6_K": (127 * -32, -128 * -32), "Q4_K": (-63, 63 * 15), "TQ1_0": (-1, 1)}
    known |= {"IQ4_NL": (-127, 113), "Q8_0": (-128, 127), "Q5_1": (1, 32)}
    assert {name: nd.FORMATS[name].value_range for name in known} == known


def test_a_name_does_not_get_into_the_markup():
    layout = nd.format.block_layout(d="f2", qs=("u1", 16))
    drawn = block_picture.BlockPicture("<b>&", layout, nd.FORMATS["Q4_0"].bit_map)
    assert "<b>" not in drawn.svg
    ET.fromstring(drawn.svg)


def test_what_notebooks_show():
    source = nd.FORMATS["Q4_K"]
    assert source._repr_html_() == source._repr_mimebundle_()["text/html"]
    assert "<svg" in source._repr_html_()
    assert "get_scale_min_k4" in source._repr_html_(), "the source of the format"
    assert "Values go from -63 to 945, where the floats of the block are 1" in source._repr_html_()
    assert source._repr_mimebundle_()["text/plain"] == str(source)
    assert "get_scale_min_k4" in str(source)
    drawn = source.picture(3)
    shown = drawn._repr_mimebundle_()
    assert (shown["text/plain"], shown["text/html"]) == (str(drawn), drawn._repr_html_())
    assert shown["image/svg+xml"] == drawn.svg_file
    assert "prefers-color-scheme" in drawn.svg_file
    ET.fromstring(drawn.svg_file)
    assert "<svg" not in nd.FORMATS["F32"]._repr_html_()
    assert "4 bytes for an element" in nd.FORMATS["F32"]._repr_html_()
    assert list(nd.FORMATS["I8"]._repr_mimebundle_()) == ["text/plain", "text/html"]


def test_what_cannot_be_drawn():
    with pytest.raises(nd.ShapeError, match="F32 has no blocks"):
        nd.FORMATS["F32"].picture()
    with pytest.raises(nd.ShapeError, match="element must be from 0 to 31 in a block of Q4_0, got 32"):
        nd.FORMATS["Q4_0"].picture(32)
    with pytest.raises(nd.ShapeError, match=r"element must be a whole number, got 1\.5"):
        nd.FORMATS["Q4_0"].picture(1.5)
    with pytest.raises(nd.DataError, match=r"one block of Q4_0, uint8 of shape \(18,\), got uint8 of shape \(36,\)"):
        nd.FORMATS["Q4_0"].picture(3, np.zeros(36, np.uint8))
    with pytest.raises(nd.ShapeError, match="F32 has no blocks"):
        nd.FORMATS["F32"].value_range  # noqa: B018 it is worked out when it is asked for


def test_tables_of_a_model(tmp_path):
    from blocks import write_model

    tensors = {f"<t{number}>": ("F32", (1,), bytes(4)) for number in range(600)}
    with nd.open(write_model(tmp_path / "m.gguf", tensors, [("general.name", "<i>")])) as model:
        for shown in (model._repr_html_(), model.tensors._repr_html_()):
            assert "&lt;t499&gt;" in shown
            assert "&lt;t500&gt;" not in shown
            assert "and 100 more" in shown
            assert "<t0>" not in shown
        assert "&lt;i&gt;" in model._repr_html_()
        assert not re.search(r"<(t\d|i>)", model._repr_html_())
        lines = repr(model.tensors).splitlines()
        assert lines[0].split() == ["tensor", "format", "shape", "bytes"]
        assert lines[1].split() == ["<t0>", "F32", "1", "4"]
        assert lines[-1] == "and 540 more"
        shown = model.tensors["<t3>"]._repr_html_()
        assert "&lt;t3&gt;" in shown
        assert "1, 32 bits each" in shown
