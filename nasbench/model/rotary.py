"""Rotary position embeddings (arXiv 2104.09864) in the rotate-half layout of Llama and Qwen checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasbench.model.spec import Rotary


def inverse_frequencies(rotary: Rotary, device: torch.device | str | None = None) -> Tensor:
    """Radians per position of each channel pair, [D / 2] fp32, scaled as the embedding says.

    Llama 3.1's scaling divides frequencies whose wavelength exceeds `original / low` by `factor`, keeps those below
    `original / high`, and blends linearly between. Linear scaling divides all by `factor`.
    """
    exponent = torch.arange(0, rotary.dim, 2, dtype=torch.float32, device=device) / rotary.dim
    frequencies = 1.0 / rotary.theta**exponent
    if not rotary.scaling:
        return frequencies
    kind, *numbers = rotary.scaling
    if kind == "linear":
        return frequencies / float(numbers[0])
    factor, low, high, original = (float(value) for value in numbers)
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / factor)


def rotary_tables(rotary: Rotary, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of integer positions of any shape [...]: two fp32 tensors [..., D], halves repeated."""
    angles = positions.to(torch.float32)[..., None] * inverse_frequencies(rotary, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., D] by tables that broadcast to it; computed in the tables' fp32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)
