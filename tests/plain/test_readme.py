"""README: each block of code runs, links lead somewhere, and its commands are those of CI and of the package."""

import doctest
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from blocks import write_model
from finite_blocks import finite_blocks

import numba_dequant as nd
from numba_dequant.cli import main

ROOT = Path(__file__).parents[2]
if not (ROOT / "README.md").exists():
    pytest.skip("the page is not here", allow_module_level=True)
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
BESIDE = ("accelerate", "load_file", "nd.open", "picture")
"""A word of each block of Python; each has a test below, but the one of PyTorch, in tests/pytorch/test_pages.py."""


def python(word):
    """The block of Python with this word."""
    (found,) = [code for language, code in BLOCKS if language == "python" and word in code]
    return found


def commands(word):
    """The lines of the block of commands with this word, without comments."""
    (found,) = [code for language, code in BLOCKS if not language and word in code]
    return [line.partition("  #")[0].strip() for line in found.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a model."""
    monkeypatch.chdir(tmp_path)
    tensors = {
        "token_embd.weight": ("Q6_K", (9, 256), finite_blocks("Q6_K", 9, 256)),
        "blk.0.attn_q.weight": ("Q4_K", (4, 256), finite_blocks("Q4_K", 4, 256)),
        "output_norm.weight": ("F32", (256,), np.ones(256, np.float32).tobytes()),
    }
    write_model(tmp_path / "model.gguf", tensors, [("general.architecture", "llama")])
    return tmp_path


@pytest.fixture
def on_the_cpu(monkeypatch):
    """A call without a device computes on the CPU, without a warning."""
    monkeypatch.setattr("numba_dequant.backends.devices.why_no_cuda", lambda: None)
    monkeypatch.setattr("numba_dequant.api.parse_device", lambda _: nd.backends.devices.DeviceSpec("cpu"))


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 200


def test_each_block_has_a_test():
    """Whoever adds one adds its test."""
    for language, code in BLOCKS:
        if language == "python":
            assert sum(word in code for word in BESIDE) == 1, code
        else:
            assert language == "pycon" or re.match(r"pip install |python3 -m venv |numba-dequant ", code), code


def test_what_it_looks_like():
    shown = "".join(code for language, code in BLOCKS if language == "pycon")
    test = doctest.DocTestParser().get_doctest(shown, {}, "README", "README.md", 0)
    assert len(test.examples) > 5
    output = []
    assert not doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=output.append).failed, "".join(output)


def test_load(folder, on_the_cpu, capsys):
    names = {}
    exec(python("nd.open"), names)
    assert capsys.readouterr().out == "['token_embd.weight', 'blk.0.attn_q.weight', 'output_norm.weight']\n"
    assert (names["weight"].shape, names["weight"].dtype.name) == ((4, 256), "bfloat16")
    assert names["rows"].shape == (2, 256)
    assert {name: values.dtype.name for name, values in names["weights"].items()} == {"blk.0.attn_q.weight": "float16"}


def test_programs(monkeypatch):
    """With a stand-in for transformers; tests/pytorch/test_pages.py runs the same with transformers itself."""
    called = []
    model = SimpleNamespace(from_pretrained=lambda *folder, **options: called.append((folder, options)))
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoModelForCausalLM=model))
    monkeypatch.setattr(nd, "accelerate", lambda *names: called.append(names))
    code = python("accelerate")
    exec(code, {"nd": nd})
    assert called == [("transformers",), (("folder",), {"gguf_file": "model.gguf", "dtype": "bfloat16"})]
    from numba_dequant.integrations import PROGRAMS

    assert set(re.findall(r'"(\w+)"', code.partition("model =")[0])) == set(PROGRAMS)


def test_notebook(folder):
    first, second = python("picture").splitlines()
    picture = eval(first, {"nd": nd})
    assert picture._repr_mimebundle_() or picture._repr_html_()
    assert "value of element 37" in str(eval(second, {"nd": nd, "model": nd.open("model.gguf")}))


def test_verify_and_bench(folder, capsys):
    """Without a GPU it warns, and that is not what is tested."""
    verify, bench = commands("numba-dequant bench")
    assert main.main([*shlex.split(verify)[1:], "--device", "cpu"]) == 0
    assert "Every bit agrees" in capsys.readouterr().out
    assert main.main([*shlex.split(bench)[1:], "--device", "cpu", "--formats", "Q8_0"]) == 0
    assert "Q8_0" in capsys.readouterr().out


def test_the_set_up_commands_are_those_of_ci():
    found = [code for language, code in BLOCKS if code.startswith("python3 -m venv")]
    assert len(found) == 2
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for step in found[1].strip().split(" && ")[1:]:
        assert step.removeprefix(".venv/bin/pip install ") in script


def test_what_is_installed_has_these_names():
    """The extras of the commands and of the table are those of the package."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set(re.findall(r"numba_dequant\[(.*?)\]", "".join(commands("pip install numba_dequant")))) | {"test"}
    named |= set(re.findall(r"^\| `\[(\w+)\]`", TEXT, re.MULTILINE))
    assert named <= set(project["optional-dependencies"])
    first, last = re.search(r"\| (3\.\d+) to (3\.\d+) \|", TEXT).groups()
    versions = [each.rpartition(" ")[2] for each in project["classifiers"] if "Python :: 3." in each]
    assert (versions[0], versions[-1]) == (first, last)
    assert project["requires-python"] == f">={first}"


@pytest.mark.toolkit
def test_the_least_compute_capability_is_the_one_that_the_compiler_knows():
    """For the CUDA version that is installed."""
    from importlib.metadata import version

    from numba_dequant.kernels import compiler

    least = dict(re.findall(r"^\| `\[cu(\d+)\]` .* (\d\.\d) \(\w+\) \|$", TEXT, re.MULTILINE))
    major = version("cuda-bindings").partition(".")[0]
    kernel = compiler.dequantize_kernel(nd.FORMATS["Q4_0"], "float16")
    capability = tuple(map(int, least[major].split(".")))
    assert compiler.assemble(compiler.ptx(kernel, capability), capability).startswith(b"\x7fELF")
    with pytest.raises(Exception, match=f"requires >={least[major]}"):
        compiler.ptx(kernel, {"12": (3, 7), "13": (7, 0)}[major])


def test_it_names_every_command():
    named = set(re.findall(r"`numba-dequant (\w+)", TEXT.partition("The commands;")[2]))
    assert named == set(main.COMMANDS)


def test_links_and_pictures_lead_somewhere():
    found = re.findall(r"\]\(([^)]+)\)", TEXT) + re.findall(r'(?:href|src|srcset)="([^"]+)"', TEXT)
    assert len(found) > 30
    for link in found:
        if link.startswith(("https://", "../../actions/")):
            continue
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, link
