"""The built-in shapes: parameters and cache sizes as published, and a small version of each that runs."""

from dataclasses import replace

import pytest
import torch

from nasbench.model import MIXERS
from nasbench.model.shapes import MODELS
from nasbench.runtime.roofline import Ceilings
from nasbench.runtime.throughput import measure

PARAMETERS = {
    "qwen2.5-7b": 7_615_616_512,
    "llama3.2-3b": 3_212_749_824,
    "gemma3-1b": 999_885_952,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v2-lite": 15_706_484_224,
    "mamba2-2.7b": 2_702_599_680,
    # Its checkpoint has the value residual, a low-rank projection of rank 64 with a bias in all layers but one, and
    # norms with biases, one of them behind the embedding.
    "rwkv7-1.5b": 1_527_404_544 - 23 * (2 * 2048 * 64 + 2048) - (2 * 24 + 1) * 2048 - 2 * 2048,
}
PAPER_MIB = {
    "qwen2.5-1.5b": (1792, 1.0),
    "qwen3-1.7b": (7168, 1.0),
    "llama3.2-3b": (7168, 1.0),
    "mamba2-2.7b": (80, 1.0),
    # The fp32 states of the published shape are 12 MiB.
    "rwkv7-1.5b": (24, 0.5),
    # 128 MiB of full attention, 2.25 of windows and 27 of fp32 states: 157.25 for the released shape.
    "jet-nemotron-2b": (154, 157.25 / 154),
    "jet-nemotron-4b": (258, 1.0),
}
"""arXiv 2508.15884, table 1, 64K tokens; and the ratio of the formula to it where it is known to differ."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name):
    assert MODELS[name].parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", PAPER_MIB)
def test_cache_sizes_are_the_papers(name):
    shape, (paper, ratio) = MODELS[name], PAPER_MIB[name]
    mib = shape.cache_bytes(shape.placement, 1, 65536) / 2**20
    assert abs(mib - paper * ratio) <= 0.5


def test_latents_are_the_cache_of_latent_attention():
    shape = MODELS["deepseek-v2-lite"]
    assert shape.cache_bytes(shape.placement, 3, 1000) == 3 * 1000 * 27 * (512 + 64) * 2


SMALL_ARGS = {"W": "8", "J": "3x16x24", "G": "3x16x24", "M": "3x16x8x16", "R": "3x16", "C": "24x8x16x16"}
SMALL_FFN = {"moe": "moe@8x2x24", "gated": "gated", "none": "none", "channelmix": "channelmix"}


def small(shape):
    """Six layers of the same kinds in small sizes, every kind of the model among them."""
    kinds = list(dict.fromkeys(shape.placement))
    placement = (*kinds, *shape.placement[: 6 - len(kinds)])
    ffns = [text for text in dict.fromkeys(shape.ffn) for _ in range(6 // len(set(shape.ffn)))]
    return replace(
        shape, num_layers=6, hidden_size=48, intermediate_size=64 if shape.intermediate_size else 0, num_heads=3,
        num_kv_heads=3 if shape.num_heads == shape.num_kv_heads else 1, head_dim=16, vocab_size=97, max_context=64,
        published_placement=" ".join(placement), defaults=tuple(SMALL_ARGS.items()),
        ffn=tuple(text.replace(text.rpartition("+")[0] or text, SMALL_FFN[text.partition("@")[0]]) for text in ffns),
    )  # fmt: skip


@pytest.mark.parametrize("name", [*PARAMETERS])
def test_a_small_version_decodes_and_reads_prompts(name):
    shape = small(MODELS[name])
    result = measure(
        shape, shape.placement, context=24, batch=2, dtype=torch.bfloat16, seconds=0.01, chunk=10,
        ceilings=Ceilings(10.0, 10.0, 10.0, 1.0),
    )  # fmt: skip
    assert result.decode_tok_s > 0
    assert result.prefill_tok_s > 0
    assert result.cache_bytes == shape.cache_bytes(shape.placement, 2, 24)


@pytest.mark.parametrize("letter", list(MIXERS))
def test_what_training_keeps_grows_with_the_text(letter):
    """The formulas against an H200 are in tests/supernet/test_on_paper.py."""
    spec = MODELS["qwen2.5-1.5b"].mixer(letter)
    one, two, four = (spec.kept_bytes(tokens) for tokens in (1024, 2048, 4096))
    assert four - two == 2 * (two - one)
    assert one >= spec.kept_bytes(1024, trained=False) >= 0
    assert spec.kept_bytes(1024, 4, trained=False) <= 2 * spec.kept_bytes(1024, 2, trained=False)
