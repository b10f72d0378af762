"""Every kind of wrong thing as every argument of the functions for PyTorch: it works, or is refused with a sentence."""

import warnings

import numpy as np
import pytest
from blocks import shifted
from three_tensors import open_model

import numba_dequant as nd

torch = pytest.importorskip("torch")

from numba_dequant import torch as nt  # noqa: E402 PyTorch may be missing


def quantized(*shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch will remove them
        return torch.quantize_per_tensor(torch.zeros(shape), 1.0, 0, torch.quint8)


def quiet(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that they are a prototype
        return make()


def freed(tensor, n_bytes=0):
    """As FSDP does with parameters that it has gathered: PyTorch itself would end the process."""
    tensor.untyped_storage().resize_(n_bytes)
    return tensor


def odd_things():
    """One of every kind, made anew for each call."""
    yield from {
        "None": None,
        "an int": 5,
        "a negative int": -1,
        "a huge int": 1 << 70,
        "NaN": float("nan"),
        "a str": "odd",
        "bytes": b"odd",
        "a list": [1, 2],
        "a huge list": [1 << 62, 0],
        "a dict": {},
        "True": True,
        "a class": int,
        "an object": object(),
        "a Format": nd.FORMATS["Q8_0"],
        "an array": np.zeros(3),
        "a dtype": torch.float16,
        "a device": torch.device("cpu"),
        "0-d": torch.zeros(()),
        "0-d uint8": torch.zeros((), dtype=torch.uint8),
        "empty": torch.zeros(0),
        "3-d": torch.zeros(3, 34, 2),
        "4-d": torch.zeros(1, 1, 2, 34),
        "conjugate": torch.zeros(2, 17, dtype=torch.complex64).conj(),
        "negative": torch.zeros(2, 17, dtype=torch.complex64).conj().imag,
        "bools": torch.zeros(2, 34, dtype=torch.bool),
        "meta": torch.zeros(2, 34, device="meta"),
        "meta uint8": torch.zeros(2, 34, device="meta", dtype=torch.uint8),
        "0-d meta": torch.zeros((), device="meta"),
        "sparse": torch.eye(34).to_sparse(),
        "CSR": quiet(lambda: torch.eye(34).to_sparse_csr()),
        "nested": quiet(lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged)),
        "strided nested": quiet(lambda: torch.nested.nested_tensor([torch.zeros(2)])),
        "quantized": quantized(2, 34),
        "expanded": torch.zeros(1, dtype=torch.uint8).expand(2, 34),
        "not whole blocks": torch.zeros(2, 33, dtype=torch.uint8),
        "transposed": torch.zeros(2, 34).t(),
        "float64": torch.zeros(2, 34, dtype=torch.float64),
        "float8": torch.zeros(3, 32).to(torch.float8_e4m3fn),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "int32": torch.zeros(3, 32, dtype=torch.int32),
        "uint64": torch.tensor([0], dtype=getattr(torch, "uint64", torch.int64)),
        "a parameter": torch.nn.Parameter(torch.zeros(2, 17)),
        "freed": freed(torch.zeros(2, 34, dtype=torch.uint8)),
        "freed floats": freed(torch.zeros(2, 32, dtype=torch.float16)),
        "freed numbers": freed(torch.zeros(2, dtype=torch.int64)),
        "freed in part": freed(torch.zeros(2, 34, dtype=torch.uint8), 67),
        "freed and strided": freed(torch.zeros(34, 2, dtype=torch.uint8).t(), 67),
        "a freed parameter": torch.nn.Parameter(freed(torch.zeros(2, 17))),
    }.items()


ODD = [label for label, _ in odd_things()]


def calls():
    """Every function with right arguments."""
    blocks, x = torch.zeros(2, 34, dtype=torch.uint8), torch.zeros(3, 32)
    rows, ids = torch.tensor([0, 1]), torch.zeros(3, 1, dtype=torch.int64)
    right = {"data": blocks, "qtype": "Q8_0", "dtype": torch.float16, "shape": (2, 32)}
    yield nt.dequantize, right
    yield nt.dequantize, right | {"out": torch.zeros(2, 32, dtype=torch.float16)}
    yield nt.get_rows, {"data": blocks, "indices": rows, "qtype": "Q8_0", "dtype": torch.float16}
    right = {"input": x, "weight": blocks, "qtype": "Q8_0", "bias": torch.zeros(2), "weight_is_constant": False}
    yield nt.linear, right
    yield nt.ggml.mul_mat_id, {"blocks": blocks[None], "x": x, "ids": ids, "ggml_type": 8, "out_features": 2}
    yield nt.ggml.mul_mat_vec, {"blocks": blocks, "x": x, "ggml_type": 8, "out_features": 2}
    yield nt.ggml.dequantize, {"blocks": blocks, "ggml_type": 8, "rows": 2, "cols": 32, "dtype": torch.float16}
    yield nt.ggml.get_rows, {"blocks": blocks, "indices": rows, "ggml_type": 8, "cols": 32, "dtype": torch.float16}
    yield nt.ggml.ggml_dequantize, {"W": blocks, "type": 8, "m": 2, "n": 32, "dtype": torch.float16}


def assert_refused_with_a_sentence(calls, kind):
    """Each argument in turn is odd: the call works, or its error is one of ours."""
    refused = 0
    for function, right in calls:
        function(**right)
        for name in right:
            odd = dict(odd_things())[kind]
            try:
                function(**right | {name: odd})
            except nd.NumbaDequantError as error:
                said = str(error)
            except Exception as error:
                raise AssertionError(f"{function.__qualname__} {name}: {type(error).__name__}: {error}") from error
            else:
                continue
            assert 15 < len(said) < 600, (function, name)
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_argument_works_or_is_refused_with_a_sentence(kind):
    assert_refused_with_a_sentence(calls(), kind)


def calls_of_layers(path):
    """Layers and files with right arguments. A device that PyTorch does not have is PyTorch's own error."""
    blocks, bias = torch.zeros(2, 34, dtype=torch.uint8), torch.zeros(2)
    linear, embedding = nt.QuantizedLinear, nt.QuantizedEmbedding
    yield linear.from_blocks, {"weight": blocks, "qtype": "Q8_0", "bias": bias}
    yield embedding.from_blocks, {"weight": blocks, "qtype": "Q8_0", "dtype": torch.float16}
    right = {"qtype": "Q8_0", "dtype": torch.float16}
    yield linear, right | {"in_features": 32, "out_features": 2, "bias": True}
    yield embedding, right | {"num_embeddings": 2, "embedding_dim": 32}
    yield linear.from_blocks(blocks, "Q8_0").forward, {"input": torch.zeros(3, 32)}
    yield embedding.from_blocks(blocks, "Q8_0").forward, {"input": torch.tensor([0])}
    yield linear.from_blocks(blocks, "Q8_0").dequantize, {"dtype": torch.float16}
    right = {"path": path, "dtype": torch.float16, "select": "ids", "keep_quantized": False}
    yield nt.load_file, right
    yield nt.load_model, {"model": torch.nn.Linear(1, 1), "path": path, "dtype": torch.float16, "keep_quantized": True}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_argument_of_a_layer_or_a_file_is_refused_with_a_sentence(kind, tmp_path):
    assert_refused_with_a_sentence(calls_of_layers(open_model(tmp_path).path), kind)


def test_a_bias_has_one_number_for_each_row():
    with pytest.raises(nd.ShapeError, match=r"bias has shape \(3,\), but weight has 2 rows"):
        nt.QuantizedLinear.from_blocks(torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", torch.zeros(3))


def test_a_tensor_that_pytorch_quantized_does_not_end_the_process():
    """PyTorch has a reshape of such bytes that reads where nothing is."""
    for call in (nt.dequantize, nt.get_rows):
        arguments = {"data": quantized(2, 34), "qtype": "Q8_0"}
        arguments |= {"indices": torch.tensor([0])} if call is nt.get_rows else {"shape": (2, 32)}
        with pytest.raises(nd.DataError, match="data is a tensor quantized by PyTorch; pass a dense tensor"):
            call(**arguments)
    with pytest.raises(nd.OutputError, match="out is a tensor quantized by PyTorch"):
        nt.dequantize(torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", torch.float16, out=quantized(2, 32))


def test_memory_that_was_freed_is_not_touched():
    """Each argument in turn, of its right shape and dtype."""
    n_tensors = 0
    for function, right in calls():
        for name, given in right.items():
            if not isinstance(given, torch.Tensor):
                continue
            for n_bytes in (0, given.nbytes - 1):
                lost = given.clone()
                lost.untyped_storage().resize_(n_bytes)
                error = nd.OutputError if name == "out" else nd.DataError
                with pytest.raises(error, match=f"its storage has {n_bytes} of the {given.nbytes} bytes that it needs"):
                    function(**right | {name: lost})
            n_tensors += 1
    assert n_tensors >= 15


def test_a_view_needs_its_own_part_of_a_storage_only():
    rows = torch.zeros(4, 34, dtype=torch.uint8)
    rows[:, 1], rows[:, 2] = 60, 3  # a scale of 1, and a quant of 3
    first, second, strided = rows[:1], rows[1:2], rows[::2, :]
    freed(rows, 68)
    for whole in (first, second):
        assert nt.dequantize(whole, "Q8_0")[0, 0] == 3
    for lost in (rows, strided):
        with pytest.raises(nd.DataError, match=r"its storage has 68 of the (136|102) bytes"):
            nt.dequantize(lost, "Q8_0")
    assert nt.dequantize(freed(torch.zeros(4, 34, dtype=torch.uint8))[:0], "Q8_0").shape == (0, 32)


def test_odd_addresses():
    """Data and numbers of rows may be anywhere; an output must be where its numbers may be."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 60, (3, 68), np.uint8)
    rows = torch.from_numpy(blocks)
    for n_bytes in (1, 8, 13):
        odd = torch.from_numpy(shifted(blocks, n_bytes))
        numbers = torch.frombuffer(bytearray(b"x" + np.array([2, 0]).tobytes()), dtype=torch.int64, offset=1)
        assert odd.data_ptr() % 16 == n_bytes
        assert numbers.data_ptr() % 8 == 1
        x = torch.ones(2, 64)
        assert torch.equal(nt.dequantize(odd, "Q8_0"), nt.dequantize(rows, "Q8_0"))
        assert torch.equal(nt.get_rows(odd, numbers, "Q8_0"), nt.get_rows(rows, torch.tensor([2, 0]), "Q8_0"))
        assert torch.equal(nt.linear(x, odd, "Q8_0"), nt.linear(x, rows, "Q8_0"))
    out = torch.frombuffer(bytearray(2 * 192 + 1), dtype=torch.float16, offset=1)
    with pytest.raises(nd.OutputError, match="the address of out is not a multiple of 2; pass an aligned array"):
        nt.dequantize(rows, "Q8_0", out=out)


def test_what_pytorch_wraps_is_computed_as_before():
    """The tensors of torch.func have no storage that could be asked for."""
    x, blocks = torch.ones(3, 2, 32), torch.zeros(2, 34, dtype=torch.uint8)
    blocks[:, 1], blocks[:, 2] = 60, 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls the operator once for each
        found = torch.func.vmap(lambda columns: nt.linear(columns, blocks, "Q8_0"))(x)
    assert torch.equal(found, torch.full((3, 2, 2), 3.0))


@pytest.mark.parametrize("kind", ["sparse", "CSR", "nested", "strided nested"])
def test_an_output_that_is_not_dense_is_refused(kind):
    with pytest.raises(nd.OutputError, match=r"out is a tensor .*; pass a dense tensor"):
        nt.dequantize(torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", out=dict(odd_things())[kind])


def test_an_output_that_negates_other_memory_is_refused():
    out = torch.view_as_complex(torch.zeros(1, 2)).conj().imag
    assert out.is_neg()
    assert out.is_contiguous()
    with pytest.raises(nd.OutputError, match="out is a view that negates other memory"):
        nt.dequantize(torch.tensor([2.0]), "F32", out=out)


def test_lazy_conjugates_and_negatives_are_read_as_the_bytes_that_they_stand_for():
    lazy = torch.view_as_complex(torch.arange(68, dtype=torch.float32).reshape(2, 17, 2)).conj()
    for given, plain in ((lazy, lazy.resolve_conj()), (lazy.imag, lazy.imag.resolve_neg())):
        assert given.is_conj() or given.is_neg()
        assert torch.equal(nt.dequantize(given, "F32"), nt.dequantize(plain.contiguous().view(torch.uint8), "F32"))


def test_experts_of_another_dtype_are_read_as_their_bytes():
    blocks = torch.zeros(1, 2, 34, dtype=torch.uint8)
    blocks[..., 1], blocks[..., 2] = 60, 3  # a scale of 1, and a quant of 3
    x, ids = torch.ones(1, 32), torch.zeros(1, 1, dtype=torch.int64)
    found = nt.ggml.mul_mat_id(blocks.view(torch.float16), x, ids, 8, 2)
    assert torch.equal(found, torch.full((1, 1, 2), 3.0))


@pytest.mark.parametrize("number", [2, -1, 1 << 40, -(1 << 62)])
def test_all_rows_that_do_not_exist_are_index_errors(number):
    """PyTorch has several errors for them; which one depends on the dtype and the processor."""
    data = torch.zeros(2, 34, dtype=torch.uint8)
    with pytest.raises(IndexError, match="data has only 2 rows; pass numbers from 0 to 1"):
        nt.get_rows(data, torch.tensor([[0, number]]), "Q8_0")


def test_float8_is_not_multiplied():
    for call in (lambda x: nt.linear(x, torch.zeros(2, 34, dtype=torch.uint8), "Q8_0"),
                 lambda x: nt.ggml.mul_mat_vec(torch.zeros(2, 34, dtype=torch.uint8), x, 8, 2)):  # fmt: skip
        with pytest.raises(nd.DtypeError, match="float16, bfloat16, float32 or float64"):
            call(torch.zeros(3, 32).to(torch.float8_e4m3fn))


def test_a_shape_that_is_one_number_can_differ_from_that_of_out():
    with pytest.raises(nd.OutputError, match=r"out has shape \(2, 32\), the result has shape \(64,\)"):
        nt.dequantize(torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", shape=64, out=torch.zeros(2, 32))
