"""Which bits decide which elements, and the pictures made of it."""

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from conftest import QUANTIZED, random_blocks

import numba_dequant as nd
from numba_dequant import bit_map, picture

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
    boxes = [box for box in root.iter(f"{SVG}rect") if box.get("height") == str(picture.HEIGHT)]
    assert len(boxes) == source.type_size
    places = {(float(box.get("x")), float(box.get("y"))) for box in boxes}
    assert len(places) == source.type_size
    for x, y in places:
        assert 0 <= x <= width - picture.WIDTH
        assert 0 <= y <= height - picture.HEIGHT
    for text in root.iter(f"{SVG}text"):
        # A monospaced letter is 0.6 of its size wide.
        length = 0.61 * float(text.get("font-size", 12)) * len(text.text)
        room = {None: width - float(text.get("x")), "middle": picture.WIDTH, "end": float(text.get("x"))}
        assert length <= room[text.get("text-anchor")], text.text
    lit = [box for box in boxes if box.get("fill-opacity") == "1"]
    expected = source.type_size if element is None else len(bits_of_element(name, element))
    assert len(lit) == expected
    colours = {item.name: box.get("fill") for item in source.picture().fields for box in [boxes[item.start]]}
    assert len(set(colours.values())) == len(colours)


def test_a_name_does_not_get_into_the_markup():
    layout = nd.format.block_layout(d="f2", qs=("u1", 16))
    drawn = picture.Picture("<b>&", layout, nd.FORMATS["Q4_0"].bit_map)
    assert "<b>" not in drawn.svg
    ET.fromstring(drawn.svg)


def test_what_notebooks_show():
    source = nd.FORMATS["Q4_K"]
    assert source._repr_html_() == source._repr_mimebundle_()["text/html"]
    assert "<svg" in source._repr_html_()
    assert "get_scale_min_k4" in source._repr_html_(), "the source of the format"
    assert source._repr_mimebundle_()["text/plain"] == repr(source)
    drawn = source.picture(3)
    assert drawn._repr_mimebundle_() == {"text/plain": str(drawn), "text/html": drawn._repr_html_()}
    assert "<svg" not in nd.FORMATS["F32"]._repr_html_()


def test_what_cannot_be_drawn():
    with pytest.raises(nd.ShapeError, match="F32 has no blocks"):
        nd.FORMATS["F32"].picture()
    with pytest.raises(nd.ShapeError, match="elements 0 to 31, not 32"):
        nd.FORMATS["Q4_0"].picture(32)


def test_tables_of_a_model(tmp_path):
    from conftest import write_model

    tensors = {f"<t{number}>": ("F32", (1,), bytes(4)) for number in range(600)}
    with nd.open(write_model(tmp_path / "m.gguf", tensors, [("general.name", "<i>")])) as model:
        for shown in (model._repr_html_(), model.tensors._repr_html_()):
            assert "&lt;t499&gt;" in shown
            assert "&lt;t500&gt;" not in shown
            assert "and 100 more" in shown
            assert "<t0>" not in shown
        assert "&lt;i&gt;" in model._repr_html_()
        assert not re.search(r"<(t\d|i>)", model._repr_html_())
