"""Every tolerance of the suite in one table, and the error measure that they bound."""

from torch import Tensor

LOGITS_FP32 = 1e-5
"""Our decoder against transformers for the same weights, fp32."""
CACHE_FP32 = 1e-4
"""Step by step, in chunks and all at once, fp32."""
CHUNKED_FP32 = 1e-4
"""Chunked-parallel forms against the token-by-token recurrence, fp32."""
GRADIENT_FP32 = 1e-3
"""Gradients of fast forms against those of the naive form, fp32."""
BF16 = 2e-2
"""Anything computed in bf16 against fp32."""


def relative_rmse(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in float64; NaN never passes a comparison."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-300))
