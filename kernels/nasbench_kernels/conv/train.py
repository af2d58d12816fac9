"""The short convolution in Triton, forward and backward: weights per token (JetBlock) or one for all (Gated DeltaNet).

Taps are read as they lie, W of a channel side by side; the windows of inputs exist only in registers. README.md has
the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_C, WARPS = 16, 64, 4
STRIP_T, STRIP_C, STRIP_WARPS = 32, 128, 2
"""Of the backward that goes token by token: two channels a thread, whose taps are 16 bytes."""


@triton.jit
def _input(
    x, stride, conv_state, position, t, c, j, T, C, in_c, W: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr
):
    """What tap j of each token reads, [BT, BC] fp32: zero before the start, and across the border of a document."""
    source = t - (W - 1) + j
    read = (t < T) & (source >= 0)
    if PACKED:
        same = tl.load(position + t, mask=t < T, other=0) >= W - 1 - j
        read = read & same
    value = tl.load(
        x + source.to(tl.int64)[:, None] * stride + c[None, :], mask=read[:, None] & in_c[None, :], other=0.0
    )
    value = value.to(tl.float32)
    if STATE:
        before = (t < T) & (source < 0)
        if PACKED:
            before = before & same
        at = conv_state + (source + W - 1)[:, None] * C + c[None, :]
        value += tl.load(at, mask=before[:, None] & in_c[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def _tap(weight, t, c, j, C, inside, W: tl.constexpr, STATIC: tl.constexpr):
    """Tap j of the weight of tokens t [BT] and channels c [BC], [BT, BC] fp32."""
    at = c[None, :] * W + j
    if STATIC:
        at += tl.zeros_like(t)[:, None]
    else:
        at = at + t.to(tl.int64)[:, None] * C * W
    return tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _four(C, BC: tl.constexpr):
    """Lanes of a block's channels with their four taps side by side, [4 BC], and which of them exist."""
    lanes = tl.program_id(0) * (BC * 4) + tl.arange(0, BC * 4)
    return lanes, lanes < C * 4


