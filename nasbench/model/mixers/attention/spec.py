"""A: full causal attention with grouped queries, the layer that the model was pre-trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.core.errors import UserError
from nasbench.model.spec import LayerShape, MixerSpec

if TYPE_CHECKING:
    from nasbench.model.block import Block


def attention_parameters(shape: LayerShape) -> int:
    """Parameters of a grouped-query attention: projections, optional biases, optional query and key norms."""
    query, key_value = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
    bias = query + key_value if shape.qkv_bias else 0
    norm = (query + key_value // 2 if shape.wide_qk_norm else 2 * shape.head_dim) if shape.qk_norm else 0
    return shape.hidden_size * (2 * query + key_value) + bias + norm


def key_value_bytes(shape: LayerShape, batch: int, keys: int, dtype_bytes: int) -> int:
    """Bytes of `keys` keys and values of every key/value head."""
    return 2 * batch * shape.num_kv_heads * shape.head_dim * keys * dtype_bytes


def attention_flops(shape: LayerShape, tokens: int, scored: int) -> int:
    """FLOPs of `tokens` tokens that look at `scored` (query, key) pairs in all."""
    return 2 * tokens * attention_parameters(shape) + 4 * scored * shape.num_heads * shape.head_dim


def attention_kept_bytes(shape: LayerShape, tokens: int, dtype_bytes: int, trained: bool) -> int:
    """The rows, rotated queries and keys, the output, its log-sums in fp32; trained also the input and the weights that
    were joined for one product."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    kept = tokens * (dtype_bytes * (queries + 2 * keys + queries + keys + queries) + 4 * shape.num_heads)
    joined = shape.hidden_size * (tokens + queries + 2 * keys) * dtype_bytes
    return kept + trained * joined


@dataclass(frozen=True)
class FullAttentionSpec(MixerSpec):
    """Full attention has no hyper-parameters of its own: its shape is the layer's."""

    kind: ClassVar[str] = "A"
    title: ClassVar[str] = "full attention"
    is_attention: ClassVar[bool] = True

    @classmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        if args:
            raise UserError(f"bad arguments {args!r} of layer kind A: full attention takes none")
        return cls(shape)

    @property
    def args(self) -> str:
        return ""

    @property
    def exact_until(self) -> float:
        return math.inf

    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return key_value_bytes(self.shape, batch, context, dtype_bytes)

    def parameters(self) -> int:
        return attention_parameters(self.shape)

    def flops(self, tokens: int, context: int) -> int:
        return attention_flops(self.shape, tokens, tokens * context + tokens * (tokens + 1) // 2)

    def kept_bytes(self, tokens: int, dtype_bytes: int = 2, trained: bool = True) -> int:
        return attention_kept_bytes(self.shape, tokens, dtype_bytes, trained)

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.mixers.attention.mixer import FullAttention

        return FullAttention
