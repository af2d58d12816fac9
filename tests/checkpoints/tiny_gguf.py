"""Small random GGUF files of the llama architecture."""

import gguf
import numpy as np

TOKENS = ["<s>", "</s>", "<eot>", *sorted("abcdefghijklmnopqrstuvwxyz0123456789Ġ"), "ab", "abc"]
KINDS = [3, 3, 3, *[1] * 39]
MERGES = ["a b", "ab c"]
HEADS, HEAD_DIM, HIDDEN, WIDTH = 2, 8, 16, 32
KEYS = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": WIDTH,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": KINDS,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def random_tensors(seed=0):
    """name -> fp32 values of a model of KEYS."""
    draw = np.random.default_rng(seed)
    sizes = {
        "token_embd": (len(TOKENS), HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        **{f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (WIDTH, HIDDEN),
        "blk.0.ffn_up": (WIDTH, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, WIDTH),
    }
    return {f"{name}.weight": draw.normal(size=size).astype(np.float32) * 0.3 for name, size in sizes.items()}


def write_gguf(path, architecture="llama", tensors=None, **keys):
    """Writes KEYS changed by `keys` (dots as double underscores; None leaves a key out) and the tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    changed = {name.replace("__", "."): value for name, value in keys.items()}
    for name, value in (KEYS | changed).items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, values in (random_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
