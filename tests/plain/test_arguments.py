"""Arguments as people pass them: formats, output types, devices and shapes."""

import array
import enum
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from blocks import assert_same_bits
from three_tensors import BLOCKS, TENSORS, dequantize, open_model

import numba_dequant as nd
from numba_dequant.arguments import MAX_DIMENSIONS
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

    def test_a_file_type_of_a_format_that_is_unknown_is_no_id(self):
        kinds = enum.IntEnum("LlamaFileType", {"MOSTLY_NEW": 8})
        with pytest.raises(nd.UnknownFormatError, match=r"unknown format <LlamaFileType\.MOSTLY_NEW: 8>"):
            format_named(kinds.MOSTLY_NEW)

    def test_any_enumeration(self):
        kinds = enum.Enum("kinds", {"Q8_0": 8, "EIGHT": 8, "Q4_0": 3, "FAR": 8.5})
        assert format_named(kinds.Q8_0).name == "Q8_0"
        with pytest.raises(nd.UnknownFormatError, match="has the name of Q4_0, whose ggml id is 2, not 3; pass"):
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
            "UD-Q8_0": "Q8_0",
        }.items(),
    )
    def test_a_file_type_names_the_tensor_type_that_is_meant(self, file_type, format):
        with pytest.raises(nd.UnknownFormatError, match=f"is a file type.* are {format}, .*such as '{format}'"):
            format_named(file_type)

    @pytest.mark.parametrize(
        ("format", "message"),
        [
            ("Q9_Z", r"unknown format 'Q9_Z'\. Known formats: F32"),
            ("q4__k", r"unknown format 'q4__k'\. Did you mean 'Q4_K'\? Known formats: F32"),
            ("8", r"unknown format '8'\. Pass a ggml id as an int: 8"),
            ("999", r"unknown format '999'\. Known formats: F32"),
            (-1, r"a ggml id is a number from 0 to 2\*\*32 - 1, got -1; pass the id"),
            (2**32, r"a ggml id is a number from 0 to 2\*\*32 - 1, got 4294967296; pass the id"),
            (2**32 - 1, r"unknown ggml type 4294967295; install a newer"),
            (True, "a ggml id or a Format, got True"),
            (["Q8_0"], r"a ggml id or a Format, got \['Q8_0'\]"),
            (b"Q8_0", "a ggml id or a Format, got b'Q8_0'"),
            (8.0, r"a ggml id or a Format, got 8\.0"),
            pytest.param(10**5000, "got an int of 16610 bits; pass the id or the name", id="huge"),
        ],
    )
    def test_what_is_none_gets_no_wrong_hint(self, format, message):
        with pytest.raises(nd.UnknownFormatError, match=message) as raised:
            dequantize(format=format)
        assert "'I8'" not in str(raised.value)

    def test_a_registered_format_is_found_in_any_case(self, own_format):
        assert nd.register(own_format) is own_format
        assert format_named("own_by_hand") is own_format

    def test_a_registered_format_takes_its_place_among_the_ids(self, own_format):
        nd.register(replace(own_format, ggml_id=9_999))
        nd.register(replace(own_format, ggml_id=910, name="LATER"))
        assert [*nd.FORMATS][-2:] == ["LATER", "OWN_by_hand"]


class Unwilling(type):
    """A class of such classes does not say which dtype they are."""

    @property
    def dtype(cls):
        raise RuntimeError("not now")


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
            (">f2", "'>f2', which has the wrong byte order"),
            (np.dtype(">f4"), "which has the wrong byte order"),
            (np.float16(3), "choose one of"),
            (np.zeros(3, np.float16), r"ndarray of shape \(3,\); choose"),
            ("", "''; choose"),
            (["float16"], "choose one of"),
            (Unwilling("Unwilling", (), {}), "Unwilling.*; choose one of"),
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
            (Named("mps"), "Only NVIDIA GPUs and the CPU"),
            ("xpu:0", "Only NVIDIA GPUs and the CPU"),
            (Named("meta"), "The meta device has no memory"),
            (
                device_of_library("jaxlib.xla", platform="tpu", local_hardware_id=0),
                "Only NVIDIA GPUs and the CPU",
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
        with pytest.raises(nd.ShapeError, match="its other extents are too large"):
            dequantize(b"", shape=shape)
