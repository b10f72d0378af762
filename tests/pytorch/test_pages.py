"""Each piece of Python on the pages about PyTorch runs."""

import json
import os
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from blocks import assert_same_bits, write_model
from finite_blocks import finite_blocks

import numba_dequant as nd
from numba_dequant.integrations import patching

torch = pytest.importorskip("torch")

DOCS = Path(__file__).parents[2] / "docs"
WIDTH, HIDDEN = 256, 512
PROGRAMS = ("peft", "safetensors", "gguf", "transformers", "diffusers")


def ones(n):
    return torch.ones(n).numpy().tobytes()


TENSORS = {
    "token_embd.weight": ("Q6_K", (100, WIDTH), finite_blocks("Q6_K", 100, WIDTH)),
    "blk.0.ffn_norm.weight": ("F32", (WIDTH,), ones(WIDTH)),
    "blk.0.ffn_up.weight": ("Q4_K", (HIDDEN, WIDTH), finite_blocks("Q4_K", HIDDEN, WIDTH)),
    "blk.0.ffn_down.weight": ("Q8_0", (WIDTH, HIDDEN), finite_blocks("Q8_0", WIDTH, HIDDEN)),
}


def pieces(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def cases(page):
    found = []
    for number, code in enumerate(pieces(page)):
        # A compiler needs another compiler, and takes long.
        marks = [pytest.mark.gpu] * ("torch.cuda.graph" in code) + [pytest.mark.long] * ("torch.compile(" in code)
        found.append(pytest.param(number, code, marks=marks, id=f"{number}-{code.splitlines()[-1][:30]}"))
    return found


def needs(code):
    """The programs that a piece imports."""
    return set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) & set(PROGRAMS)


class Page:
    """The pieces of a page are run in order; each may use names of those before it."""

    def __init__(self, page, folder):
        self.names, self.n_run, self.pieces, self.folder = {}, 0, pieces(page), folder

    def run(self, number):
        os.chdir(self.folder)
        for code in self.pieces[self.n_run : number]:
            if not needs(code) and "torch.cuda.graph" not in code and "torch.compile(" not in code:
                exec(code, self.names)
        exec(self.pieces[number], self.names)
        self.n_run = max(self.n_run, number + 1)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("pages"), Path.cwd()
    write_model(folder / "model.gguf", TENSORS)
    yield Page("pytorch.md", folder)
    os.chdir(before)


@pytest.mark.parametrize(("number", "code"), cases("pytorch.md"))
def test_with_pytorch(page, number, code):
    for program in needs(code):
        pytest.importorskip(program)
    with warnings.catch_warnings():
        if needs(code) or "torch.export" in code or "torch.compile" in code:
            warnings.simplefilter("ignore")  # they have some of their own
        page.run(number)


def piece(*words):
    """The piece of docs/programs.md with these words."""
    (found,) = [code for code in pieces("programs.md") if all(word in code for word in words)]
    return found


def needs_accelerate(program):
    if find_spec(f"numba_dequant.integrations.{program}") is None:
        pytest.skip(f"accelerate({program!r}) is not here")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def replaced(monkeypatch):
    """What a piece has replaced; it is restored."""
    found, accelerate = [], nd.accelerate
    monkeypatch.setattr(nd, "accelerate", lambda *names: found.append(accelerate(*names)) or found[-1])
    yield found
    for each in reversed(found):
        each.undo()


def run(code):
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the programs have some of their own
        exec(code, names)
    return names


def test_undo(replaced, capsys):
    pytest.importorskip("gguf")
    needs_accelerate("gguf")
    run(piece("undo()"))
    assert "gguf" in capsys.readouterr().out


def test_gguf_py(folder, replaced):
    pytest.importorskip("gguf")
    needs_accelerate("gguf")
    write_model(folder / "model.gguf", TENSORS)
    weights = run(piece("GGUFReader"))["weights"]
    for name, values in nd.load("model.gguf", dtype="float32", device="reference").items():
        assert_same_bits(np.asarray(weights[name]), np.asarray(values))


def test_transformers(folder, replaced):
    pytest.importorskip("transformers")
    needs_accelerate("transformers")
    small_gguf = pytest.importorskip("small_gguf")
    (folder / "folder").mkdir()
    small_gguf.write_llama(folder / "folder" / "model.gguf", ["Q4_K", "Q6_K"])
    names = run(piece("AutoModelForCausalLM"))
    assert names["model"].dtype == torch.bfloat16
    assert "gguf" in str(replaced[0])


