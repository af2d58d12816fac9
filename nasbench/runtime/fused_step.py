"""One decode step of a whole decoder by fused kernels: the form that is captured in a CUDA graph.

Between the matrix products stand as few launches as possible. For one sequence the products are matrix-vector kernels
that take the norm before them and the residual addition after them along (six launches a JetBlock layer); for more they
are cuBLAS's or kernels that read each weight once, and residual addition and norm are one kernel, which also sums the
parts of products that were divided over their columns.

Layers of kinds without a `fused_mix` (from other packages) run their own `step`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nasbench.model import fused
from nasbench.model.block import MixerCache, Step
from nasbench.model.decoder import Decoder, DecoderCache, DecoderLayer


class FusedStep:
    """Steps of a decoder on its cache. Reads neither `cache.length` nor advances it.

    Args:
        decoder: on a CUDA device.
        span: host-side bound that no position reaches; default the cache's context.
    """

    def __init__(self, decoder: Decoder, cache: DecoderCache, span: int | None = None) -> None:
        self.decoder, self.cache = decoder, cache
        self.span = span or cache.context
        self.ops = fused.ops()
        self.cos, self.sin = decoder.rotary_tables(self.span)

    @staticmethod
    def usable(decoder: Decoder) -> bool:
        """Whether the kernels can run this decoder: on a CUDA device with triton, no gradient asked for."""
        return fused.usable(decoder.model.embed_tokens.weight)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions [B] int64 -> logits [B, V]; each sequence writes its cache at its own position."""
        decoder = self.decoder
        cos, sin = (table[positions][:, None] for table in (self.cos, self.sin))
        step = Step(positions, self.span, False, cos, sin)
        x = decoder.model.embed_tokens(tokens)
        walk = self._one if len(tokens) == 1 else self._many
        return walk(x, step)

    def _one(self, x: Tensor, step: Step) -> Tensor:
        """x [1, C], added to in place."""
        gemv = self.ops.gemv
        for layer, cache in zip(self.decoder.layers, self.cache.mixers, strict=True):
            mixer: Any = layer.self_attn
            norm, mlp_norm, mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
            if hasattr(mixer, "fused_mix"):
                weight, bias = mixer.stacked.matrices()
                row = gemv(x, weight, bias, before="norm", norm_weight=norm.weight, eps=norm.eps)
                gemv(mixer.fused_mix(row, step, cache), mixer.o_proj.weight, add_to=x)
            else:
                x += mixer.step(norm(x)[:, None], step, cache)[:, 0]
            weight, _ = mlp.stacked.matrices()
            inner = gemv(x, weight, before="norm", norm_weight=mlp_norm.weight, eps=mlp_norm.eps, swiglu=True)
            gemv(inner, mlp.down_proj.weight, add_to=x)
        norm = self.decoder.model.norm
        return gemv(x, self.decoder.head_weight, before="norm", norm_weight=norm.weight, eps=norm.eps)

    def _many(self, x: Tensor, step: Step) -> Tensor:
        """x [B, C], added to in place."""
        delta: Tensor | None = None
        for layer, cache in zip(self.decoder.layers, self.cache.mixers, strict=True):
            delta = self._layer(layer, x, delta, step, cache)
        norm = self.decoder.model.norm
        return fused.linear(self.ops.add_norm(x, delta, norm.weight, norm.eps), self.decoder.head_weight)

    def _layer(self, layer: DecoderLayer, x: Tensor, delta: Tensor | None, step: Step, cache: MixerCache) -> Tensor:
        """Adds what the layer before left over, and returns what this one leaves."""
        ops = self.ops
        mixer: Any = layer.self_attn
        norm, mlp_norm, mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
        hidden = ops.add_norm(x, delta, norm.weight, norm.eps)
        if hasattr(mixer, "fused_mix"):
            mixed = fused.left_over(fused.mix(mixer, hidden, step, cache), mixer.o_proj.weight)
        else:
            mixed = mixer.step(hidden[:, None], step, cache)[:, 0]
        hidden = ops.add_norm(x, mixed, mlp_norm.weight, mlp_norm.eps)
        weight, _ = mlp.stacked.matrices()
        return fused.left_over(fused.swiglu_linear(hidden, weight), mlp.down_proj.weight)
