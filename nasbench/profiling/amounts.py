"""Least bytes and operations of a point, from the formulas of its block. Imports no torch."""

from __future__ import annotations

from nasbench.model.shapes import ModelSpec
from nasbench.profiling.plan import Point
from nasbench.store import block_spec

Amounts = tuple[int, int]
"""(bytes, floating-point operations)"""


def amounts(shape: ModelSpec, point: Point, width: int) -> Amounts:
    """Least bytes that one instance of the point's block reads and writes, and its operations.

    Args:
        width: bytes of a weight, activation, key or value.
    """
    tokens = point.batch * (point.chunk or 1)
    x_bytes = tokens * shape.hidden_size * width
    spec = block_spec(shape, point.block)
    if spec is not None and point.mode == "decode" and not point.shared:
        # The activations of a decode step stay in the caches.
        return spec.decode_bytes(point.batch, point.context, width), point.batch * spec.flops(1, point.context - 1)
    if spec is not None:
        moved = spec.weight_bytes(tokens, width) + spec.traffic_bytes(point.batch, point.context, width)
        new = point.chunk or 1
        return moved + 2 * x_bytes, point.batch * spec.flops(new, max(0, point.context - new))
    if point.block == "norm":
        return 4 * x_bytes, 6 * tokens * shape.hidden_size
    if point.block == "embedding":
        return 2 * x_bytes, 0
    parameters = shape.vocab_size * shape.hidden_size
    return parameters * width, 2 * point.batch * parameters
