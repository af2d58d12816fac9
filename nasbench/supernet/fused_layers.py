"""A decoder's layers as training and scoring run them on a GPU: few launches, nothing in memory twice.

    projections   one product for all that read the same input, so that its gradient is one product, too, not a sum
    attention     rotary embedding in one launch; flash attention, which knows windows and grouped heads
    JetBlock      what stands around the convolution and the rule in one launch each (nasbench_kernels.gated_delta)
    MLP           SwiGLU in one launch, forward and backward

What has no path here, and everything on a CPU, is the layer as its kind defines it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import Chunk, TokenMixer
from nasbench.model.decoder import Decoder, DecoderLayer, GatedMLP
from nasbench.model.documents import RESET_LOG_DECAY
from nasbench.model.mixers.attention.flash import flash_attention, has_flash
from nasbench.model.mixers.attention.mixer import FullAttention
from nasbench.model.mixers.gated_delta.jet_block import JetBlock
from nasbench.model.mixers.gated_delta.mixer import WIDEST_TRAINED_KEY
from nasbench.model.mixers.sliding_window.mixer import SlidingWindow
from nasbench.model.packed import StackedProjections
from nasbench.parallel.fsdp import run

ALIGNED = 8
"""Outputs of a product come in multiples of it: rows of other lengths are slow to write and to read."""


def run_layer(layer: DecoderLayer, x: Tensor, chunk: Chunk) -> Tensor:
    """Residual stream x [B, T, C] through a layer, without a cache."""
    return finish_layer(layer, x, mix(layer.self_attn, layer.attention_input(x), chunk))


def mix(mixer: TokenMixer, x: Tensor, chunk: Chunk) -> Tensor:
    """`mixer(x, chunk)`: normalised input [B, T, C] -> [B, T, C]."""
    return run(mixer, _mix, x, chunk)


def _mix(mixer: TokenMixer, x: Tensor, chunk: Chunk) -> Tensor:
    if fused.differentiable(x):
        if isinstance(mixer, FullAttention) and takes_flash(mixer, x, chunk):
            return _attention(mixer, x, chunk)
        # Without a gradient JetBlock has a fused path of its own.
        if isinstance(mixer, JetBlock) and torch.is_grad_enabled() and mixer.key_dim <= WIDEST_TRAINED_KEY:
            return fused_jet_block(mixer, x, chunk)
    return mixer(x, chunk)


def finish_layer(layer: DecoderLayer, x: Tensor, mixed: Tensor) -> Tensor:
    """The rest of a layer: residual stream x and the mixer's output, both [B, T, C]."""
    x = x + mixed
    return x + run(layer.mlp, fused_mlp, layer.post_attention_layernorm(x))


def embed(decoder: Decoder, tokens: Tensor) -> Tensor:
    """`decoder.embed(tokens)`: tokens [B, T] int64 -> [B, T, C]."""
    return run(decoder.model.embed_tokens, _call, tokens)


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def fused_mlp(mlp: GatedMLP, x: Tensor) -> Tensor:
    """`mlp(x)`, x [B, T, C]."""
    if not fused.differentiable(x):
        return mlp(x)
    return mlp.down_proj(fused.ops().swiglu(_project(mlp.stacked, x)))


def fused_jet_block(mixer: JetBlock, x: Tensor, chunk: Chunk) -> Tensor:
    """`mixer(x, chunk)` with gradients."""
    heads, values = mixer.heads, mixer.config.values
    row = _project(mixer.stacked, x)
    q, k, decay, beta, v, gate, middle = fused.ops().training_inputs(
        row, mixer.A_log, mixer.dt_bias, heads, mixer.key_dim, (values, values, mixer.config.generator_size)
    )
    ages = None
    if chunk.documents is not None:
        ages = chunk.documents.ages
        decay = decay.masked_fill(chunk.documents.first[..., None], RESET_LOG_DECAY)
    kernels = mixer.dynamic_conv1d.kernel_generator(middle)
    v = fused.ops().triton_short_conv(v, kernels, None, ages).unflatten(-1, (heads, -1))
    mixed, _ = fused.ops().triton_gated_delta(q, k, v, decay, beta, None)
    return mixer.o_proj(fused.ops().gated_norm(mixed, gate, mixer.o_norm.weight))


def takes_flash(mixer: FullAttention, x: Tensor, chunk: Chunk) -> bool:
    """Whether flash attention can do the work of a mixer."""
    return (
        type(mixer) in (FullAttention, SlidingWindow)
        and chunk.documents is None
        and chunk.start == 0
        and isinstance(mixer.q_norm, torch.nn.Identity)
        and has_flash(x, mixer.head_dim)
    )


def _attention(mixer: FullAttention, x: Tensor, chunk: Chunk) -> Tensor:
    row = _project(mixer.stacked, x)
    q, k, v = fused.ops().rotary(row, chunk.cos, chunk.sin, mixer.num_heads, mixer.num_kv_heads)
    window = mixer.config.window if isinstance(mixer, SlidingWindow) else None
    return mixer.o_proj(flash_attention(q, k, v, window).flatten(2))


def _project(stacked: StackedProjections, x: Tensor) -> Tensor:
    """Every projection of x side by side, [B, T, P], zeros up to a multiple of ALIGNED behind them where they learn."""
    if stacked.apart:
        # A product of a matrix made here would keep it until the backward pass.
        return torch.cat(tuple(stacked(x)), -1)
    learnt = any(linear.weight.requires_grad for linear in stacked.linears)
    if not (learnt and torch.is_grad_enabled()):
        return F.linear(x, *stacked.matrices())
    weights, missing = [linear.weight for linear in stacked.linears], -sum(stacked.sizes) % ALIGNED
    if missing:
        weights.append(weights[0].new_zeros(missing, x.shape[-1]))
    if stacked.linears[0].bias is None:
        return F.linear(x, torch.cat(weights))
    biases = [linear.bias for linear in stacked.linears] + ([weights[0].new_zeros(missing)] if missing else [])
    return F.linear(x, torch.cat(weights), torch.cat(biases))
