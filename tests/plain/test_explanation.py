"""One block, step by step."""

import re
import sys

import numpy as np
import pytest
from blocks import DECODED, random_blocks, write_model

import numba_dequant as nd
from numba_dequant.cli import main


@pytest.mark.parametrize("name", DECODED)
def test_the_last_step_is_the_value(name):
    source = nd.FORMATS[name]
    size = source.block_size if source.block_size > 1 else 8
    data = random_blocks(name, 24 if source.block_size == 1 else 3, seed=8)
    values = nd.dequantize(data, name, "float32", device="reference").reshape(-1, size)
    for element in {0, 9 % size, size - 1}:
        found = nd.explain(data, name, block=2, element=element)
        np.testing.assert_array_equal(found.values, values[2])
        np.testing.assert_array_equal(found.run, values[2][element // 8 * 8 :][:8])
        np.testing.assert_array_equal(np.asarray(found.steps[-1].value, np.float32), found.run)
        assert list(found.fields) == list(source.layout.names)
        assert str(found) == found._repr_mimebundle_()["text/plain"]
        assert found._repr_html_() == found._repr_mimebundle_()["text/html"]


def test_the_steps_of_q4_k():
    block = np.zeros(1, nd.FORMATS["Q4_K"].layout)
    block["d"], block["dmin"] = 2, 0.5
    block["scales"][0, :8] = range(1, 9)
    block["qs"] = 0x21
    found = nd.explain(block, "Q4_K", element=37)
    steps = {step.name: step for step in found.steps}
    assert list(steps) == ["sub_block", "d", "dmin", "packed", "quants", "values"]
    calls = {step.name: {call.label: call.value for call in step.calls} for step in found.steps}
    assert calls["d"] == {"load_u16(block, 0)": 0x4000, "half(16384)": 2, "scale_of(block, 4, 1)": 2, "to_float(2)": 2}
    assert calls["dmin"]["minimum_of(block, 4, 1)"] == 6
    assert "d = half(load_u16(block, at + D)) * to_float(scale_of(block, at + SCALES, sub_block))" in found.text
    assert steps["sub_block"].value == 1
    assert steps["d"].value == 2 * 2
    assert steps["dmin"].value == 0.5 * 6
    assert steps["packed"].shown == "33  33  33  33  33  33  33  33"
    assert steps["quants"].shown == "2  2  2  2  2  2  2  2"
    assert steps["values"].shown == "5  5  5  5  5  5  5  5"
    assert "d * unsigned_bytes(quants) - dmin" in steps["values"].source


def test_bytes_in_integers_are_shown_as_such():
    shown = {
        name: nd.explain(random_blocks(name, 1, seed=2), name, element=100) for name in ("IQ3_S", "IQ1_S", "TQ1_0")
    }
    steps = {name: {step.name: step.shown for step in each.steps} for name, each in shown.items()}
    from numba_dequant.formats._codebooks import IQ3_S_GRID

    first = next(step for step in shown["IQ3_S"].steps if step.name == "first")
    index = int(re.fullmatch(r"lookup\(IQ3_S_GRID, (\d+)\)", first.calls[0].label)[1])
    assert steps["IQ3_S"]["first"].split() == [str(item) for item in IQ3_S_GRID.items[index : index + 1].view(np.int8)]
    assert set(steps["IQ1_S"]["point"].split()) <= {"-1", "0", "1"}
    assert len(steps["IQ1_S"]["point"].split()) == 8
    last = {step.name: step.shown for step in nd.explain(random_blocks("TQ1_0", 1), "TQ1_0", element=255).steps}
    assert len(last["tripled"].split()) == 4


CODE = """
def decode(block, at, run):
    values = (
        half(load_u16(block, at))
        * signed_bytes(load_8_bytes(block, at + 2 + 8 * run))
    )
    return values
"""


@pytest.mark.parametrize("has_text", [True, False])
def test_a_format_of_ones_own(tmp_path, has_text):
    """A statement over several lines is one; a function whose text is lost is explained all the same."""
    from numba_dequant import bits

    names = {name: getattr(bits, name) for name in ("half", "load_u16", "signed_bytes", "load_8_bytes")}
    path = tmp_path / "own.py"
    path.write_text(CODE)
    exec(compile(CODE, str(path) if has_text else "<lost>", "exec"), names)
    ours = nd.FORMATS["Q8_0"]
    source = nd.Format("OWN", 902, 32, ours.layout, "of one's own", ours.dequantize, names["decode"])
    found = nd.explain(np.float16(2).tobytes() + bytes(range(32)), source, element=9)
    (step,) = found.steps
    assert step.shown == "16  18  20  22  24  26  28  30"
    assert [call.label for call in step.calls][:2] == ["load_u16(block, 0)", "half(16384)"]
    whole = "values = ( half(load_u16(block, at)) * signed_bytes(load_8_bytes(block, at + 2 + 8 * run)) )"
    assert step.source == (whole if has_text else "")
    assert (whole in found.text) == has_text
    assert found._repr_html_()


def test_who_watches_python_is_not_disturbed():
    def tracer(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        nd.explain(bytes(18), "Q4_0")
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((bytes(17), "Q4_0"), nd.DataError, "the last 17 are not a whole block"),
        ((bytes(18), "Q4_0", 1), nd.ShapeError, "the data has 1 blocks of 32 elements; there is no block 1"),
        ((bytes(18), "Q4_0", 0, 32), nd.ShapeError, "element must be from 0 to 31 in a block of Q4_0, got 32"),
        ((bytes(18), "Q4_0", 0, 1.5), nd.ShapeError, "element must be a whole number, got 1.5"),
        ((bytes(18), "Q4_0", 0.5), nd.ShapeError, "there is no block 0.5"),
        ((bytes(8), "I8"), nd.DataError, "I8 is stored as it is"),
        ((bytes(18), "Q4_9"), nd.UnknownFormatError, "Q4_9"),
    ],
)
def test_what_cannot_be_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        nd.explain(*arguments)


def test_on_the_command_line(tmp_path, capsys):
    data = random_blocks("Q5_0", 4)
    path = write_model(tmp_path / "m.gguf", {"a": ("Q5_0", (2, 64), data), "b": ("Q8_0", (32,), bytes(34))})
    assert main.main(["show", str(path), "a", "--block", "3", "--element", "9"]) == 0
    assert str(nd.explain(data, "Q5_0", 3, 9)) in capsys.readouterr().out
    assert main.main(["show", str(path)]) == 0
    assert "Q5_0, block 0: element 0" in capsys.readouterr().out
    assert main.main(["show", "Q5_0", "--element", "9"]) == 0
    assert capsys.readouterr().out == f"{nd.FORMATS['Q5_0'].picture(9)}\n"
    assert main.main(["show", "Q5_0"]) == 0
    assert capsys.readouterr().out == f"{nd.FORMATS['Q5_0']}\n"
    for wrong, message in (
        (["show", "Q5_0", "--block", "3"], "TENSOR and --block need a file, but Q5_0 is a format"),
        (["show", str(path), "c"], "there is no tensor 'c'"),
        (["show", str(path), "a", "--block", "4"], "there is no block 4"),
        (["show", "Q5_9"], "unknown format 'Q5_9'. Did you mean"),
        (["show", "nothing.gguf"], "No such file"),
        (["show", "F32", "--element", "3"], "F32 has no blocks"),
    ):
        assert main.main(wrong) == 2
        assert message in capsys.readouterr().err
