"""What a point must move and compute at least, from the formulas of its block. Imports no torch."""

from __future__ import annotations

from nasbench.model.shapes import ModelSpec
from nasbench.profiling.plan import Point

Amounts = tuple[int, int]
"""(bytes, floating-point operations)"""


def amounts(shape: ModelSpec, point: Point, width: int) -> Amounts:
    """Least bytes that one instance of the point's block reads and writes, and its operations.

    Args:
        width: bytes of a weight, activation, key or value.
    """
    tokens = point.batch * (point.chunk or 1)
    x_bytes = tokens * shape.hidden_size * width
    if point.block == "mlp":
        parameters = shape.ffn_spec().parameters()
        return parameters * width + 2 * x_bytes, 2 * tokens * parameters
    if point.block == "norm":
        return 4 * x_bytes, 6 * tokens * shape.hidden_size
    if point.block == "embedding":
        return 2 * x_bytes, 0
    if point.block == "head":
        parameters = shape.vocab_size * shape.hidden_size
        return parameters * width, 2 * point.batch * parameters
    config = shape.mixer(point.block)
    moved = config.decode_bytes(point.batch, point.context, width)
    if point.mode == "decode":
        return moved, point.batch * config.flops(1, point.context - 1)
    return moved + 2 * x_bytes, point.batch * config.flops(point.chunk, point.context - point.chunk)
