"""Arguments as people pass them, and one wall for all others.

The first part is what works; the second passes every kind of wrong thing as every argument.
"""

import array
import ctypes
import enum
import math
import mmap
import re

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same_bits
from three_tensors import BLOCKS, TENSORS, dequantize, open_model

import numba_dequant as nd
from numba_dequant.arguments import MAX_DIMENSIONS, Memory, check_apart, is_on_gpu
from numba_dequant.backends.devices import DeviceSpec, parse_device
from numba_dequant.dtypes import dtype_name
from numba_dequant.formats import format_named

EXPECTED = nd.dequantize(BLOCKS, "Q8_0", device="reference")


@pytest.fixture
def model(tmp_path):
    return open_model(tmp_path)


class TestFormat:
    @pytest.mark.parametrize(
        "format",
        ["q8_0", " Q8_0\n", "GGML_TYPE_Q8_0", "ggml_type_q8_0", 8, np.int64(8), np.array(8), nd.FORMATS["Q8_0"]],
        ids=repr,
    )
    def test_every_way_to_say_it(self, format):
        assert format_named(format) is nd.FORMATS["Q8_0"]
        assert_same_bits(dequantize(format=format), EXPECTED)
        assert nd.explain(BLOCKS, format).format.name == "Q8_0"
        assert_same_bits(nd.dequantize_many({1: (BLOCKS, format)}, device="cpu")[1], EXPECTED)

    def test_the_types_of_gguf_py(self):
        gguf = pytest.importorskip("gguf")
        for kind in gguf.GGMLQuantizationType:
            if kind.value in {source.ggml_id for source in nd.FORMATS.values()}:
                assert format_named(kind) is format_named(str(kind.name)) is format_named(int(kind))

    def test_file_types_of_gguf_py_are_no_formats(self):
        """They are enumerated too: MOSTLY_Q8_0 is number 7, which is Q5_1 among the formats."""
        gguf = pytest.importorskip("gguf")
        for kind in gguf.LlamaFileType:
            with pytest.raises(nd.UnknownFormatError):
                format_named(kind)
        with pytest.raises(nd.UnknownFormatError, match=r"MOSTLY_Q8_0: 7> is a file type.*such as 'Q8_0'"):
            format_named(gguf.LlamaFileType.MOSTLY_Q8_0)

    def test_any_enumeration(self):
        kinds = enum.Enum("kinds", {"Q8_0": 8, "EIGHT": 8, "Q4_0": 3, "FAR": 8.5})
        assert format_named(kinds.Q8_0).name == "Q8_0"
        with pytest.raises(nd.UnknownFormatError, match="has the name of Q4_0, but its id is 2"):
            format_named(kinds.Q4_0)
        with pytest.raises(nd.UnknownFormatError):
            format_named(kinds.FAR)

    @pytest.mark.parametrize(
        ("file_type", "format"),
        {
            "Q4_K_M": "Q4_K",
            "q3_k_l": "Q3_K",
            "MOSTLY_Q8_0": "Q8_0",
            "LLAMA_FTYPE_MOSTLY_IQ3_XS": "IQ3_S",
            "LLAMA_FTYPE_ALL_F32": "F32",
            "MOSTLY_IQ2_S": "IQ2_XS",
            "UD-Q4_K_XL": "Q4_K",
            "MXFP4_MOE": "MXFP4",
        }.items(),
    )
    def test_a_file_type_names_the_tensor_type_that_is_meant(self, file_type, format):
        with pytest.raises(nd.UnknownFormatError, match=f"is a file type.* here {format}, .*such as '{format}'"):
            format_named(file_type)

    @pytest.mark.parametrize(
        ("format", "message"),
        [
            ("Q9_Z", r"unknown format 'Q9_Z'\. Known formats: F32"),
            ("q4__k", r"unknown format 'q4__k'\. Did you mean 'Q4_K'\? Known formats: F32"),
            ("8", r"unknown format '8'\. A ggml id is passed as an int: 8"),
            (True, "a ggml id or a Format, got True"),
            (["Q8_0"], r"a ggml id or a Format, got \['Q8_0'\]"),
            (b"Q8_0", "a ggml id or a Format, got b'Q8_0'"),
            (8.0, r"a ggml id or a Format, got 8\.0"),
            pytest.param(10**5000, "unknown ggml type an int of 16610 bits", id="huge"),
        ],
    )
    def test_what_is_none_gets_no_wrong_hint(self, format, message):
        with pytest.raises(nd.UnknownFormatError, match=message) as raised:
            dequantize(format=format)
        assert "'I8'" not in str(raised.value)

    def test_a_registered_format_is_found_in_any_case(self, own_format):
        nd.register(own_format)
        assert format_named("own_by_hand") is own_format