@triton.jit
def _four_taps(weight, t, T, C, BT: tl.constexpr, BC: tl.constexpr):
    """All taps of a tile, [BT, BC] fp32 each: one block of memory, read once, taken apart in registers."""
    lanes, inside = _four(C, BC)
    at = weight + t.to(tl.int64)[:, None] * C * 4 + lanes[None, :]
    taps = tl.load(at, mask=(t < T)[:, None] & inside[None, :], other=0.0)
    even, odd = tl.split(tl.reshape(taps, (BT, BC, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first.to(tl.float32), second.to(tl.float32), third.to(tl.float32), fourth.to(tl.float32)


@triton.jit
def conv_forward_kernel(
    x, stride, weight, bias, conv_state, position, y, T, C,
    W: tl.constexpr, STATIC: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    inside = (t < T)[:, None] & in_c[None, :]
    x += i_b * T * stride
    position += i_b * T
    conv_state += i_b * (W - 1) * C
    if not STATIC:
        weight += i_b * T * C * W
    if (not STATIC) and W == 4:
        first, second, third, fourth = _four_taps(weight, t, T, C, BT, BC)
        total = _input(x, stride, conv_state, position, t, c, 0, T, C, in_c, W, STATE, PACKED) * first
        total += _input(x, stride, conv_state, position, t, c, 1, T, C, in_c, W, STATE, PACKED) * second
        total += _input(x, stride, conv_state, position, t, c, 2, T, C, in_c, W, STATE, PACKED) * third
        total += _input(x, stride, conv_state, position, t, c, 3, T, C, in_c, W, STATE, PACKED) * fourth
    else:
        total = tl.zeros((BT, BC), tl.float32)
        for j in tl.static_range(W):
            window = _input(x, stride, conv_state, position, t, c, j, T, C, in_c, W, STATE, PACKED)
            total += window * _tap(weight, t, c, j, C, inside, W, STATIC)
    if BIAS:
        total += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    result = total * tl.sigmoid(total)
    tl.store(y + i_b * T * C + t.to(tl.int64)[:, None] * C + c[None, :], result, mask=inside)


@triton.jit
def conv_backward_taps_kernel(
    x, stride, weight, bias, conv_state, position, dy, d, dweight, T, C,
    W: tl.constexpr, STATIC: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d = dy * SiLU'(pre-activation) [B, T, C] fp32, and from it the weight' gradients: per token in their own place,
    of a static kernel one sum per block of tokens, [B * blocks, C, W] fp32."""
    i_b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    inside = (t < T)[:, None] & in_c[None, :]
    x += i_b * T * stride
    position += i_b * T
    conv_state += i_b * (W - 1) * C
    if not STATIC:
        weight += i_b * T * C * W
        dweight += i_b * T * C * W
    total = tl.zeros((BT, BC), tl.float32)
    for j in tl.static_range(W):
        window = _input(x, stride, conv_state, position, t, c, j, T, C, in_c, W, STATE, PACKED)
        total += window * _tap(weight, t, c, j, C, inside, W, STATIC)
    if BIAS:
        total += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    at = i_b * T * C + t.to(tl.int64)[:, None] * C + c[None, :]
    gate = tl.sigmoid(total)
    slope = gate * (1.0 + total * (1.0 - gate))
    change = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(d + at, change, mask=inside)
    for j in tl.static_range(W):
        # Inputs a second time, from the cache, instead of W windows in registers.
        window = _input(x, stride, conv_state, position, t, c, j, T, C, in_c, W, STATE, PACKED)
        if STATIC:
            block = i_b * tl.num_programs(1) + tl.program_id(1)
            tl.store(dweight + (block * C + c) * W + j, tl.sum(window * change, 0), mask=in_c)
        else:
            place = t.to(tl.int64)[:, None] * C * W + c[None, :] * W + j
            tl.store(dweight + place, window * change, mask=inside)


@triton.jit
def conv_backward_input_kernel(
    d, weight, position, dx, T, C,
    W: tl.constexpr, STATIC: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx_s = sum_j kernels_{s + W - 1 - j, j} d_{s + W - 1 - j}: what the next W - 1 tokens read of token s."""
    i_b = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    d += i_b * T * C
    position += i_b * T
    if not STATIC:
        weight += i_b * T * C * W
    total = tl.zeros((BT, BC), tl.float32)
    for j in tl.static_range(W):
        reader = s + W - 1 - j
        reads = reader < T
        if PACKED:
            reads = reads & (tl.load(position + reader, mask=reader < T, other=0) >= W - 1 - j)
        inside = reads[:, None] & in_c[None, :]
        change = tl.load(d + reader.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0)
        total += change * _tap(weight, reader, c, j, C, inside, W, STATIC)
    place = dx + i_b * T * C + s.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(place, total, mask=(s < T)[:, None] & in_c[None, :])


@triton.jit
def _before(x, stride, conv_state, t, c, in_c, T, C, STATE: tl.constexpr):
    """The input of token t [BC] fp32, t < 0 being of the conv_state, zero where there is none."""
    token = t + 0 * c
    value = tl.load(x + token.to(tl.int64) * stride + c, mask=in_c & (token >= 0) & (token < T), other=0.0)
    value = value.to(tl.float32)
    if STATE:
        value += tl.load(conv_state + (token + 3) * C + c, mask=in_c & (token < 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def conv_backward_kernel(
    x, stride, weight, conv_state, position, dy, dweight, dx, T, C,
    STATE: tl.constexpr, PACKED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Both gradients of weight per token with four taps, token by token: a channel's last three inputs, and what the
    tokens so far give to the last three, stay in registers, so that everything is read and written once."""
    i_b = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(1) * BT
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    lanes, there = _four(C, BC)
    x += i_b * T * stride
    dy += i_b * T * C
    dx += i_b * T * C
    position += i_b * T
    conv_state += i_b * 3 * C
    weight += i_b * T * C * 4
    dweight += i_b * T * C * 4
    oldest = _before(x, stride, conv_state, begin - 3, c, in_c, T, C, STATE)
    older = _before(x, stride, conv_state, begin - 2, c, in_c, T, C, STATE)
    last = _before(x, stride, conv_state, begin - 1, c, in_c, T, C, STATE)
    # So far of the gradients of the inputs of tokens t - 3, t - 2 and t - 1.
    third = tl.zeros((BC,), tl.float32)
    second = tl.zeros((BC,), tl.float32)
    first = tl.zeros((BC,), tl.float32)
    # Three tokens more than its own: they read the last three of those.
    for step in range(BT + 3):
        t = begin + step
        # Spread over the channels: the interpreter takes no scalar in a mask.
        inside = in_c & (t + 0 * c < T)
        row = t.to(tl.int64) * C
        taps = tl.load(weight + row * 4 + lanes, mask=there & (t + 0 * lanes < T), other=0.0)
        even, odd = tl.split(tl.reshape(taps, (BC, 2, 2)))
        k0, k2 = tl.split(even.to(tl.float32))
        k1, k3 = tl.split(odd.to(tl.float32))
        newest = tl.load(x + t.to(tl.int64) * stride + c, mask=inside, other=0.0).to(tl.float32)
        if PACKED:
            # Taps that reach across a document's border count as zero, here and in every gradient.
            known = tl.load(position + tl.minimum(t, T - 1))
            k0 = tl.where(known >= 3, k0, 0.0)
            k1 = tl.where(known >= 2, k1, 0.0)
            k2 = tl.where(known >= 1, k2, 0.0)
        total = oldest * k0 + older * k1 + last * k2 + newest * k3
        gate = tl.sigmoid(total)
        change = tl.load(dy + row + c, mask=inside, other=0.0).to(tl.float32)
        change *= gate * (1.0 + total * (1.0 - gate))
        if (step < BT) & (t < T):
            d0, d1, d2 = oldest * change, older * change, last * change
            if PACKED:
                d0 = tl.where(known >= 3, d0, 0.0)
                d1 = tl.where(known >= 2, d1, 0.0)
                d2 = tl.where(known >= 1, d2, 0.0)
            # Put together as the taps were taken apart: stores of two bytes in every eight would fill no line.
            together = tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, newest * change)), (BC * 4,))
            tl.store(dweight + row * 4 + lanes, together.to(dweight.dtype.element_ty), mask=there)
        if (step >= 3) & (t - 3 < T):
            tl.store(dx + row - 3 * C + c, (third + k0 * change).to(dx.dtype.element_ty), mask=in_c)
        third = second + k1 * change
        second = first + k2 * change
        first = k3 * change
        oldest, older, last = older, last, newest


def _grid(x: Tensor) -> tuple[int, int, int]:
    batch, tokens, channels = x.shape
    return triton.cdiv(channels, BLOCK_C), triton.cdiv(tokens, BLOCK_T), batch


def _rows(x: Tensor) -> Tensor:
    """x [B, T, C] as it lies where its channels stand side by side and its rows one stride apart, else a copy."""
    apart = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if apart else x.contiguous()


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor | None, position: Tensor | None
) -> Tensor:
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    conv_forward_kernel[_grid(x)](
        x, x.stride(1), weight, x if bias is None else bias, x if conv_state is None else conv_state,
        x if position is None else position, y, x.shape[1], x.shape[2],
        W=weight.shape[-1], STATIC=weight.dim() == 2, BIAS=bias is not None, STATE=conv_state is not None,
        PACKED=position is not None, BT=BLOCK_T, BC=BLOCK_C, num_warps=WARPS,
    )  # fmt: skip
    return y


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor | None, position: Tensor | None
    ) -> Tensor:
        # The caller replaces its conv_state in place, and the backward still needs the old one.
        ctx.conv_state, ctx.position = None if conv_state is None else conv_state.clone(), position
        ctx.save_for_backward(x, weight, bias)
        return _forward(x, weight, bias, conv_state, position)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        dy = gradients[0].contiguous()
        (batch, tokens, channels), taps, static = x.shape, weight.shape[-1], weight.dim() == 2
        conv_state = x if ctx.conv_state is None else ctx.conv_state
        position = x if ctx.position is None else ctx.position
        given = {"STATE": ctx.conv_state is not None, "PACKED": ctx.position is not None}
        dx: Tensor | None = None
        dbias: Tensor | None = None
        if not static and taps == 4 and bias is None:
            dx, dweight = torch.empty_like(dy), torch.empty_like(weight)
            conv_backward_kernel[triton.cdiv(channels, STRIP_C), triton.cdiv(tokens, STRIP_T), batch](
                x, x.stride(1), weight, conv_state, position, dy, dweight, dx, tokens, channels,
                **given, BT=STRIP_T, BC=STRIP_C, num_warps=STRIP_WARPS,
            )  # fmt: skip
            return dx, dweight, None, None, None
        grid = _grid(x)
        d = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        if static:
            dweight = torch.empty(batch * grid[1], channels, taps, dtype=torch.float32, device=x.device)
        else:
            dweight = torch.empty_like(weight)
        conv_backward_taps_kernel[grid](
            x, x.stride(1), weight, x if bias is None else bias, conv_state, position, dy, d, dweight,
            tokens, channels, W=taps, STATIC=static, BIAS=bias is not None, **given, BT=BLOCK_T, BC=BLOCK_C,
            num_warps=WARPS,
        )  # fmt: skip
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(dy)
            conv_backward_input_kernel[grid](
                d, weight, position, dx, tokens, channels,
                W=taps, STATIC=static, PACKED=given["PACKED"], BT=BLOCK_T, BC=BLOCK_C, num_warps=WARPS,
            )  # fmt: skip
        if bias is not None and ctx.needs_input_grad[2]:
            dbias = d.sum((0, 1)).to(bias.dtype)
        return dx, dweight.sum(0).to(weight.dtype) if static else dweight, dbias, None, None


def _advance(conv_state: Tensor, x: Tensor) -> None:
    """The last W-1 of the inputs [B, W-1, C] and [B, T, C], in place."""
    kept = conv_state.shape[1]
    fresh = x[:, -kept:] if x.shape[1] >= kept else torch.cat((conv_state[:, x.shape[1] :].to(x.dtype), x), dim=1)
    conv_state.copy_(fresh[:, fresh.shape[1] - kept :])


def triton_short_conv(
    x: Tensor, weight: Tensor, conv_state: Tensor | None = None, position_ids: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`naive_short_conv`, differentiable in x, weight and bias.

    Args:
        x: [B, T, C], also columns of longer rows, read where they lie.
        weight: [B, T, C, W], one per token (arXiv 2508.15884), or [C, W], one for all (arXiv 2412.06464).
        conv_state: the W-1 inputs before x, [B, W-1, C], replaced in place by the last W-1; a constant to autograd.
        position_ids: tokens before each token in its own document, [B, T] integers: nothing older is read. None: every
            row is one document.
        bias: [C], added before SiLU.

    Returns:
        SiLU of the convolution, [B, T, C] in x's dtype.
    """
    x, weight = _rows(x), weight.contiguous()
    position = None if position_ids is None else position_ids.contiguous()
    learns = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
    )
    form = _ShortConvolution.apply if learns else _forward
    y = form(x, weight, bias, conv_state, position)
    if conv_state is not None:
        with torch.no_grad():
            _advance(conv_state, x)
    return y
