"""Specification of C, multi-head latent attention (MLA, arXiv 2405.04434): the cache holds one latent vector and one
rotary key per token, which all heads share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from nasbench.core.errors import UserError
from nasbench.model.spec import LayerShape, MixerSpec, Rotary, parse_ints

if TYPE_CHECKING:
    from nasbench.model.block import Block


@dataclass(frozen=True)
class LatentAttentionSpec(MixerSpec):
    """`512x64x128x128`: size of the latent, of the rotary key, of each head's other key, of each head's value; the
    heads are the attention's. The default latent has half as many numbers as the attention's keys and values."""

    latent: int = 0
    rope: int = 0
    nope: int = 0
    value: int = 0

    kind: ClassVar[str] = "C"
    title: ClassVar[str] = "latent attention"

    @classmethod
    def parse(cls, shape: LayerShape, args: str) -> Self:
        dim = shape.head_dim
        args = args or f"{shape.num_kv_heads * dim}x{2 * max(1, dim // 4)}x{dim}x{dim}"
        latent, rope, nope, value = parse_ints(cls.kind, args, ("latent", "rotary key", "key", "value"))
        if rope % 2 or value > nope + rope:
            raise UserError(
                f"bad arguments {args!r} of layer kind {cls.kind}: the rotary key is even, and the value at most as "
                "large as both keys"
            )
        return cls(shape, latent, rope, nope, value)

    @property
    def args(self) -> str:
        return f"{self.latent}x{self.rope}x{self.nope}x{self.value}"

    @property
    def query(self) -> int:
        """Size of a head's query."""
        return self.nope + self.rope

    @property
    def rope_shape(self) -> LayerShape:
        """The layer as far as its rotary embedding is concerned."""
        # Long rotary embeddings have a factor for each pair of the attention's heads.
        scaling = () if self.shape.rope_scaling[:1] == ("longrope",) else self.shape.rope_scaling
        return replace(self.shape, head_dim=self.rope, rotary_dim=0, rope_scaling=scaling)

    @property
    def rotary(self) -> Rotary:
        return self.rope_shape.rotary

    def cache_bytes(self, batch: int, context: int, dtype_bytes: int = 2) -> int:
        return batch * context * (self.latent + self.rope) * dtype_bytes

    def parameters(self) -> int:
        """Queries; latent and rotary key; the latent's norm; keys and values from the latent; output."""
        hidden, heads = self.shape.hidden_size, self.shape.num_heads
        projections = hidden * (heads * (self.query + self.value) + self.latent + self.rope)
        return projections + self.latent + self.latent * heads * (self.nope + self.value)

    def flops(self, tokens: int, context: int) -> int:
        """With keys and values of each head made from the latents; the absorbed form of a decode step takes more."""
        scored = tokens * context + tokens * (tokens + 1) // 2
        return 2 * tokens * self.parameters() + 2 * scored * self.shape.num_heads * (self.query + self.value)

    @classmethod
    def block_class(cls) -> type[Block]:
        from nasbench.model.mixers.mla.mixer import LatentAttention

        return LatentAttention
