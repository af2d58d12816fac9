"""The short convolutions in Triton, forward and backward: kernels per token (JetBlock) or one for all (Gated DeltaNet).

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
def _input(x, stride, history, age, t, c, j, T, C, in_c, W: tl.constexpr, HISTORY: tl.constexpr, AGE: tl.constexpr):
    """What tap j of each token reads, [BT, BC] fp32: zero before the start, and across the border of a document."""
    source = t - (W - 1) + j
    read = (t < T) & (source >= 0)
    if AGE:
        same = tl.load(age + t, mask=t < T, other=0) >= W - 1 - j
        read = read & same
    value = tl.load(
        x + source.to(tl.int64)[:, None] * stride + c[None, :], mask=read[:, None] & in_c[None, :], other=0.0
    )
    value = value.to(tl.float32)
    if HISTORY:
        before = (t < T) & (source < 0)
        if AGE:
            before = before & same
        at = history + (source + W - 1)[:, None] * C + c[None, :]
        value += tl.load(at, mask=before[:, None] & in_c[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def _tap(kernels, t, c, j, C, inside, W: tl.constexpr, STATIC: tl.constexpr):
    """Tap j of the kernels of tokens t [BT] and channels c [BC], [BT, BC] fp32."""
    at = c[None, :] * W + j
    if STATIC:
        at += tl.zeros_like(t)[:, None]
    else:
        at = at + t.to(tl.int64)[:, None] * C * W
    return tl.load(kernels + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _four(C, BC: tl.constexpr):
    """Lanes of a block's channels with their four taps side by side, [4 BC], and which of them exist."""
    lanes = tl.program_id(0) * (BC * 4) + tl.arange(0, BC * 4)
    return lanes, lanes < C * 4