class TestDtype:
    @pytest.mark.parametrize(
        ("name", "spellings"),
        [
            ("float16", ["fp16", "FP16", "half", "f2", "<f2", "=f2", "float16", "F16", "torch.half", "np.float16"]),
            ("bfloat16", ["bf16", "BF16", "bfloat16", "torch.bfloat16", "ml_dtypes.bfloat16", ml_dtypes.bfloat16]),
            ("float32", ["fp32", "F32", "single", "f4", "<f4", "float", "torch.float", "float32", " Float32 "]),
            ("float32", [np.float32, np.dtype("f4"), np.single]),
            ("float16", [np.float16, np.dtype("<f2"), np.half, np.str_("float16")]),
        ],
    )
    def test_every_way_to_say_it(self, name, spellings):
        for spelling in spellings:
            assert dtype_name(spelling) == name, spelling
            assert dequantize(dtype=spelling).dtype.name == name
            assert nd.dequantize_many({1: (BLOCKS, "Q8_0")}, spelling, device="cpu")[1].dtype.name == name

    def test_what_calls_itself_as_a_type_of_torch(self):
        class TorchDtype:
            def __str__(self):
                return "torch.bfloat16"

        assert dequantize(dtype=TorchDtype()).dtype == ml_dtypes.bfloat16

    def test_none_is_the_type_of_out_and_else_float16(self, model):
        assert dequantize(dtype=None).dtype == np.float16
        for kind in (np.float16, ml_dtypes.bfloat16, np.float32):
            out = np.empty(192, kind)
            assert dequantize(dtype=None, out=out) is out
            assert_same_bits(out, dequantize(dtype=kind))
            assert nd.dequantize_many({1: (BLOCKS, "Q8_0")}, None, device="cpu", out={1: out})[1] is out
            out = np.empty((4, 64), kind)
            assert model.load("token_embd.weight", None, device="cpu", out=out) is out
            found = model.load_all(dtype=None, device="cpu", out={"token_embd.weight": out})
            assert found["token_embd.weight"] is out
            assert found["blk.0.attn_norm.weight"].dtype == np.float16
        out = np.empty(34, np.int8)
        assert dequantize(bytes(34), "I8", None, out=out) is out

    @pytest.mark.parametrize(
        ("dtype", "message"),
        [
            ("float64", "'float64'; choose one of float16, bfloat16, float32"),
            (float, "<class 'float'>, which is float64"),
            ("np.float", "'np.float'; "),
            ("double", "'double'; "),
            (np.int8, "which is int8"),
            (">f2", "'>f2', which is of the other byte order"),
            (np.dtype(">f4"), "which is of the other byte order"),
            (np.float16(3), "choose one of"),
            (np.zeros(3, np.float16), r"ndarray of shape \(3,\); choose"),
            ("", "''; choose"),
            (["float16"], "choose one of"),
        ],
        ids=repr,
    )
    def test_what_is_none(self, dtype, message):
        with pytest.raises(nd.DtypeError, match=message):
            dequantize(dtype=dtype)
        with pytest.raises(nd.DtypeError, match=message):
            nd.dequantize_many({1: (BLOCKS, "Q8_0")}, dtype, device="cpu")

    def test_patterns_may_be_expressions(self, model):
        found = model.load_all(dtype={re.compile("norm|ids"): "fp32", "*": None}, device="cpu")
        assert found["blk.0.attn_norm.weight"].dtype == np.float32
        assert found["token_embd.weight"].dtype == np.float16
        for pattern in (re.compile(b"norm"), 5, None):
            with pytest.raises(nd.DtypeError, match="a pattern in dtype must be"):
                model.load_all(dtype={pattern: "fp32", "*": "fp16"}, device="cpu")


