"""The table of tensors: finding, suggesting and showing them."""

import difflib

import pytest
from gguf_bytes import counted, floats, gguf

import numba_dequant as nd
from numba_dequant.gguf import tensors as module
from numba_dequant.gguf.tensors import TensorTable


def table_of(names):
    (tensor,) = nd.open(gguf([("t", *floats(1))])).tensors.values()
    return TensorTable({name: tensor._replace(name=name) for name in names})


def test_a_tensor_is_found_by_its_name_alone():
    table = table_of("ab")
    assert ("a" in table, "c" in table, None in table, ["a"] in table) == (True, False, False, False)
    assert table.get("a") is table["a"]
    assert (table.get("c"), table.get("c", 5), table.get(["a"], 5)) == (None, 5, 5)
    assert ([*table], len(table)) == (["a", "b"], 2)
    for wrong in ("c", None, ["a"]):
        with pytest.raises(nd.TensorNotFoundError, match=r"there is no tensor .* among the 2 tensors$"):
            table[wrong]


def suggested(names, name):
    with pytest.raises(nd.TensorNotFoundError) as caught:
        table_of(names)[name]
    _, _, hint = str(caught.value).partition("; did you mean ")
    return hint


def test_up_to_three_similar_names_are_suggested():
    assert suggested(["blk.0", "blk.1", "blk.2", "blk.3", "other"], "blk.9").count("blk.") == 3
    assert suggested(["blk.0", "other"], "blk.9") == "'blk.0'?"
    assert suggested(["other"], "blk.9") == ""


def test_only_names_of_up_to_200_characters_are_compared():
    assert suggested(["x" * 199 + "y"], "x" * 200)
    assert suggested(["x" * 200 + "y"], "x" * 200) == ""
    assert suggested(["x" * 200], "x" * 200 + "y") == ""


def test_of_many_names_those_are_compared_that_begin_and_end_alike(monkeypatch):
    real, compared = difflib.get_close_matches, []

    def get_close_matches(name, names, **options):
        compared.append(names)
        return real(name, names, **options)

    monkeypatch.setattr(difflib, "get_close_matches", get_close_matches)
    # The first name has the same four characters at either end; the others have seven at one end.
    names = ["abcd_ghij", "abcdefgzzzzzzzz", "zzzzzzzzdefghij"]
    for most, expected in ((1, names[:1]), (3, names)):
        monkeypatch.setattr(module, "COMPARED_NAMES", most)
        for order in (names, names[::-1]):
            assert suggested(order, "abcdefghij") == "'abcd_ghij'?"
            assert sorted(compared.pop()) == expected
    monkeypatch.setattr(module, "MAX_COMPARED", 2)
    assert suggested(names[::-1], "abcdefghij") == ""
    assert compared.pop() == names[:0:-1]


@pytest.mark.parametrize(("shape", "shown"), [((), "scalar"), ((3,), "3"), ((2, 3), "2 x 3")])
def test_a_tensor_is_shown_with_all_but_its_source(shape, shown):
    (tensor,) = nd.open(gguf([("t", *floats(*shape))])).tensors.values()
    n_elements = counted(*shape).size
    assert repr(tensor) == (
        f"TensorInfo(name='t', format={tensor.format!r}, shape={shape}, path='<memory>', offset={tensor.offset}, "
        f"n_bytes={4 * n_elements}, n_elements={n_elements}, byte_order='little')"
    )
    assert f">{shown}<" in tensor._repr_html_()


def test_a_table_of_no_tensors_says_so():
    assert repr(table_of("")) == "no tensors"
    assert "no tensors" not in repr(table_of("a"))