@triton.jit
def _four_taps(kernels, t, T, C, BT: tl.constexpr, BC: tl.constexpr):
    """All taps of a tile, [BT, BC] fp32 each: one block of memory, read once, taken apart in registers."""
    lanes, inside = _four(C, BC)
    at = kernels + t.to(tl.int64)[:, None] * C * 4 + lanes[None, :]
    taps = tl.load(at, mask=(t < T)[:, None] & inside[None, :], other=0.0)
    even, odd = tl.split(tl.reshape(taps, (BT, BC, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first.to(tl.float32), second.to(tl.float32), third.to(tl.float32), fourth.to(tl.float32)


@triton.jit
def conv_forward_kernel(
    x, stride, kernels, bias, history, age, y, T, C,
    W: tl.constexpr, STATIC: tl.constexpr, BIAS: tl.constexpr, HISTORY: tl.constexpr, AGE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    inside = (t < T)[:, None] & in_c[None, :]
    x += i_b * T * stride
    age += i_b * T
    history += i_b * (W - 1) * C
    if not STATIC:
        kernels += i_b * T * C * W
    if (not STATIC) and W == 4:
        first, second, third, fourth = _four_taps(kernels, t, T, C, BT, BC)
        total = _input(x, stride, history, age, t, c, 0, T, C, in_c, W, HISTORY, AGE) * first
        total += _input(x, stride, history, age, t, c, 1, T, C, in_c, W, HISTORY, AGE) * second
        total += _input(x, stride, history, age, t, c, 2, T, C, in_c, W, HISTORY, AGE) * third
        total += _input(x, stride, history, age, t, c, 3, T, C, in_c, W, HISTORY, AGE) * fourth
    else:
        total = tl.zeros((BT, BC), tl.float32)
        for j in tl.static_range(W):
            window = _input(x, stride, history, age, t, c, j, T, C, in_c, W, HISTORY, AGE)
            total += window * _tap(kernels, t, c, j, C, inside, W, STATIC)
    if BIAS:
        total += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    result = total * tl.sigmoid(total)
    tl.store(y + i_b * T * C + t.to(tl.int64)[:, None] * C + c[None, :], result, mask=inside)


@triton.jit
def conv_backward_taps_kernel(
    x, stride, kernels, bias, history, age, dy, d, dkernels, T, C,
    W: tl.constexpr, STATIC: tl.constexpr, BIAS: tl.constexpr, HISTORY: tl.constexpr, AGE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d = dy * SiLU'(pre-activation) [B, T, C] fp32, and from it the kernels' gradients: per token in their own place,
    of a static kernel one sum per block of tokens, [B * blocks, C, W] fp32."""
    i_b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    inside = (t < T)[:, None] & in_c[None, :]
    x += i_b * T * stride
    age += i_b * T
    history += i_b * (W - 1) * C
    if not STATIC:
        kernels += i_b * T * C * W
        dkernels += i_b * T * C * W
    total = tl.zeros((BT, BC), tl.float32)
    for j in tl.static_range(W):
        window = _input(x, stride, history, age, t, c, j, T, C, in_c, W, HISTORY, AGE)
        total += window * _tap(kernels, t, c, j, C, inside, W, STATIC)
    if BIAS:
        total += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    at = i_b * T * C + t.to(tl.int64)[:, None] * C + c[None, :]
    gate = tl.sigmoid(total)
    slope = gate * (1.0 + total * (1.0 - gate))
    change = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(d + at, change, mask=inside)
    for j in tl.static_range(W):
        # Inputs a second time, from the cache, instead of W windows in registers.
        window = _input(x, stride, history, age, t, c, j, T, C, in_c, W, HISTORY, AGE)
        if STATIC:
            block = i_b * tl.num_programs(1) + tl.program_id(1)
            tl.store(dkernels + (block * C + c) * W + j, tl.sum(window * change, 0), mask=in_c)
        else:
            place = t.to(tl.int64)[:, None] * C * W + c[None, :] * W + j
            tl.store(dkernels + place, window * change, mask=inside)


@triton.jit
def conv_backward_input_kernel(
    d, kernels, age, dx, T, C,
    W: tl.constexpr, STATIC: tl.constexpr, AGE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx_s = sum_j kernels_{s + W - 1 - j, j} d_{s + W - 1 - j}: what the next W - 1 tokens read of token s."""
    i_b = tl.program_id(2).to(tl.int64)
    s = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    d += i_b * T * C
    age += i_b * T
    if not STATIC:
        kernels += i_b * T * C * W
    total = tl.zeros((BT, BC), tl.float32)
    for j in tl.static_range(W):
        reader = s + W - 1 - j
        reads = reader < T
        if AGE:
            reads = reads & (tl.load(age + reader, mask=reader < T, other=0) >= W - 1 - j)
        inside = reads[:, None] & in_c[None, :]
        change = tl.load(d + reader.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0)
        total += change * _tap(kernels, reader, c, j, C, inside, W, STATIC)
    place = dx + i_b * T * C + s.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(place, total, mask=(s < T)[:, None] & in_c[None, :])


@triton.jit
def _before(x, stride, history, t, c, in_c, T, C, HISTORY: tl.constexpr):
    """The input of token t [BC] fp32, t < 0 being of the history, zero where there is none."""
    token = t + 0 * c
    value = tl.load(x + token.to(tl.int64) * stride + c, mask=in_c & (token >= 0) & (token < T), other=0.0)
    value = value.to(tl.float32)
    if HISTORY:
        value += tl.load(history + (token + 3) * C + c, mask=in_c & (token < 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def conv_backward_kernel(
    x, stride, kernels, history, age, dy, dkernels, dx, T, C,
    HISTORY: tl.constexpr, AGE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Both gradients of kernels per token with four taps, token by token: a channel's last three inputs, and what the
    tokens so far give to the last three, stay in registers, so that everything is read and written once."""
    i_b = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(1) * BT
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    lanes, there = _four(C, BC)
    x += i_b * T * stride
    dy += i_b * T * C
    dx += i_b * T * C
    age += i_b * T
    history += i_b * 3 * C
    kernels += i_b * T * C * 4
    dkernels += i_b * T * C * 4
    oldest = _before(x, stride, history, begin - 3, c, in_c, T, C, HISTORY)
    older = _before(x, stride, history, begin - 2, c, in_c, T, C, HISTORY)
    last = _before(x, stride, history, begin - 1, c, in_c, T, C, HISTORY)
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
        taps = tl.load(kernels + row * 4 + lanes, mask=there & (t + 0 * lanes < T), other=0.0)
        even, odd = tl.split(tl.reshape(taps, (BC, 2, 2)))
        k0, k2 = tl.split(even.to(tl.float32))
        k1, k3 = tl.split(odd.to(tl.float32))
        newest = tl.load(x + t.to(tl.int64) * stride + c, mask=inside, other=0.0).to(tl.float32)
        if AGE:
            # Taps that reach across a document's border count as zero, here and in every gradient.
            known = tl.load(age + tl.minimum(t, T - 1))
            k0 = tl.where(known >= 3, k0, 0.0)
            k1 = tl.where(known >= 2, k1, 0.0)
            k2 = tl.where(known >= 1, k2, 0.0)
        total = oldest * k0 + older * k1 + last * k2 + newest * k3
        gate = tl.sigmoid(total)
        change = tl.load(dy + row + c, mask=inside, other=0.0).to(tl.float32)
        change *= gate * (1.0 + total * (1.0 - gate))
        if (step < BT) & (t < T):
            d0, d1, d2 = oldest * change, older * change, last * change
            if AGE:
                d0 = tl.where(known >= 3, d0, 0.0)
                d1 = tl.where(known >= 2, d1, 0.0)
                d2 = tl.where(known >= 1, d2, 0.0)
            # Put together as the taps were taken apart: stores of two bytes in every eight would fill no line.
            together = tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, newest * change)), (BC * 4,))
            tl.store(dkernels + row * 4 + lanes, together.to(dkernels.dtype.element_ty), mask=there)
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


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernels: Tensor, bias: Tensor | None, history: Tensor | None, age: Tensor | None
    ) -> Tensor:
        x, kernels = _rows(x), kernels.contiguous()
        # The caller replaces its history in place, and the backward still needs the old one.
        needed = any(ctx.needs_input_grad)
        ctx.history = history.clone() if history is not None and needed else history
        ctx.age = None if age is None else age.contiguous()
        ctx.save_for_backward(x, kernels, bias)
        y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
        conv_forward_kernel[_grid(x)](
            x, x.stride(1), kernels, x if bias is None else bias, x if history is None else history,
            x if age is None else ctx.age, y, x.shape[1], x.shape[2],
            W=kernels.shape[-1], STATIC=kernels.dim() == 2, BIAS=bias is not None, HISTORY=history is not None,
            AGE=age is not None, BT=BLOCK_T, BC=BLOCK_C, num_warps=WARPS,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, kernels, bias = ctx.saved_tensors
        dy = gradients[0].contiguous()
        (batch, tokens, channels), taps, static = x.shape, kernels.shape[-1], kernels.dim() == 2
        history, age = x if ctx.history is None else ctx.history, x if ctx.age is None else ctx.age
        given = {"HISTORY": ctx.history is not None, "AGE": ctx.age is not None}
        dx: Tensor | None = None
        dbias: Tensor | None = None
        if not static and taps == 4 and bias is None:
            dx, dkernels = torch.empty_like(dy), torch.empty_like(kernels)
            conv_backward_kernel[triton.cdiv(channels, STRIP_C), triton.cdiv(tokens, STRIP_T), batch](
                x, x.stride(1), kernels, history, age, dy, dkernels, dx, tokens, channels,
                **given, BT=STRIP_T, BC=STRIP_C, num_warps=STRIP_WARPS,
            )  # fmt: skip
            return dx, dkernels, None, None, None
        grid = _grid(x)
        d = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        if static:
            dkernels = torch.empty(batch * grid[1], channels, taps, dtype=torch.float32, device=x.device)
        else:
            dkernels = torch.empty_like(kernels)
        conv_backward_taps_kernel[grid](
            x, x.stride(1), kernels, x if bias is None else bias, history, age, dy, d, dkernels, tokens, channels,
            W=taps, STATIC=static, BIAS=bias is not None, **given, BT=BLOCK_T, BC=BLOCK_C, num_warps=WARPS,
        )  # fmt: skip
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(dy)
            conv_backward_input_kernel[grid](
                d, kernels, age, dx, tokens, channels,
                W=taps, STATIC=static, AGE=given["AGE"], BT=BLOCK_T, BC=BLOCK_C, num_warps=WARPS,
            )  # fmt: skip
        if bias is not None and ctx.needs_input_grad[2]:
            dbias = d.sum((0, 1)).to(bias.dtype)
        return dx, dkernels.sum(0).to(kernels.dtype) if static else dkernels, dbias, None, None


def ages(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Age of each token of packed documents in its own: cu_seqlens [S + 1] from 0 to `tokens` -> [1, T] int32.

    No host synchronisation; the shape does not depend on where the documents begin.
    """
    place = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    starts = cu_seqlens.to(torch.int32)
    return (place - starts[torch.searchsorted(starts, place, right=True) - 1])[None]


def _advance(history: Tensor, x: Tensor) -> None:
    """The last W-1 of the inputs [B, W-1, C] and [B, T, C], in place."""
    kept = history.shape[1]
    fresh = x[:, -kept:] if x.shape[1] >= kept else torch.cat((history[:, x.shape[1] :].to(x.dtype), x), dim=1)
    history.copy_(fresh[:, fresh.shape[1] - kept :])


def triton_short_conv(
    x: Tensor,
    kernels: Tensor,
    history: Tensor | None = None,
    age: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`naive_dynamic_conv` or `naive_causal_conv`, by the shape of the kernels; differentiable in x, kernels and bias.

    Args:
        x: [B, T, C].
        kernels: [B, T, C, W], one per token (arXiv 2508.15884), or [C, W], one for all (arXiv 2412.06464).
        history: the W-1 inputs before x, [B, W-1, C], replaced in place by the last W-1 inputs; a constant to autograd.
        age: tokens before each token in its own document, [B, T] integers (`ages` makes them of cu_seqlens): nothing
            older is read. None: every row is one document.
        bias: [C], added before SiLU.

    Returns:
        SiLU of the convolution, [B, T, C] in x's dtype.
    """
    y = _ShortConvolution.apply(x, kernels, bias, history, age)
    if history is not None:
        with torch.no_grad():
            _advance(history, x)
    return y


def conv_part(row: Tensor, at: int, kernels: Tensor, history: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """`triton_short_conv` of columns at..at+C of rows [B, T, P], read where they lie; no gradient -> [B, T, C]."""
    channels, taps = kernels.shape[-2:]
    x = row[..., at : at + channels]
    y = torch.empty(x.shape, device=row.device, dtype=row.dtype)
    conv_forward_kernel[_grid(x)](
        x, row.stride(1), kernels, x if bias is None else bias, x if history is None else history, x, y,
        row.shape[1], channels,
        W=taps, STATIC=kernels.dim() == 2, BIAS=bias is not None, HISTORY=history is not None, AGE=False,
        BT=BLOCK_T, BC=BLOCK_C, num_warps=WARPS,
    )  # fmt: skip
    if history is not None:
        _advance(history, x)
    return y
