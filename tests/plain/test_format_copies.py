"""Copies of formats are the formats themselves; registering and making them checks what it gets."""

import importlib.metadata
import pickle
import subprocess
import sys
from copy import copy, deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
from blocks import assert_same_bits
from three_tensors import BLOCKS, open_model

import numba_dequant as nd
from numba_dequant import formats
from numba_dequant.backends import cpu
from numba_dequant.bits import load_8_floats
from numba_dequant.errors import shown
from numba_dequant.format import block_layout


@pytest.fixture
def model(tmp_path):
    return open_model(tmp_path)


class TestCopiesOfFormats:
    @pytest.mark.parametrize("source", nd.FORMATS.values(), ids=nd.FORMATS)
    def test_they_are_the_registered_one(self, source):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(source, protocol)) is source
        assert copy(source) is source
        assert deepcopy(source) is source

    def test_so_are_those_of_tensors_and_models(self, model):
        kept = model.load("token_embd.weight", device="cpu", keep_quantized=True)
        for thing in (kept, model.tensors["token_embd.weight"]):
            for found in (pickle.loads(pickle.dumps(thing)), deepcopy(thing)):
                assert found.format is nd.FORMATS["Q8_0"]
        for found in (pickle.loads(pickle.dumps(model)), deepcopy(model)):
            assert found.tensors["token_embd.weight"].format is nd.FORMATS["Q8_0"]
            assert_same_bits(found.load("ids", device="cpu"), model.load("ids", device="cpu"))

    def test_nothing_is_compiled_for_a_copy(self):
        tensor = nd.QuantizedTensor(np.zeros(34, np.uint8), nd.FORMATS["Q8_0"], (32,))
        tensor.dequantize(device="cpu")
        before = cpu._compile.cache_info()
        for _ in range(3):
            pickle.loads(pickle.dumps(tensor)).dequantize(device="cpu")
            deepcopy(tensor).dequantize(device="cpu")
        assert cpu._compile.cache_info() == before

    def test_one_that_is_not_registered_is_the_same_within_a_process(self, own_format):
        for _ in range(2):
            assert pickle.loads(pickle.dumps(own_format)) is own_format
        assert deepcopy(own_format) is own_format
        stored = pickle.dumps(own_format)
        fields = own_format._fields
        del own_format
        assert pickle.loads(stored) is pickle.loads(stored)
        assert pickle.loads(stored)._fields == fields

    def test_one_made_of_the_same_things_is_another(self, own_format):
        other = nd.Format(*own_format._fields)
        assert copy(other) is deepcopy(other) is other
        assert other != own_format

    def test_one_whose_functions_cannot_be_imported_is_refused_unless_registered(self):
        layout = block_layout(d="f2", qs=("i1", 32))
        local = nd.Format("OWN_local", 908, 32, layout, "", lambda blocks: blocks, lambda block, at, run: None)
        with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            pickle.dumps(local)
        assert copy(local) is local

    def test_another_process_imports_the_module_that_registers_it(self, tmp_path):
        (tmp_path / "own_formats.py").write_text(
            "import numba_dequant as nd\n"
            "ours = nd.FORMATS['Q8_0']\n"
            "def dequantize(blocks): return ours.dequantize(blocks)\n"
            "def decode(block, at, run): return ours.decode(block, at, run)\n"
            "OWN = nd.register(nd.Format('OWN', 909, 32, ours.layout, '', dequantize, decode))\n"
        )
        write = "import own_formats, pickle; print(pickle.dumps(own_formats.OWN).hex())"
        read = (
            "import pickle, sys; own = pickle.loads(bytes.fromhex(sys.argv[1]));"
            "import own_formats; assert own is own_formats.OWN; print(own.name)"
        )
        options = {"capture_output": True, "text": True, "cwd": tmp_path}
        written = subprocess.run([sys.executable, "-c", write], check=False, **options)
        assert written.returncode == 0, written.stderr
        found = subprocess.run([sys.executable, "-c", read, written.stdout.strip()], check=False, **options)
        assert found.stdout == "OWN\n", found.stderr


