"""The page on launchers: its scripts run, on CPUs."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from finite_blocks import finite_blocks

pytest.importorskip("torch")
pytestmark = pytest.mark.long

PAGE = Path(__file__).parents[2] / "docs" / "launchers.md"
SHAPES = {"token_embd.weight": (10, 64), "blk.0.ffn_up.weight": (64, 64), "blk.0.ffn_down.weight": (64, 64)}


@pytest.fixture
def folder(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint32("llama.attention.key_length", 32)
    for name, (n_rows, n_elements) in SHAPES.items():
        blocks = finite_blocks("Q8_0", n_rows, n_elements, seed=0)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def code_of(section):
    """The script of a section."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


def run(folder, code, *launcher):
    (folder / "script.py").write_text(code, encoding="utf-8")
    command = [sys.executable, *launcher, "script.py"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    found = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=200)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def test_accelerate(folder):
    pytest.importorskip("accelerate")
    # Without GPUs, `accelerate launch` needs MPI to start several processes.
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    printed = run(folder, code_of("Accelerate"), *launch)  # two processes may write to one line
    assert sorted(re.findall(r"rank [01]: \(32, 64\)", printed)) == ["rank 0: (32, 64)", "rank 1: (32, 64)"], printed


def test_ray(folder):
    pytest.importorskip("ray")
    code = code_of("Ray").replace("/data/model.gguf", str(folder / "model.gguf")).replace("29501", free_port())
    lines = run(folder, code).splitlines()
    assert lines[-2:] == ["0 (32, 64)", "1 (32, 64)"]
