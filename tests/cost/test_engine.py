"""Caches as vLLM lays them out: layers in groups of one kind, pages of one size."""

import json
from dataclasses import replace

import pytest

from nasbench.cli.main import run
from nasbench.core.errors import UserError
from nasbench.cost.engine import BLOCK_TOKENS, engine_cache
from nasbench.model.shapes import MODELS

SHAPE = replace(MODELS["jet-nemotron-2b"], num_layers=24, published_placement="")
TOKEN_BYTES = 2 * 2 * 128 * 2
"""Keys and values of two heads of 128 in bf16."""


def cache(placement: str, context: int = 65536, batch: int = 1):
    return engine_cache("vllm", SHAPE, SHAPE.parse(placement), context, batch, 2)


@pytest.mark.parametrize(
    ("placement", "groups", "layers", "padding"),
    [
        ("24A", 1, 24, 0),
        ("8A 8W 8J", 3, 8, 0),
        ("12A 12J", 2, 12, 0),
        ("12A W 11J", 24, 1, 0),  # every layer for itself
        ("18J 6A", 4, 6, 0),
        ("10J 14A", 2, 14, 4),
        ("5A 19J", 5, 5, 1),
    ],
)
def test_groups_have_the_size_of_the_rarest_kind(placement, groups, layers, padding):
    found = cache(placement)
    assert (found.groups, found.group_layers, found.padding_layers) == (groups, layers, padding)


def test_a_kind_with_one_layer_is_not_as_good_as_equal_thirds():
    """Fast-LLM measured 30,500 tokens/s at 8/8/8 and 11,700 at 12/1/11."""
    assert cache("8A 8W 8J").step_factor == (1.0, 1.0)
    low, high = cache("12A W 11J").step_factor
    assert low < 30500 / 11700 == pytest.approx(high, rel=0.01)


def test_pages():
    alone = cache("24A", 1000, 3)
    assert (alone.block_tokens, alone.page_bytes) == (BLOCK_TOKENS, BLOCK_TOKENS * TOKEN_BYTES)
    assert alone.cache_bytes == 3 * 24 * 63 * alone.page_bytes
    mixed = cache("12A 12J")
    spec = SHAPE.mixer("J")
    state = spec.cache_bytes(1, 1) + spec.conv_state_bytes(1)
    assert mixed.page_bytes - BLOCK_TOKENS * TOKEN_BYTES < state <= mixed.page_bytes
    assert mixed.cache_bytes == 12 * mixed.page_bytes * (-(-65536 // mixed.block_tokens) + 1)
    assert cache("24J").block_tokens == 0
    # A window keeps its tokens, and a page that it only partly needs.
    assert cache("24W").cache_bytes == 24 * (1152 // BLOCK_TOKENS + 1) * BLOCK_TOKENS * TOKEN_BYTES
    assert cache("24W", 1000).cache_bytes == 24 * 63 * BLOCK_TOKENS * TOKEN_BYTES


def test_the_command(capsys):
    asked = ["cost", "14J A 4J A 2W 6J", "--model", "jet-nemotron-2b", "--context", "64k", "--engine"]
    assert run([*asked, "vllm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engine"]["groups"] == 14
    assert run([*asked, "vllm"]) == 0
    assert "14 groups of 2 layers" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown engine 'vlm': choose from vllm"):
        engine_cache("vlm", SHAPE, SHAPE.placement, 1, 1, 2)
