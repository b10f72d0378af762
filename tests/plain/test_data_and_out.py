"""Memory as people pass it: data of every kind, arrays to write to, and what may not be combined."""

import array
import ctypes
import math
import mmap
import re

import ml_dtypes
import numpy as np
import pytest
from blocks import assert_same_bits
from three_tensors import BLOCKS, TENSORS, dequantize, open_model

import numba_dequant as nd
from numba_dequant.arguments import is_on_gpu
from numba_dequant.backends.overlap import Memory, check_apart

EXPECTED = nd.dequantize(BLOCKS, "Q8_0", device="reference")


@pytest.fixture
def model(tmp_path):
    return open_model(tmp_path)


class TestData:
    def test_what_has_bytes(self):
        record = BLOCKS.view(nd.FORMATS["Q8_0"].layout)
        mapped = mmap.mmap(-1, BLOCKS.size)
        mapped[:] = BLOCKS.tobytes()
        for data in (
            BLOCKS.tobytes(),
            memoryview(BLOCKS).cast("B", (6, 34)),
            (ctypes.c_char * BLOCKS.size).from_buffer_copy(BLOCKS.tobytes()),
            array.array("B", BLOCKS.tobytes()),
            mapped,
            BLOCKS.view(np.matrix),
            record,
            record.view(np.recarray),
            BLOCKS.view(">i4"),
            BLOCKS.view(ml_dtypes.bfloat16),
            nd.dequantize(BLOCKS, "BF16", "bfloat16", device="cpu"),
        ):
            for device in ("cpu", "reference"):
                assert_same_bits(dequantize(data, device=device), EXPECTED)

    def test_rows_of_a_padded_array(self):
        padded = np.full((6, 50), 255, np.uint8)
        padded[:, :34] = BLOCKS.reshape(6, 34)
        strided = padded[:, :34]
        backwards = BLOCKS[::-1].copy()[::-1]
        columns = np.asfortranarray(BLOCKS.reshape(6, 34))
        for data in (strided, memoryview(strided), backwards, columns, memoryview(columns), np.repeat(BLOCKS, 2)[::2]):
            for device in ("cpu", "reference"):
                assert_same_bits(dequantize(data, device=device), EXPECTED)
            assert nd.explain(data, "Q8_0", block=5).values.shape == (32,)

    def test_a_batch_reads_a_strided_array_anew(self):
        room = np.zeros((6, 50), np.uint8)
        batch = nd.prepare_many({1: (room[:, :34], "Q8_0")}, device="cpu")
        assert (batch.run()[1] == 0).all()
        room[:, :34] = BLOCKS.reshape(6, 34)
        assert_same_bits(batch.run()[1], EXPECTED)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("text", "cannot read bytes from 'text'"),
            (np.str_("text"), "cannot read bytes"),
            ([1, 2], r"cannot read bytes from \[1, 2\]; pass bytes, "),
            (None, "cannot read bytes from None"),
            (np.array([object()]), "an array of object, not of bytes"),
            (np.array(["text"]), "an array of <U4, not of bytes"),
            (np.ma.masked_array(BLOCKS, BLOCKS > 3), "masked array"),
            (np.ndarray, "cannot read bytes"),
        ],
    )
    def test_what_has_none(self, data, message):
        with pytest.raises(nd.DataError, match=message):
            dequantize(data)
        with pytest.raises(nd.DataError, match="tensor 'a': .*" + message):
            nd.dequantize_many({"a": (data, "Q8_0")}, device="cpu")

    def test_what_lies_on_a_gpu_is_not_read_here(self):
        class OnGpu:
            def __dlpack_device__(self):
                return (2, 0)

        with pytest.raises(nd.DeviceError, match="the data is on a GPU"):
            dequantize(OnGpu())
        with pytest.raises(nd.DataError, match="data is on a GPU"):
            nd.explain(OnGpu(), "Q8_0")

    def test_a_device_that_cannot_be_asked_for(self):
        class Foreign:
            def __dlpack_device__(self):
                raise ValueError("Unknown device type for DLPack")

            __dlpack__ = __dlpack_device__

        assert not is_on_gpu(Foreign())
        with pytest.raises(nd.DataError, match="cannot read bytes from Foreign: Unknown device type"):
            dequantize(Foreign())

    def test_no_memory_for_a_copy_or_a_result(self):
        endless = np.broadcast_to(BLOCKS, (2**42, BLOCKS.size))
        for call in (lambda: dequantize(endless[:, ::-1]), lambda: dequantize(endless)):
            with pytest.raises(nd.DeviceError, match=r"out of memory: [\d,]+ bytes are needed for the result"):
                call()
        with pytest.raises(nd.DeviceError, match=r"tensor 'a': .*out of memory"):
            nd.dequantize_many({"a": (endless, "Q8_0")}, device="cpu")


