"""Rotary position embeddings (arXiv 2104.09864) in the rotate-half layout of Llama and Qwen checkpoints.

| scaling | its numbers | source |
|---|---|---|
| none | | layers without positions |
| linear | factor | positions divided by the factor |
| dynamic | factor, original context | base that grows with the text, "NTK-aware" |
| llama3 | factor, low_freq_factor, high_freq_factor, original context | Llama 3.1 |
| yarn | attention factor, factor, beta_fast, beta_slow, original context, truncate | arXiv 2309.00071 |
| longrope | attention factor, original context, short factors, long factors | arXiv 2402.13753 |
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench.model.spec import Rotary


def _llama3(plain: Tensor, rotary: Rotary, factor: float, low: float, high: float, original: float) -> Tensor:
    """Divides frequencies whose wavelength exceeds `original / low` by the factor, keeps those below `original / high`,
    and blends linearly between."""
    turns = original * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return plain * (kept + (1 - kept) / factor)


def _yarn(
    plain: Tensor, rotary: Rotary, _: float, factor: float, fast: float, slow: float, original: float, truncate: float
) -> Tensor:
    """Keeps the pairs that turn more than `fast` times in the original context, divides those below `slow` turns by the
    factor, and blends linearly between, by the pair's number."""
    dim = 2 * len(plain)
    first, last = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta)) for turns in (fast, slow)
    )
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 if first == last else 0
    divided = ((torch.arange(len(plain), device=plain.device) - first) / (last - first)).clamp(0, 1)
    return plain / factor * divided + plain * (1 - divided)


_SCALED: dict[str, Callable[..., Tensor]] = {
    "none": lambda plain, rotary: torch.zeros_like(plain),
    "linear": lambda plain, rotary, factor: plain / factor,
    "llama3": _llama3,
    "yarn": _yarn,
}


def inverse_frequencies(rotary: Rotary, lengths: Tensor) -> Tensor:
    """Radians per position of each rotated channel pair, fp32: [pairs], or [..., pairs] for a scaling that varies.

    Args:
        lengths: tokens of the text, [...] int64.
    """
    dim = rotary.rotated or rotary.dim
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device) / dim
    if not rotary.scaling:
        return 1.0 / rotary.theta**exponent
    kind, numbers = str(rotary.scaling[0]), [float(number) for number in rotary.scaling[1:]]
    if kind == "dynamic":
        factor, original = numbers
        growth = factor * lengths.clamp_min(int(original)) / original - (factor - 1)
        return 1.0 / (rotary.theta * growth ** (dim / (dim - 2)))[..., None] ** exponent
    plain = 1.0 / rotary.theta**exponent
    if kind == "longrope":
        short, long = torch.tensor(numbers[2:], device=lengths.device).chunk(2)
        return plain / torch.where(lengths[..., None] > numbers[1], long, short)
    return _SCALED[kind](plain, rotary, *numbers)


def rotary_tables(rotary: Rotary, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of integer positions of any shape [...]: two fp32 tensors [..., D], halves repeated. Channels
    that are not rotated have cosine 1 and sine 0.

    Args:
        lengths: tokens of the texts that the positions stand in, [...] or one for all; by default each is the last.
    """
    frequencies = inverse_frequencies(rotary, positions + 1 if lengths is None else lengths)
    angles = positions.to(torch.float32)[..., None] * frequencies
    scale = float(rotary.scaling[1]) if rotary.scaling[:1] in (("yarn",), ("longrope",)) else 1.0
    rest = (0, rotary.dim // 2 - angles.shape[-1])
    cos, sin = F.pad(angles.cos() * scale, rest, value=1.0), F.pad(angles.sin() * scale, rest)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., D] by tables that broadcast to it; computed in the tables' fp32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)
