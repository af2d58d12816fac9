"""Small layer shapes and helpers that the contract tests share."""

import torch
from torch import Tensor

from nasbench.model import MIXERS, LayerShape, MixerSpec, mixer_spec
from nasbench.model.block import Block, BlockCache
from nasbench.model.documents import Documents
from nasbench.model.meta import RotaryTables, SequenceMeta, StepMeta

PLAIN = LayerShape(hidden_size=48, num_heads=6, num_kv_heads=2, head_dim=8, max_context=64)
SHAPES = {
    "gqa": PLAIN,
    "bias": LayerShape(48, 6, 2, 8, 64, qkv_bias=True),
    "qknorm": LayerShape(48, 6, 6, 8, 64, qk_norm=True),
    "one-kv": LayerShape(40, 4, 1, 16, 64, qkv_bias=True, qk_norm=True, rope_scaling=("llama3", 8.0, 1.0, 4.0, 32.0)),
}
FURTHER_NAMES = (
    "W1", "W4", "W7", "W64", "G@3x16x4", "J@2x4x24", "J@2x4x24x32x3", "K@2x4x24", "L@3x16x4", "T@2x6x10", "M@4x12x20",
    "R@3x12", "C@10x6x8x12",
)  # fmt: skip
"""Beside every registered kind with its default arguments."""


def names() -> list[str]:
    return [*MIXERS, *FURTHER_NAMES]


def learners() -> list[str]:
    """Those that have parameters, and with them an output."""
    return [name for name in names() if mixer_spec(name, PLAIN).parameters()]


def build(name: str, shape: LayerShape = PLAIN, seed: int = 0) -> Block:
    """A mixer in which nothing is zero or one by construction, so that every path matters."""
    torch.manual_seed(seed)
    mixer = mixer_spec(name, shape).build()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def inputs(config: MixerSpec, batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, config.shape.hidden_size, generator=torch.Generator().manual_seed(seed))


TABLES = RotaryTables(256)


def chunk(start: int, tokens: int, device: str = "cpu", documents: Documents | None = None) -> SequenceMeta:
    return SequenceMeta(TABLES, torch.device(device), start, tokens, documents)


def step(positions: Tensor, max_seqlen: int, equal_lengths: bool) -> StepMeta:
    return StepMeta(TABLES, positions, max_seqlen, equal_lengths)


def whole(mixer: Block, x: Tensor) -> Tensor:
    return mixer(x, chunk(0, x.shape[1]))


def new_cache(mixer: Block, batch: int, context: int, dtype: torch.dtype = torch.float32) -> BlockCache:
    return mixer.new_cache(batch, context, device="cpu", dtype=dtype)


def in_chunks(mixer: Block, x: Tensor, sizes: list[int], cache: BlockCache) -> Tensor:
    outputs, start = [], 0
    for size in sizes:
        outputs.append(mixer(x[:, start : start + size], chunk(start, size), cache))
        start += size
    return torch.cat(outputs, dim=1)


def stepwise(mixer: Block, x: Tensor, start: int, cache: BlockCache, uniform: bool = True) -> Tensor:
    outputs = []
    for t in range(start, x.shape[1]):
        positions = torch.full((x.shape[0],), t)
        span = t + 1 if uniform else cache.context
        outputs.append(mixer(x[:, t : t + 1], step(positions, span, uniform), cache))
    return torch.cat(outputs, dim=1)