class TestOut:
    def test_a_matrix(self):
        for device in ("cpu", "reference"):
            out = np.empty((6, 32), np.float16).view(np.matrix)
            assert dequantize(device=device, out=out) is out
            assert_same_bits(np.asarray(out).reshape(-1), EXPECTED)

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            (np.empty(191, np.float16), r"shape \(191,\), the result has 192 elements"),
            (np.empty(192, np.float32), "float32, the result is float16"),
            (np.empty(192, ">f2"), "float16 of the other byte order"),
            (np.empty(384, np.float16)[::2], r"not C-contiguous \(its strides are \(4,\)\)"),
            (np.empty((32, 6), np.float16).T, "not C-contiguous"),
            (np.frombuffer(bytes(384), np.float16), "read-only; pass a writable"),
            (np.empty(385, np.uint8)[1:].view(np.float16), "not a multiple of 2"),
            (np.ma.masked_array(np.empty(192, np.float16), True, hard_mask=True), "masked array"),
            ([0] * 192, r"must be a NumPy array or a PyTorch tensor if the device is cpu, got \[0, 0"),
            (bytearray(384), "must be a NumPy array"),
            (nd.FORMATS, "must be a NumPy array"),
        ],
        ids=["size", "dtype", "order", "strided", "columns", "read-only", "odd", "masked", "list", "bytes", "mapping"],
    )
    def test_what_is_wrong_is_said(self, out, message, model):
        with pytest.raises(nd.OutputError, match=message):
            dequantize(out=out)
        with pytest.raises(nd.OutputError, match="tensor 'a': .*" + message):
            nd.dequantize_many({"a": (BLOCKS, "Q8_0")}, device="cpu", out={"a": out})
        if not isinstance(out, np.ndarray):
            with pytest.raises(nd.OutputError, match="must be a NumPy array"):
                model.load("token_embd.weight", device="cpu", out=out)

    def test_one_that_shares_memory_with_another(self, model):
        room = np.zeros(1000, np.uint8)
        room[:204] = BLOCKS
        left, right = room[204 : 204 + 384].view(np.float16), room[500:884].view(np.float16)
        data, other = room[:204], BLOCKS.tobytes()
        for tensors, out, message in (
            (
                {"a": (other, "Q8_0"), "b": (other, "Q8_0")},
                {"a": left, "b": left},
                "out of tensor '[ab]' shares memory with out of tensor '[ab]'",
            ),
            (
                {"a": (other, "Q8_0"), "b": (other, "Q8_0")},
                {"a": right, "b": left},
                "out of tensor '[ab]' shares memory with out of tensor '[ab]'",
            ),
            (
                {"a": (other, "Q8_0"), "b": (data, "Q8_0")},
                {"a": room[:384].view(np.float16), "b": right},
                "out of tensor 'a' shares memory with the data of tensor 'b'",
            ),
            ({"a": (data, "Q8_0")}, {"a": room[100:484].view(np.float16)}, "tensor 'a': out shares memory with data"),
        ):
            before = room.copy()
            with pytest.raises(nd.OutputError, match=message):
                nd.dequantize_many(tensors, device="cpu", out=out)
            with pytest.raises(nd.OutputError, match=message):
                nd.prepare_many(tensors, device="cpu", out=out)
            np.testing.assert_array_equal(room, before)
        shared = np.zeros(16, np.int32)
        norm, ids = shared[:5].view(np.float32), shared[2:5]
        with pytest.raises(nd.OutputError, match="shares memory with out of"):
            model.load_all(device="cpu", dtype="fp32", out={"blk.0.attn_norm.weight": norm, "ids": ids})
        assert not shared.any()

    def test_neighbours_do_not_share(self):
        room = np.zeros(1000, np.uint8)
        room[:204] = BLOCKS
        tensors = {"a": (room[:204], "Q8_0"), "b": (room[:204], "Q8_0"), "c": (b"", "Q8_0")}
        out = {
            "a": room[204 : 204 + 384].view(np.float16),
            "b": room[588 : 588 + 384].view(np.float16),
            "c": room[300:300].view(np.float16),
        }
        for values in list(nd.dequantize_many(tensors, device="cpu", out=out).values())[:2]:
            assert_same_bits(values, EXPECTED)

    def test_a_long_piece_is_compared_with_all_that_follow(self):
        long = Memory(0, 1000, "long", is_out=True)
        pieces = [long, *(Memory(2000 + 10 * i, 2010 + 10 * i, i, is_out=True) for i in range(99))]
        check_apart(pieces)
        for is_out in (True, False):
            with pytest.raises(nd.OutputError, match="'long'"):
                check_apart([*pieces, Memory(10, 20, "early", is_out=False)])
            with pytest.raises(nd.OutputError, match="'long'"):
                check_apart([*pieces, Memory(990, 995, "late", is_out=is_out)])
        check_apart(Memory(0, 10, name, is_out=False) for name in range(5))
        check_apart([])

    def test_an_unmatched_name_of_any_kind(self):
        with pytest.raises(nd.OutputError, match="is in tensors or in out, but not in both"):
            nd.dequantize_many({"a": (bytes(34), "Q8_0")}, device="cpu", out={10**5000: 1})