class Named:
    """Like torch.device: its str() is the name, and it equals no string."""

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return self.name


def device_of_library(module, **attributes):
    return type("Device", (), {"__module__": module, **attributes})()


class TestDevice:
    @pytest.mark.parametrize(
        "device",
        ["cpu", "CPU", " cpu", "cpu:0", Named("cpu"), np.str_("cpu"), device_of_library("jaxlib.xla", platform="cpu")],
    )
    def test_every_way_to_say_cpu(self, device, model):
        assert parse_device(device) == DeviceSpec("cpu")
        assert_same_bits(dequantize(device=device), EXPECTED)
        assert list(model.load_all(device=device)) == list(TENSORS)

    @pytest.mark.parametrize(
        ("device", "index"),
        [
            ("cuda", 0),
            ("cuda:1", 1),
            ("CUDA:12", 12),
            (0, 0),
            (3, 3),
            (np.int64(2), 2),
            (Named("cuda"), 0),
            (Named("cuda:1"), 1),
            (device_of_library("cupy.cuda.device", id=1), 1),
            (device_of_library("numba.cuda.cudadrv.driver", id=1), 1),
            (device_of_library("cuda.core._device", device_id=1), 1),
            (device_of_library("jaxlib.xla_client", platform="gpu", local_hardware_id=1), 1),
        ],
    )
    def test_every_way_to_say_a_gpu(self, device, index, monkeypatch):
        monkeypatch.setattr("numba_dequant.backends.devices.why_no_cuda", lambda: None)
        place = parse_device(device)
        assert place.kind in ("cuda", "simulator")
        assert place.index == index

    @pytest.mark.parametrize(
        ("device", "message"),
        [
            ("gpu", "An NVIDIA GPU is called 'cuda'"),
            (Named("mps"), "on NVIDIA GPUs and on the CPU only"),
            ("xpu:0", "on NVIDIA GPUs and on the CPU only"),
            (Named("meta"), "The meta device has no memory"),
            (
                device_of_library("jaxlib.xla", platform="tpu", local_hardware_id=0),
                "on NVIDIA GPUs and on the CPU only",
            ),
            ("cuda:" + "1" * 5000, "unknown device 'cuda:111"),
            ("cuda:1\u0661", "unknown device"),
            ("cuda:x", "unknown device 'cuda:x'"),
            ("cpu:1", "unknown device"),
            ("", "unknown device ''"),
            (-1, "unknown device -1"),
            (True, "unknown device True"),
            pytest.param(10**5000, "unknown device an int of 16610 bits", id="huge"),
            ([], "unknown device"),
            (0.0, "unknown device"),
        ],
    )
    def test_what_is_none(self, device, message):
        with pytest.raises(nd.DeviceError, match=message) as raised:
            dequantize(device=device)
        assert len(str(raised.value)) < 300


