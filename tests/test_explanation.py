"""One block, step by step."""

import sys

import numpy as np
import pytest
from conftest import DECODED, random_blocks, write_model

import numba_dequant as nd
from numba_dequant import cli


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
    assert steps["sub_block"].value == 1
    assert steps["d"].value == 2 * 2
    assert steps["dmin"].value == 0.5 * 6
    assert steps["packed"].shown == "33  33  33  33  33  33  33  33"
    assert steps["quants"].shown == "2  2  2  2  2  2  2  2"
    assert steps["values"].shown == "5  5  5  5  5  5  5  5"
    assert "d * unsigned_bytes(quants) - dmin" in steps["values"].source


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
        ((bytes(17), "Q4_0"), nd.DataError, "17 too many"),
        ((bytes(18), "Q4_0", 1), nd.ShapeError, "the data has 1 blocks of 32 elements, from 0 on; there is no block 1"),
        ((bytes(18), "Q4_0", 0, 32), nd.ShapeError, "elements 0 to 31, not 32"),
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
    assert cli.main(["show", str(path), "a", "--block", "3", "--element", "9"]) == 0
    assert str(nd.explain(data, "Q5_0", 3, 9)) in capsys.readouterr().out
    assert cli.main(["show", str(path)]) == 0
    assert "Q5_0, block 0: element 0" in capsys.readouterr().out
    assert cli.main(["show", "Q5_0", "--element", "9"]) == 0
    assert capsys.readouterr().out == f"{nd.FORMATS['Q5_0'].picture(9)}\n"
    for wrong, message in (
        (["show", str(path), "c"], "there is no tensor 'c'"),
        (["show", str(path), "a", "--block", "4"], "there is no block 4"),
        (["show", "Q5_9"], "unknown format 'Q5_9'. Did you mean"),
        (["show", "nothing.gguf"], "No such file"),
        (["show", "F32"], "F32 has no blocks"),
    ):
        assert cli.main(wrong) == 2
        assert message in capsys.readouterr().err