class TestChoices:
    """What is to be loaded, and how."""

    @pytest.mark.parametrize("kind", ["info", "list", "expressions", "mapping", "set", "generator", "array", "mixed"])
    def test_select(self, model, kind):
        infos = list(model.tensors.values())
        select, names = {
            "info": (infos[2], ["ids"]),
            "list": ([infos[2], infos[0]], ["token_embd.weight", "ids"]),
            "expressions": ([re.compile("^ids$"), re.compile("norm")], ["blk.0.attn_norm.weight", "ids"]),
            "mapping": (model.tensors, list(TENSORS)),
            "set": ({"ids"}, ["ids"]),
            "generator": ((info for info in infos if info.format.name == "I32"), ["ids"]),
            "array": (np.array(["ids", "blk*"]), ["blk.0.attn_norm.weight", "ids"]),
            "mixed": (("tok*", infos[2], re.compile("norm")), list(TENSORS)),
        }[kind]
        assert list(model.load_all(select, device="cpu")) == names

    @pytest.mark.parametrize(
        "select", [5, b"ids", [b"ids"], [5], [["ids"]], re.compile(b"ids"), {1: 2}, np.array(5), str, object(), 0.5]
    )
    def test_select_of_a_wrong_kind(self, model, select):
        for call in (model.load_all, model.stream):
            with pytest.raises(nd.OptionError, match="select must be a name or a glob"):
                call(select, device="cpu")

    def test_a_tensor_info_stands_for_its_name(self, model):
        assert_same_bits(model.load(model.tensors["ids"], device="cpu"), model.load("ids", device="cpu"))
        for name in (["ids"], b"ids", 5, None, {}):
            with pytest.raises(nd.TensorNotFoundError, match="the name of a tensor must be a str or a TensorInfo"):
                model.load(name, device="cpu")

    @pytest.mark.parametrize("threads", [0, -1, True, "2", 2.5, math.nan, [], np.array([1, 2]), 2**63])
    def test_threads_of_a_wrong_kind(self, model, threads):
        for call in (model.load_all, model.stream, lambda **options: model.load("ids", **options)):
            with pytest.raises(nd.OptionError, match="threads must be a whole number, 1 or more"):
                call(device="cpu", threads=threads)

    @pytest.mark.parametrize("threads", [1, np.int64(2), 2**63 - 1])
    def test_threads(self, model, threads):
        assert list(model.load_all(device="cpu", threads=threads)) == list(TENSORS)

    @pytest.mark.parametrize("prefetch", [None, -1, False, "2", 0.5, 2**63])
    def test_prefetch_of_a_wrong_kind(self, model, prefetch):
        with pytest.raises(nd.OptionError, match="prefetch must be a whole number, 0 or more"):
            model.stream(device="cpu", prefetch=prefetch)

    @pytest.mark.parametrize("prefetch", [0, np.int64(1), 2**63 - 1])
    def test_prefetch(self, model, prefetch):
        assert list(dict(model.stream(device="cpu", prefetch=prefetch))) == list(TENSORS)

    @pytest.mark.parametrize(
        "rows", [range(2), 0, slice(0, 2.0), slice(0, 2, 1.0), slice("a"), slice(True), slice([]), (0, 2), "0:2"]
    )
    def test_rows_of_a_wrong_kind(self, model, rows):
        with pytest.raises(nd.ShapeError, match=r"such as slice\(0, 100\), got"):
            model.load("token_embd.weight", device="cpu", rows=rows)

    def test_rows(self, model):
        whole = model.load("token_embd.weight", device="cpu")
        for rows in (slice(np.int64(1), np.uint8(3)), slice(1, 3, 1), slice(-(10**30), 10**30), slice(None)):
            assert_same_bits(model.load("token_embd.weight", device="cpu", rows=rows), whole[rows])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"callback": 5}, "callback must be a function that takes a Progress, got 5"),
            ({"progress": "yes"}, "progress must be True, False or None, got 'yes'"),
            ({"keep_quantized": "no"}, "keep_quantized must be True or False, got 'no'"),
        ],
    )
    def test_options_of_a_wrong_kind(self, model, options, message):
        for call in (model.load_all, model.stream):
            with pytest.raises(nd.OptionError, match=message):
                call(device="cpu", **options)

    @pytest.mark.parametrize("out", [[1], np.zeros(64, np.float16), 5, "ids", dict])
    def test_outs_that_are_no_mapping(self, model, out):
        with pytest.raises(nd.OutputError, match="out must be a mapping, name -> array"):
            model.load_all(device="cpu", out=out)
        with pytest.raises(nd.OutputError, match="out must be a mapping, name -> array"):
            nd.dequantize_many({"a": (BLOCKS, "Q8_0")}, device="cpu", out=out)

    @pytest.mark.parametrize("tensors", [[(BLOCKS, "Q8_0")], None, 5, "ids", (BLOCKS, "Q8_0")])
    def test_tensors_that_are_no_mapping(self, tensors):
        with pytest.raises(nd.DataError, match="tensors must be a mapping"):
            nd.dequantize_many(tensors, device="cpu")

    @pytest.mark.parametrize("entry", [(), (BLOCKS,), (BLOCKS, "Q8_0", (6, 32), 1), [BLOCKS, "Q8_0"], BLOCKS, None])
    def test_entries_that_are_no_tensor(self, entry):
        with pytest.raises(nd.DataError, match="tensor 'a' must be "):
            nd.prepare_many({"a": entry}, device="cpu")

    @pytest.mark.parametrize("block", [1.5, "x", None, -1, 6, True, [0], pytest.param(10**5000, id="huge")])
    def test_blocks_that_are_none(self, block):
        with pytest.raises(nd.ShapeError, match="there is no block"):
            nd.explain(BLOCKS, "Q8_0", block)

    @pytest.mark.parametrize("element", [1.5, "x", None, -1, 32, True, [0], pytest.param(10**5000, id="huge")])
    def test_elements_that_are_none(self, element):
        with pytest.raises(nd.ShapeError, match="element"):
            nd.explain(BLOCKS, "Q8_0", 0, element)

    def test_a_mapping_of_a_wrong_kind(self):
        for mapping in ("x", ["tile"], None, 5, b"tile", "TILE"):
            with pytest.raises(nd.OptionError, match="mapping must be one of 'tile', 'block', got"):
                dequantize(mapping=mapping)