def test_diffusers(folder, replaced):
    diffusers = pytest.importorskip("diffusers")
    gguf = pytest.importorskip("gguf")
    needs_accelerate("diffusers")
    sizes = {"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "num_attention_heads": 2, "num_layers": 1}
    sizes |= {"in_channels": 64, "out_channels": 16, "joint_attention_dim": 256, "patch_size": 2}
    config = {"_class_name": "QwenImageTransformer2DModel", **sizes}
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel.from_config(config)
    writer = gguf.GGUFWriter("qwen-image.gguf", "qwen_image")
    for name, like in model.state_dict().items():
        if like.dim() == 2 and like.shape[1] % 256 == 0:
            kind = gguf.GGMLQuantizationType.Q4_K
            writer.add_tensor(name, finite_blocks("Q4_K", *like.shape), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.zeros(like.shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    names = run(piece("from_single_file"))
    assert any(type(module).__name__ == "GGUFLinear" for module in names["transformer"].modules())
    assert "GGUFLinear" in str(replaced[0])


def test_comfyui(monkeypatch, replaced):
    """The node with stand-ins for ComfyUI and ComfyUI-GGUF, which it imports later."""
    needs_accelerate("comfyui")
    comfyui_gguf = pytest.importorskip("comfyui_gguf")
    handlers = []
    instance = SimpleNamespace(add_on_prompt_handler=handlers.append)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    run(piece("PromptServer"))
    assert not replaced
    comfy = comfyui_gguf.install(monkeypatch)
    for _ in range(2):
        assert handlers[0]({"a": "prompt"}) == {"a": "prompt"}
    assert len(replaced) == 1
    assert comfy.dequant.dequantize.__module__ == "numba_dequant.integrations.comfyui"


def test_vllm(monkeypatch):
    """The plugin, which vLLM would import and call."""
    needs_accelerate("vllm")
    called = []
    monkeypatch.setattr(nd, "accelerate", called.append)
    names = run(piece("def accelerate():"))
    (entry,) = re.findall(r'^numba_dequant = "(.*)"', (DOCS / "programs.md").read_text(), re.MULTILINE)
    module, _, function = entry.partition(":")
    assert f"`{module}.py`" in (DOCS / "programs.md").read_text()
    names[function]()
    assert called == ["vllm"]


@pytest.mark.parametrize("program", ["gguf", "transformers", "diffusers", "vllm"])
def test_known_versions(program, monkeypatch):
    needs_accelerate(program)
    monkeypatch.setattr(patching, "version", lambda package: "0.0.0")
    with pytest.raises(nd.OptionError, match="is unknown") as caught:
        nd.accelerate(program)
    first, last = re.search(r"knows (\S+) to (\S+);", str(caught.value)).groups()
    (row,) = [line for line in (DOCS / "programs.md").read_text().splitlines() if line.startswith(f'| `"{program}"` |')]
    assert row.split(" | ")[2] == (first if first == last else f"{first} to {last}")


def test_the_errors_are_those_that_are_published(monkeypatch):
    monkeypatch.syspath_prepend(DOCS.parent / "benchmarks")
    import accuracy

    kept = json.loads(accuracy.report.ACCURACY.read_text())["errors"]
    for name in ("Q4_K", "Q5_0"):
        found = accuracy.errors(name, accuracy.random_blocks(name))
        assert list(found) == list(kept[name])
        for way, figures in found.items():
            assert figures == pytest.approx(kept[name][way], rel=0.02, abs=0.002), (name, way)


def test_readme(folder, monkeypatch):
    """Its lines about PyTorch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    write_model(folder / "model.gguf", {**TENSORS, "blk.0.attn_q.weight": TENSORS["blk.0.ffn_up.weight"]})
    names = run(code)
    assert names["weights"]["token_embd.weight"].dtype == torch.bfloat16
    assert torch.equal(names["weight"], names["weights"]["blk.0.attn_q.weight"])


@pytest.mark.gpu
def test_a_graph_of_the_page_on_streams():
    (code,) = pieces("streams.md")
    blocks = torch.from_numpy(finite_blocks("Q8_0", 4, 256)).cuda()
    weights = torch.zeros(4, 256, dtype=torch.float16, device="cuda")
    exec(code, {"torch": torch, "nd": nd, "blocks": blocks, "weights": weights})
    torch.cuda.synchronize()
    expected = nd.dequantize(blocks.cpu().numpy(), "Q8_0", shape=(4, 256), device="reference")
    assert_same_bits(weights.cpu().numpy(), expected)
