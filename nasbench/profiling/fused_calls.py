"""The blocks of a decode step and of a prompt's chunk on a GPU, each with the kernels that the engine launches for it
(nasbench.runtime.fused_step, Decoder.hidden).

In a step for one sequence the norms and the residual additions are parts of the products next to them, so a norm has no
call of its own; elsewhere residual addition and norm are one kernel between the blocks.
tests/profiling/test_fused_calls.py holds that the kernels of a step and of a chunk are those of its blocks' calls.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import MixerCache, Step
from nasbench.model.decoder import Decoder, GatedMLP

NO_CALL = "for one sequence a part of the products after it"
"""Why the norm has no time of its own."""


def step_tables(decoder: Decoder, positions: Tensor, span: int) -> Step:
    """Where a step stands, its rotary tables looked up on the device."""
    cos, sin = (table[positions][:, None] for table in decoder.rotary_tables(span))
    return Step(positions, span, False, cos, sin)


def mixer_call(mixer: Any, norm: nn.RMSNorm, x: Tensor, step: Step, cache: MixerCache) -> Tensor:
    """x [B, C]: the residual stream, added to in place, for one sequence; for more what the norm made of it."""
    if not hasattr(mixer, "fused_mix"):
        if len(x) == 1:
            x += mixer.step(norm(x)[:, None], step, cache)[:, 0]
            return x
        return mixer.step(x[:, None], step, cache)[:, 0]
    if len(x) > 1:
        return fused.left_over(fused.mix(mixer, x, step, cache), mixer.o_proj.weight)
    weight, bias = mixer.stacked.matrices()
    row = fused.ops().gemv(x, weight, bias, before="norm", norm_weight=norm.weight, eps=norm.eps)
    return fused.ops().gemv(mixer.fused_mix(row, step, cache), mixer.o_proj.weight, add_to=x)


def mlp_call(mlp: GatedMLP, norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """As `mixer_call`."""
    ops = fused.ops()
    weight, _ = mlp.stacked.matrices()
    if len(x) > 1:
        return fused.left_over(fused.swiglu_linear(x, weight), mlp.down_proj.weight)
    inner = ops.gemv(x, weight, before="norm", norm_weight=norm.weight, eps=norm.eps, swiglu=True)
    return ops.gemv(inner, mlp.down_proj.weight, add_to=x)


def mlp_chunk_call(mlp: GatedMLP, x: Tensor) -> Tensor:
    """Of a prompt's chunk x [B, T, C]."""
    weight, _ = mlp.stacked.matrices()
    return mlp.down_proj(fused.ops().swiglu(F.linear(x, weight)))


def norm_call(norm: nn.RMSNorm, x: Tensor, delta: Tensor) -> Tensor:
    """Residual addition and norm of a chunk or of a step of more than one sequence."""
    return fused.ops().add_norm(x, delta, norm.weight, norm.eps)


def head_call(decoder: Decoder, x: Tensor, tokens: Tensor) -> Tensor:
    """Logits of x [B, C] and the greedy choice, which becomes the next step's tokens [B]."""
    norm = decoder.model.norm
    if len(x) > 1:
        logits = fused.linear(x, decoder.head_weight)
    else:
        logits = fused.ops().gemv(x, decoder.head_weight, before="norm", norm_weight=norm.weight, eps=norm.eps)
    return tokens.copy_(fused.most_likely(logits))


def embedding_call(decoder: Decoder, tokens: Tensor, positions: Tensor, span: int) -> Tensor:
    """The look-up of tokens [B], and the rotary tables that all layers share."""
    step_tables(decoder, positions, span)
    return decoder.model.embed_tokens(tokens)