class TestShape:
    @pytest.mark.parametrize(
        "shape",
        [
            (6, 32),
            [6, 32],
            np.array([6, 32]),
            np.array([6, 32], np.uint64),
            (np.int64(6), np.uint8(32)),
            array.array("q", [6, 32]),
            range(6, 33, 26),
            (-1, 32),
            (6, -1),
            np.array([-1, 32]),
        ],
        ids=repr,
    )
    def test_every_way_to_say_it(self, shape):
        assert dequantize(shape=shape).shape == (6, 32)
        assert nd.dequantize_many({1: (BLOCKS, "Q8_0", shape)}, device="cpu")[1].shape == (6, 32)

    @pytest.mark.parametrize("shape", [192, np.int64(192), np.array(192), -1, [-1], (192,)], ids=repr)
    def test_one_dimension(self, shape):
        assert dequantize(shape=shape).shape == (192,)

    def test_the_shape_of_gguf_py_is_a_memory_map(self, tmp_path):
        path = tmp_path / "shape"
        path.write_bytes(np.array([32, 6], "<u8").tobytes())
        assert dequantize(shape=np.memmap(path, "<u8", "r")[::-1]).shape == (6, 32)

    def test_nothing_in_any_shape(self):
        assert dequantize(b"", shape=(0, 32)).shape == (0, 32)
        assert dequantize(b"", shape=(5, -1)).shape == (5, 0)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((6, 33), r"shape \(6, 33\) does not have as many elements as the data, 192"),
            ((), "does not have as many"),
            ((-1, -1), "does not have as many"),
            ((-2, -3, -32), "does not have as many"),
            ((-1, 7), "no number in place of -1"),
            ((-1, 0), "no number in place of -1"),
            ((True, 192), "whole numbers, rows first, got"),
            (b"\xc0", "whole numbers"),
            ("192", "whole numbers"),
            ({192}, "whole numbers"),
            ((2.0, 96), "whole numbers"),
            (np.array([2.0, 96.0]), "whole numbers"),
            (np.array([[6, 32]]), "whole numbers"),
            (np.ones(10**6, np.int8), "whole numbers|dimensions"),
            ((10**5000, 1), "does not have as many"),
            ((2**63, 1), "does not have as many"),
            ((1,) * MAX_DIMENSIONS + (192,), f"an array has {MAX_DIMENSIONS} at most"),
            ([1] * 10**6, f"an array has {MAX_DIMENSIONS} at most"),
        ],
        ids=range(18),
    )
    def test_what_is_none(self, shape, message):
        with pytest.raises(nd.ShapeError, match=message) as raised:
            dequantize(shape=shape)
        assert len(str(raised.value)) < 300

    def test_as_many_dimensions_as_numpy_has(self):
        shape = (1,) * (MAX_DIMENSIONS - 1) + (192,)
        assert dequantize(shape=shape).shape == shape

    @pytest.mark.parametrize("shape", [(0, 2**62, 2**62), (2**63, 0), (0, 2**60), (10**5000, 0)], ids=range(4))
    def test_no_elements_in_more_than_there_can_be(self, shape):
        with pytest.raises(nd.ShapeError, match="larger than any array"):
            dequantize(b"", shape=shape)


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

        with pytest.raises(nd.DeviceError, match="the data lies on a GPU"):
            dequantize(OnGpu())
        with pytest.raises(nd.DataError, match="data lies on a GPU"):
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
            with pytest.raises(nd.DeviceError, match=r"out of memory: [\d,]+ bytes were asked for, for the result"):
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
            (np.empty(384, np.float16)[::2], r"not contiguous, rows first \(its strides are \(4,\)\)"),
            (np.empty((32, 6), np.float16).T, "not contiguous"),
            (np.frombuffer(bytes(384), np.float16), "read-only; pass a writable"),
            (np.empty(385, np.uint8)[1:].view(np.float16), "not a multiple of 2"),
            (np.ma.masked_array(np.empty(192, np.float16), True, hard_mask=True), "masked array"),
            ([0] * 192, r"must be a NumPy array or a PyTorch tensor where the device is cpu, got \[0, 0"),
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
        with pytest.raises(nd.OutputError, match="is in one of tensors and out"):
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
            with pytest.raises(nd.TensorNotFoundError, match="a tensor is named by a str or a TensorInfo"):
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
        with pytest.raises(nd.ShapeError, match=r"such as slice\(0, 100\), not"):
            model.load("token_embd.weight", device="cpu", rows=rows)

    def test_rows(self, model):
        whole = model.load("token_embd.weight", device="cpu")
        for rows in (slice(np.int64(1), np.uint8(3)), slice(1, 3, 1), slice(-(10**30), 10**30), slice(None)):
            assert_same_bits(model.load("token_embd.weight", device="cpu", rows=rows), whole[rows])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"callback": 5}, "callback must be a function of a Progress, got 5"),
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
        with pytest.raises(nd.DataError, match="tensor 'a' is a "):
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
