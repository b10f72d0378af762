"""How long transformers takes to load a GGUF file, alone and with `numba_dequant.accelerate("transformers")`.

    python benchmarks/transformers_load.py     # writes results/transformers-load.json; then run report.py

The file is that of a llama with 150 million weights, in Q4_K and Q6_K, and with 32 000 tokens; it is written to a
temporary folder. Needs transformers, accelerate, gguf and PyTorch. No GPU is used. Before the first reading, one load
of each kind fills the caches: the file is in memory then, and the kernels are compiled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "transformers-load.json"

HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS, TOKENS = 768, 2048, 12, 4, 16, 32_000


def tensors() -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, format and shape of every tensor."""
    kv = HIDDEN // HEADS * KV_HEADS
    found: list[tuple[str, str, tuple[int, ...]]] = [
        ("token_embd", "Q4_K", (TOKENS, HIDDEN)),
        ("output", "Q6_K", (TOKENS, HIDDEN)),
        ("output_norm", "F32", (HIDDEN,)),
    ]
    for layer in range(LAYERS):
        better = "Q6_K" if layer % 2 else "Q4_K"
        matrices = [
            ("attn_q", "Q4_K", (HIDDEN, HIDDEN)),
            ("attn_k", "Q4_K", (kv, HIDDEN)),
            ("attn_v", better, (kv, HIDDEN)),
            ("attn_output", "Q4_K", (HIDDEN, HIDDEN)),
            ("ffn_gate", "Q4_K", (WIDE, HIDDEN)),
            ("ffn_up", "Q4_K", (WIDE, HIDDEN)),
            ("ffn_down", better, (HIDDEN, WIDE)),
            ("attn_norm", "F32", (HIDDEN,)),
            ("ffn_norm", "F32", (HIDDEN,)),
        ]
        found += [(f"blk.{layer}.{name}", kind, shape) for name, kind, shape in matrices]
    return found


def write(path: Path) -> int:
    """Write the file; the result is the number of its weights."""
    import gguf
    import numpy as np
    from models import blocks

    import numba_dequant as nd

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("benchmark")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token {number}" for number in range(TOKENS)])
    writer.add_token_scores([0.0] * TOKENS)
    writer.add_token_types([1] * TOKENS)
    n_weights = 0
    for number, (name, kind, shape) in enumerate(tensors()):
        n_weights += int(np.prod(shape))
        if kind == "F32":
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            data = blocks(kind, nd.FORMATS[kind].n_bytes(shape), seed=number).reshape(shape[0], -1)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.sync()
    return n_weights


def load(path: Path, *, is_ours: bool) -> None:
    """Load the file in this process, and print what that took as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    import numba_dequant as nd

    if is_ours:
        nd.accelerate("transformers")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        logits = model(torch.arange(16).view(1, 16)).logits
    found = {
        "seconds": seconds,
        "MiB": peak / 1024,
        "MiB before": before / 1024,
        "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        "is finite": bool(logits.isfinite().all()),
    }
    print(json.dumps(found))


def measured(path: Path, *, is_ours: bool) -> dict[str, float]:
    """What one load takes, in a new process."""
    settings = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "--load", str(path), *(["--ours"] if is_ours else [])]
    found = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(found.stderr)
    result: dict[str, float] = json.loads(found.stdout.strip().splitlines()[-1])
    return result


def main() -> int:
    """Write and print the results; fail if the logits differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=5, help="loads of each kind")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load, is_ours=options.ours)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        n_weights = write(path)
        size = path.stat().st_size
        for is_ours in (False, True):
            measured(path, is_ours=is_ours)
        readings = [(measured(path, is_ours=False), measured(path, is_ours=True)) for _ in range(options.times)]
    if len({each["logits"] for pair in readings for each in pair}) != 1:
        sys.exit("the logits differ")
    if not all(each["is finite"] for pair in readings for each in pair):
        sys.exit("the logits are not finite")
    found = {
        "weights": n_weights,
        "tokens": TOKENS,
        "bytes": size,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("transformers", "torch", "gguf", "numpy", "numba")},
        "readings": [
            [{key: each[key] for key in ("seconds", "MiB", "MiB before")} for each in pair] for pair in readings
        ],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
