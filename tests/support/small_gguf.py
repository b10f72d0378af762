"""Small GGUF files that transformers can load, in many formats."""

import gguf
import numpy as np
from finite_blocks import finite_blocks

from numba_dequant import FORMATS

HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS, TOKENS = 256, 512, 4, 2, 2, 320
KV = HIDDEN // HEADS * KV_HEADS
PLAIN = {"F32": np.float32, "F16": np.float16}


def add_tensor(writer, name, kind, shape, seed):
    """Random values of moderate size; a tensor of one dimension is near 1, as the weight of a norm."""
    if kind in PLAIN:
        values = np.random.default_rng(seed).normal(len(shape) == 1, 0.05, shape)
        writer.add_tensor(name, values.astype(PLAIN[kind]))
    else:
        blocks = finite_blocks(kind, *shape, seed=seed)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])


def add_model(writer, name):
    """What all architectures have: sizes and a vocabulary."""
    writer.add_name(name)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token {number}" for number in range(TOKENS)])
    writer.add_token_scores([0.0] * TOKENS)
    writer.add_token_types([1] * TOKENS)


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llama(path, kinds):
    """A model of the architecture llama, whose matrices take the formats `kinds` in turn."""
    writer = gguf.GGUFWriter(path, "llama")
    add_model(writer, "small llama")
    writer.add_head_count_kv(KV_HEADS)
    matrices = [("token_embd", (TOKENS, HIDDEN)), ("output", (TOKENS, HIDDEN))]
    norms = ["output_norm"]
    for layer in range(LAYERS):
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
        matrices += [
            (f"blk.{layer}.{name}", shape)
            for name, shape in (
                ("attn_q", (HIDDEN, HIDDEN)),
                ("attn_k", (KV, HIDDEN)),
                ("attn_v", (KV, HIDDEN)),
                ("attn_output", (HIDDEN, HIDDEN)),
                ("ffn_gate", (WIDE, HIDDEN)),
                ("ffn_up", (WIDE, HIDDEN)),
                ("ffn_down", (HIDDEN, WIDE)),
            )
        ]
    write_tensors(writer, norms, matrices, kinds)


def write_lfm2(path, kinds):
    """A model of the architecture lfm2, which transformers keeps packed: a convolution and an attention."""
    writer = gguf.GGUFWriter(path, "lfm2")
    add_model(writer, "small lfm2")
    writer.add_head_count_kv([0, KV_HEADS])
    writer.add_shortconv_l_cache(3)
    matrices = [("token_embd", (TOKENS, HIDDEN))]
    norms = ["token_embd_norm"]
    for layer, parts in enumerate(
        (
            (("shortconv.in_proj", (3 * HIDDEN, HIDDEN)), ("shortconv.out_proj", (HIDDEN, HIDDEN))),
            (
                ("attn_q", (HIDDEN, HIDDEN)),
                ("attn_k", (KV, HIDDEN)),
                ("attn_v", (KV, HIDDEN)),
                ("attn_output", (HIDDEN, HIDDEN)),
            ),
        )
    ):
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
        feed_forward = (("ffn_gate", (WIDE, HIDDEN)), ("ffn_up", (WIDE, HIDDEN)), ("ffn_down", (HIDDEN, WIDE)))
        matrices += [(f"blk.{layer}.{name}", shape) for name, shape in (*parts, *feed_forward)]
    add_tensor(writer, "blk.0.shortconv.conv.weight", "F32", (HIDDEN, 3), 50)
    for number, name in enumerate(("blk.1.attn_q_norm", "blk.1.attn_k_norm")):
        add_tensor(writer, f"{name}.weight", "F32", (HIDDEN // HEADS,), 60 + number)
    write_tensors(writer, norms, matrices, kinds)


def write_tensors(writer, norms, matrices, kinds):
    for number, name in enumerate(norms):
        add_tensor(writer, f"{name}.weight", "F32", (HIDDEN,), 100 + number)
    for number, (name, shape) in enumerate(matrices):
        kind = kinds[number % len(kinds)]
        assert kind in PLAIN or shape[-1] % FORMATS[kind].block_size == 0, (name, kind)
        add_tensor(writer, f"{name}.weight", kind, shape, number)
    close(writer)
