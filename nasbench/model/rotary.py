"""Rotary position embeddings (arXiv 2104.09864) in the rotate-half layout of Llama and Qwen checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasbench.model.spec import LayerShape


def inverse_frequencies(shape: LayerShape, device: torch.device | str | None = None) -> Tensor:
    """Radians per position of each channel pair, [head_dim / 2] fp32, with Llama 3.1's scaling if the shape has it.

    That scaling divides frequencies whose wavelength exceeds `original / low` by `factor`, keeps those below
    `original / high`, and blends linearly between.
    """
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device) / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponent
    if not shape.rope_scaling:
        return frequencies
    factor, low, high, original = (float(value) for value in shape.rope_scaling[1:])
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / factor)


def rotary_tables(shape: LayerShape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of integer positions of any shape [...]: two fp32 tensors [..., head_dim], halves repeated."""
    angles = positions.to(torch.float32)[..., None] * inverse_frequencies(shape, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., D] by tables that broadcast to it; computed in the tables' fp32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)
