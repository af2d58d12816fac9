"""Caches as a serving engine lays them out, which groups layers by kind. Imports no torch.

vLLM (its hybrid KV cache manager, docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager) puts layers of one kind into
groups of equal size, the last one padded. The size is the smallest number of layers of any kind; the largest, where
that is less than 1.5 times as many (vllm-project/vllm pull request 49472). Every group has a block table of its own.
All pages have one size in bytes: a page of keys and values holds so many tokens that a recurrent state fits in it.

So a placement with one layer of a kind has a group for every layer. A step rebuilds the tables of all groups: two
published measurements show by how much that lengthens it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil

from nasbench.core.errors import unknown
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement

ENGINES = ("vllm",)
BLOCK_TOKENS = 16
"""Tokens of a page, unless a state needs more; pages hold a multiple of it."""
CLOSE = 1.5
"""Kinds whose numbers of layers differ by less than this factor share groups of the larger size."""
SLOWER = (0.035, 0.077)
"""Share of a step that each group beyond one a kind adds, least and most. 46 groups of four kinds instead of 10 halved
the speed of Qwen3.6-35B-A3B on an H200 (vllm-project/vllm pull request 51742). 24 groups of three kinds instead of 3
made 24 layers 2.6 times slower (Fast-LLM: 12/1/11 against 8/8/8)."""


@dataclass(frozen=True)
class EngineCache:
    """The caches of a decode batch in an engine.

    Attributes:
        groups: of layers, each with a block table.
        group_layers: layers of a group, padding included.
        padding_layers: layers that take pages and hold nothing.
        block_tokens: tokens of a page of keys and values; 0 where no layer has any.
        page_bytes: of one layer.
        cache_bytes: all pages of the batch.
        step_factor: least and most that the groups lengthen a step.
    """

    groups: int
    group_layers: int
    padding_layers: int
    block_tokens: int
    page_bytes: int
    cache_bytes: int
    step_factor: tuple[float, float]


def engine_cache(
    engine: str, shape: ModelSpec, placement: Placement, context: int, batch: int, dtype_bytes: int
) -> EngineCache:
    """Lays the caches of a placement out as an engine does. Raises UserError for an engine that is not known."""
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    tokens: Counter[tuple[int, int]] = Counter()  # (bytes of a token, tokens kept at this context)
    states: Counter[int] = Counter()  # bytes of a state with its convolution inputs
    for spec in shape.mixers(placement):
        one, two, whole = (spec.cache_bytes(1, length, dtype_bytes) for length in (1, 2, context))
        growth = two - one
        state = one - growth + spec.conv_state_bytes(1, dtype_bytes)
        if growth:
            tokens[growth, (whole - one) // growth + 1] += 1
        if state:
            states[state] += 1
    widest, largest = max((size for size, _ in tokens), default=0), max(states, default=0)
    block = BLOCK_TOKENS * max(1, ceil(largest / (widest * BLOCK_TOKENS))) if widest else 0
    page = max(widest * block, largest)
    # A window that has moved on keeps a page that it only partly needs.
    pages = [(count, ceil(kept / block) + (kept < context)) for (_, kept), count in tokens.items()]
    pages += [(count, 1) for count in states.values()]
    counts = [count for count, _ in pages] or [0]
    layers = max(counts) if max(counts) < CLOSE * min(counts) else min(counts)
    groups = [(ceil(count / layers), each) for count, each in pages if layers]
    total = sum(number for number, _ in groups)
    more = max(0, total - len(pages))
    return EngineCache(
        groups=total, group_layers=layers, padding_layers=total * layers - sum(counts), block_tokens=block,
        page_bytes=page, cache_bytes=batch * page * layers * sum(number * each for number, each in groups),
        step_factor=(1 + SLOWER[0] * more, 1 + SLOWER[1] * more),
    )  # fmt: skip