@pytest.fixture
def plugin(tmp_path):
    """Runs code where a package is installed whose entry points name a format, a module, and something broken."""
    (tmp_path / "own_formats.py").write_text(
        "import numba_dequant as nd\n"
        "ours = nd.FORMATS['Q8_0']\n"
        "def dequantize(blocks): return ours.dequantize(blocks)\n"
        "def decode(block, at, run): return ours.decode(block, at, run)\n"
        "OWN = nd.Format('OWN', 909, 32, ours.layout, '', dequantize, decode)\n"
    )
    (tmp_path / "own_module.py").write_text(
        "import numba_dequant as nd, own_formats as own\n"
        "nd.register(nd.Format('Second', 910, 32, own.ours.layout, '', own.dequantize, own.decode))\n"
    )
    metadata = tmp_path / "own-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[numba_dequant.formats]\nfirst = own_formats:OWN\nlost = not_there\nsecond = own_module\n"
    )

    def run(code):
        start = "import warnings, numpy as np, numba_dequant as nd; data = bytes(range(34))\n"
        found = subprocess.run(
            [sys.executable, "-c", start + code], check=False, capture_output=True, text=True, cwd=tmp_path
        )
        assert found.returncode == 0, found.stderr
        return found

    return run


@pytest.mark.parametrize("name", ["'OWN'", "'own'", "909", "'second'", "910", "'SECOND'"])
def test_formats_of_installed_packages_are_found(plugin, name):
    found = plugin(
        f"values = nd.dequantize(data, {name}, device='reference')\n"
        "assert np.array_equal(values, nd.dequantize(data, 'Q8_0', device='reference'), equal_nan=True)\n"
        "assert {'OWN', 'Second'} < set(nd.FORMATS)\n"
    )
    assert "the formats of 'not_there' are not registered: ModuleNotFoundError" in found.stderr


def test_a_thread_waits_while_another_registers_the_formats_of_packages(plugin):
    plugin(
        "import importlib.metadata, threading, time\n"
        "real, inside = importlib.metadata.entry_points, threading.Event()\n"
        "def slow(**options):\n"
        "    inside.set(); time.sleep(0.5)\n"
        "    return real(**options)\n"
        "importlib.metadata.entry_points = slow\n"
        "warnings.simplefilter('ignore')\n"
        "first = threading.Thread(target=lambda: nd.dequantize(data, 'OWN', device='reference'))\n"
        "first.start(); inside.wait()\n"
        "nd.dequantize(data, 'OWN', device='reference')\n"
        "first.join()\n"
    )


def test_packages_are_not_asked_for_formats_that_are_known(plugin):
    found = plugin(
        "import sys\n"
        "for name in ('Q8_0', 'q8_0', 8, nd.FORMATS['Q8_0']): nd.dequantize(data, name, device='reference')\n"
        "assert 'own_formats' not in sys.modules\n"
        "try: nd.dequantize(data, 'nothing')\n"
        "except nd.UnknownFormatError as error: print(error)\n"
    )
    assert "unknown format 'nothing'" in found.stdout


class Packages:
    """Installed packages in this process, in place of those that there are. Counts how often they are asked for."""

    def __init__(self, monkeypatch):
        self.formats, self.asked = [], 0
        monkeypatch.setattr(formats, "_plugins_are_loaded", False)
        monkeypatch.setattr(importlib.metadata, "entry_points", self.entry_points)

    def entry_points(self, group):
        assert group == formats.ENTRY_POINTS
        self.asked += 1
        return [SimpleNamespace(value=f"package:{number}", load=each) for number, each in enumerate(self.formats)]


@pytest.fixture
def packages(monkeypatch):
    return Packages(monkeypatch)


@pytest.mark.parametrize("name", ["OWN_by_hand", "own_BY_hand", 907])
def test_a_format_of_a_package_is_registered_at_the_first_unknown_name_or_id(packages, own_format, name):
    """Also if two entry points name it, or if one names a module without formats."""
    packages.formats = [lambda: own_format, lambda: own_format, lambda: importlib]
    assert formats.format_named(name) is own_format
    assert nd.FORMATS["OWN_by_hand"] is own_format


