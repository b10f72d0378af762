"""Models to load: the tensors of real ones, filled with random blocks, and written as fast as the disk takes them."""

import json
import math
import os
from dataclasses import dataclass, replace
from functools import cache

import gguf
import numpy as np

import numba_dequant as nd

CHUNK = 16 << 20


@dataclass(frozen=True)
class Architecture:
    """The sizes that decide which tensors a model has."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_q: int
    n_kv: int
    n_vocab: int
    has_own_output: bool = False


ARCHITECTURES = {
    "Gemma-3-270M": Architecture(18, 640, 2048, 1024, 256, 262_144),
    "Qwen2.5-0.5B": Architecture(24, 896, 4864, 896, 128, 151_936),
    "Llama-3.1-8B": Architecture(32, 4096, 14_336, 4096, 1024, 128_256, has_own_output=True),
}

# As in llama.cpp, rows that are not whole blocks of the first format have the second format.
Q4_K, Q6_K, Q8_0 = ("Q4_K", "Q5_0"), ("Q6_K", "Q8_0"), ("Q8_0", "Q8_0")
MIXES = {"Q4_K_M": (Q4_K, Q6_K), "Q8_0": (Q8_0, Q8_0)}


def tensors(name, mix, **changes):
    """Name, format and shape of every tensor; half the layers keep some matrices in the better format of the mix."""
    model = replace(ARCHITECTURES[name], **changes)
    plain, better = MIXES[mix]
    found = []

    def add(name, kinds, *shape):
        kind = kinds[0] if shape[-1] % nd.FORMATS[kinds[0]].block_size == 0 else kinds[1]
        found.append((name, kind, shape))

    add("token_embd.weight", better if not model.has_own_output else plain, model.n_vocab, model.n_embd)
    for layer in range(model.n_layers):
        kept = better if layer % 2 else plain
        add(f"blk.{layer}.attn_norm.weight", ("F32",), model.n_embd)
        add(f"blk.{layer}.attn_q.weight", plain, model.n_q, model.n_embd)
        add(f"blk.{layer}.attn_k.weight", plain, model.n_kv, model.n_embd)
        add(f"blk.{layer}.attn_v.weight", kept, model.n_kv, model.n_embd)
        add(f"blk.{layer}.attn_output.weight", plain, model.n_embd, model.n_q)
        add(f"blk.{layer}.ffn_norm.weight", ("F32",), model.n_embd)
        add(f"blk.{layer}.ffn_gate.weight", plain, model.n_ff, model.n_embd)
        add(f"blk.{layer}.ffn_up.weight", plain, model.n_ff, model.n_embd)
        add(f"blk.{layer}.ffn_down.weight", kept, model.n_embd, model.n_ff)
    add("output_norm.weight", ("F32",), model.n_embd)
    if model.has_own_output:
        add("output.weight", better, model.n_vocab, model.n_embd)
    return found


@cache
def blocks(kind, n_bytes, seed=0):
    """Random blocks whose scales are ordinary numbers."""
    source = nd.FORMATS[kind]
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 256, n_bytes // source.type_size * source.type_size, np.uint8).view(source.layout)
    for field, (stored, _) in source.layout.fields.items():
        if stored.kind == "f":
            found[field] = rng.standard_normal(len(found)) / 64
    found.flags.writeable = False
    return found.view(np.uint8)


def write(path, content, n_tokens=0, split=None):
    """A GGUF file of tensors (name, format, shape), with a vocabulary of so many tokens.

    `split` makes it a shard: its number, the number of shards, and the number of the tensors of all shards.
    """
    writer = gguf.GGUFWriter(path, "llama")
    if split:
        for key, number in zip(("split.no", "split.count", "split.tensors.count"), split, strict=True):
            writer.add_uint16(key, number)
    if n_tokens:
        writer.add_token_list([f"token {number}" for number in range(n_tokens)])
        writer.add_token_scores([0.0] * n_tokens)
        writer.add_token_types([1] * n_tokens)
    for name, kind, shape in content:
        source = nd.FORMATS[kind]
        rows = (*shape[:-1], shape[-1] // source.block_size * source.type_size)
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, rows, np.dtype(np.uint8), source.n_bytes(shape), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    chunks = {kind: blocks(kind, CHUNK) for kind in {kind for _, kind, _ in content}}
    for file in writer.fout or []:
        for _, kind, shape in content:
            file.write(bytes(-file.tell() % 32))
            left = nd.FORMATS[kind].n_bytes(shape)
            while left:
                left -= file.write(chunks[kind][: min(left, chunks[kind].size)].data)
        file.write(bytes(-file.tell() % 32))
    writer.close()
    os.sync()  # otherwise the disk is still writing while a load is measured
    return path


def write_safetensors(path, content):
    """A safetensors file of tensors of the same names and shapes, with random FP16 values."""
    header, end = {}, 0
    for name, _, shape in content:
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    chunk = np.random.default_rng(0).standard_normal(CHUNK // 2).astype(np.float16)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= file.write(chunk.view(np.uint8)[: min(end, CHUNK)].data)
    os.sync()
    return path