def test_packages_are_asked_for_formats_once(packages):
    for name in ("Q8_0", "q8_0", 8, nd.FORMATS["Q8_0"]):
        formats.format_named(name)
    assert packages.asked == 0
    for _ in range(2):
        for unknown in ("nothing", 908):
            with pytest.raises(nd.UnknownFormatError):
                formats.format_named(unknown)
    assert packages.asked == 1


def test_a_package_that_fails_causes_a_warning_and_the_others_are_registered(packages, own_format):
    def fails():
        raise RuntimeError("not today")

    packages.formats = [fails, lambda: own_format]
    expected = "the formats of 'package:0' are not registered: RuntimeError: not today"
    with pytest.warns(RuntimeWarning, match=expected):
        assert formats.format_named("OWN_by_hand") is own_format


def test_unpickling_imports_the_module_of_a_format_only_if_the_format_is_unknown(monkeypatch, own_format):
    imported = []

    def load(name):
        imported.append(name)
        nd.register(own_format)

    monkeypatch.setattr(formats, "import_module", load)
    assert formats.registered("Q8_0", "somewhere") is nd.FORMATS["Q8_0"]
    with pytest.raises(nd.UnknownFormatError):
        formats.registered("OWN_by_hand", None)
    assert imported == []
    assert formats.registered("OWN_by_hand", "somewhere") is own_format
    assert imported == ["somewhere"]


def test_a_format_of_one_s_own_that_is_decoded_as_ours_is_not_built_in(own_format):
    assert formats.is_built_in(nd.FORMATS["Q8_0"])
    assert not formats.is_built_in(own_format)


def test_a_format_without_code_to_compile_is_not_built_in():
    assert not formats.is_built_in(nd.FORMATS["I8"])


class TestRegister:
    def test_what_is_no_format(self):
        for wrong in ("Q8_0", None, 5, nd.Format, BLOCKS):
            with pytest.raises(nd.OptionError, match="register takes a Format"):
                nd.register(wrong)

    @pytest.mark.parametrize(("name", "ggml_id"), [("Q8_0", 1000), ("q8_0", 1000), ("NEW", 8)])
    def test_clashes(self, name, ggml_id):
        before = dict(nd.FORMATS)
        with pytest.raises(nd.OptionError, match="clashes with Q8_0"):
            nd.register(nd.Format(name, ggml_id, 1, block_layout(value="u2"), ""))
        assert dict(nd.FORMATS) == before

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("name", value) for value in (None, 5, "", b"Q", ["Q"])),
            *(("ggml_id", value) for value in (None, "8", 8.0, -1, 2**32, True, 10**5000)),
            *(("block_size", value) for value in (None, "32", 32.0, 0, -8, 31, True)),
            *(("layout", value) for value in (None, "f2", np.float16, np.dtype("f2"), np.dtype([("d", "O")]), 5)),
            *(("layout", value) for value in (np.dtype([]), np.dtype([("a", "V0")]))),
            *(("summary", value) for value in (None, 5)),
            *(("dequantize", value) for value in (None, 5, [])),
            *(("decode", value) for value in (None, "decode", {})),
        ],
        ids=shown,
    )
    def test_a_format_of_wrong_things(self, field, value):
        ours = nd.FORMATS["Q8_0"]
        right = {name: getattr(ours, name) for name in ("block_size", "layout", "summary", "dequantize", "decode")}
        with pytest.raises(nd.OptionError):
            nd.Format(**({"name": "OWN", "ggml_id": 910} | right | {field: value}))


def twice_as_much(block, at, run):
    return np.float32(2) * load_8_floats(block, at)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_format_of_one_s_own_with_the_name_of_stored_floats_is_computed(device):
    own = nd.Format(
        "F32",
        5206,
        1,
        nd.FORMATS["F32"].layout,
        "twice as much",
        lambda blocks: 2 * blocks["x"][:, None],
        twice_as_much,
    )
    data = np.arange(16, dtype=np.float32)
    np.testing.assert_array_equal(nd.dequantize(data, own, "float32", device=device), 2 * data)
    np.testing.assert_array_equal(nd.dequantize(data, "F32", "float32", device=device), data)
