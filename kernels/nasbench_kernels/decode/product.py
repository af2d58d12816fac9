"""Products for a few to a hundred sequences: each weight is read once, whatever the batch.

The weights are the rows of a program's tile and the sequences its columns. Three forms: y = W x + b; the same divided
over the columns of W, whose parts `add_norm` sums while it adds the residual, so that a matrix of few rows still
occupies the whole card; and y = SiLU(x Wg^T) * (x Wu^T), where cuBLAS writes gate and up for a second kernel to read.

Turned, the sequences are the rows and the weights the columns, which Hopper's matrix instructions take in any multiple
of eight: a program then takes as many outputs as make one program, or two, for each multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.decode.card import card
from nasbench_kernels.decode.overlap import fetch, follow
from nasbench_kernels.decode.product_launch import ProductLaunch, batch_launch, swiglu_launch


@triton.jit
def batch_product_kernel(
    x, weight, bias, out, BATCH, ROWS, COLUMNS, SHARE, x_stride,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    LINE: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, PASS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(1)
    in_rows = rows < ROWS
    sequences = tl.arange(0, BLOCK_B)
    in_batch = sequences < BATCH
    lanes = tl.arange(0, BLOCK_K)
    begin = part * SHARE
    weights = weight + rows.to(tl.int64)[:, None] * COLUMNS + (begin + lanes)[None, :]
    inputs = x + sequences[None, :] * x_stride + (begin + lanes)[:, None]
    total = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    if BIAS:
        offset = tl.load(bias + rows, mask=in_rows, other=0.0).to(tl.float32)
    if PDL:
        for ahead in tl.static_range(0, EARLY * BLOCK_K, LINE):
            column = tl.minimum(begin + ahead, COLUMNS - 1)
            fetch(weight + tl.minimum(rows, ROWS - 1).to(tl.int64) * COLUMNS + column)
    follow(PDL)
    for first in tl.range(0, SHARE, BLOCK_K, num_stages=STAGES):
        if EVEN:
            value = tl.load(inputs + first, mask=in_batch[None, :], other=0.0, eviction_policy=KEEP)
            block = tl.load(weights + first, mask=in_rows[:, None], other=0.0, eviction_policy=PASS)
        else:
            inside = begin + first + lanes < COLUMNS
            value = tl.load(inputs + first, mask=inside[:, None] & in_batch[None, :], other=0.0, eviction_policy=KEEP)
            both = in_rows[:, None] & inside[None, :]
            block = tl.load(weights + first, mask=both, other=0.0, eviction_policy=PASS)
        total = tl.dot(block, value, total, input_precision=PRECISION)
    if BIAS:
        total += offset[:, None]
    at = out + (part * BATCH + sequences)[None, :].to(tl.int64) * ROWS + rows[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_batch[None, :])


@triton.jit
def swiglu_product_kernel(
    x, weight, out, BATCH, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    LINE: tl.constexpr, KEEP: tl.constexpr, PASS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < ROWS
    sequences = tl.arange(0, BLOCK_B)
    in_batch = sequences < BATCH
    lanes = tl.arange(0, BLOCK_K)
    gates = weight + rows.to(tl.int64)[:, None] * COLUMNS + lanes[None, :]
    ups = gates + ROWS * COLUMNS
    inputs = x + sequences[None, :] * COLUMNS + lanes[:, None]
    gate = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    up = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    if PDL > 0:
        for ahead in tl.static_range(0, EARLY * BLOCK_K, LINE):
            at = weight + tl.minimum(rows, ROWS - 1).to(tl.int64) * COLUMNS + min(ahead, COLUMNS - 1)
            fetch(at)
            fetch(at + ROWS * COLUMNS)
    follow(PDL)
    for first in tl.range(0, COLUMNS, BLOCK_K, num_stages=STAGES):
        inside = first + lanes < COLUMNS
        value = tl.load(inputs + first, mask=inside[:, None] & in_batch[None, :], other=0.0, eviction_policy=KEEP)
        both = in_rows[:, None] & inside[None, :]
        block = tl.load(gates + first, mask=both, other=0.0, eviction_policy=PASS)
        gate = tl.dot(block, value, gate, input_precision=PRECISION)
        block = tl.load(ups + first, mask=both, other=0.0, eviction_policy=PASS)
        up = tl.dot(block, value, up, input_precision=PRECISION)
    # Rounded as the rows of the plain product are.
    gate = gate.to(out.dtype.element_ty).to(tl.float32)
    up = up.to(out.dtype.element_ty).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    at = out + sequences[None, :].to(tl.int64) * ROWS + rows[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=in_rows[:, None] & in_batch[None, :])


@triton.jit
def weight_of(output, ROWS, SWIGLU: tl.constexpr, COUNT: tl.constexpr):
    """Of a block's COUNT columns, from `output` on: which output each is for, and its row of the weights. With SWIGLU
    the gate of an output and its up stand side by side, ROWS apart in memory."""
    lanes = tl.arange(0, COUNT)
    if SWIGLU:
        outputs = output + lanes // 2
        rows = tl.minimum(outputs, ROWS - 1) + lanes % 2 * ROWS
    else:
        outputs = output + lanes
        rows = tl.minimum(outputs, ROWS - 1)
    return outputs, rows.to(tl.int64)


@triton.jit
def store_turned(
    total, bias, out, also, output, end, also_at, BATCH, ROWS, BLOCK_B: tl.constexpr, COUNT: tl.constexpr,
    SWIGLU: tl.constexpr, BIAS: tl.constexpr, ALSO: tl.constexpr,
):  # fmt: skip
    """Writes the outputs from `output` to `end` of a tile [BLOCK_B, COUNT] of sums, and SiLU of the ALSO outputs from
    `also_at` on to `also` [B, ALSO]."""
    sequences = tl.arange(0, BLOCK_B)
    if SWIGLU:
        # Neighbouring columns of a tile of sums are in the same thread: nothing is exchanged.
        gate, up = tl.split(tl.reshape(total, [BLOCK_B, COUNT // 2, 2]))
        outputs = output + tl.arange(0, COUNT // 2)
        # Rounded as the rows of the plain product are.
        gate = gate.to(out.dtype.element_ty).to(tl.float32)
        up = up.to(out.dtype.element_ty).to(tl.float32)
        result = gate / (1.0 + tl.exp(-gate)) * up
    else:
        outputs = output + tl.arange(0, COUNT)
        result = total
        if BIAS:
            result += tl.load(bias + outputs, mask=outputs < end, other=0.0).to(tl.float32)[None, :]
    at = out + sequences[:, None].to(tl.int64) * ROWS + outputs[None, :]
    wanted = (sequences < BATCH)[:, None] & (outputs < end)[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=wanted)
    if ALSO > 0:
        place = outputs - also_at
        # Of what was written, rounded.
        result = result.to(out.dtype.element_ty).to(tl.float32)
        active = (result / (1.0 + tl.exp(-result))).to(out.dtype.element_ty)
        tl.store(
            also + sequences[:, None] * ALSO + place[None, :], active,
            mask=wanted & ((place >= 0) & (place < ALSO))[None, :],
        )  # fmt: skip


@triton.jit
def turned_product_kernel(
    x, weight, bias, out, also, BATCH, ROWS, COLUMNS, SHARE, TAKEN, x_stride, also_at,
    BLOCK_R: tl.constexpr, MORE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, LINE: tl.constexpr, EVEN: tl.constexpr, SWIGLU: tl.constexpr, BIAS: tl.constexpr,
    ALSO: tl.constexpr, KEEP: tl.constexpr, PASS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * TAKEN
    end = tl.minimum(begin + TAKEN, ROWS)
    part = tl.program_id(1).to(tl.int64)
    start = part * SHARE
    second = begin + (BLOCK_R // 2 if SWIGLU else BLOCK_R)
    sequences = tl.arange(0, BLOCK_B)
    in_batch = sequences < BATCH
    lanes = tl.arange(0, BLOCK_K)
    outputs, rows = weight_of(begin, ROWS, SWIGLU, BLOCK_R)
    in_rows = outputs < end
    weights = weight + rows[None, :] * COLUMNS + (start + lanes)[:, None]
    inputs = x + sequences[:, None] * x_stride + (start + lanes)[None, :]
    total = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
    if MORE > 0:
        more_outputs, more_rows = weight_of(second, ROWS, SWIGLU, MORE)
        in_more = more_outputs < end
        others = weight + more_rows[None, :] * COLUMNS + (start + lanes)[:, None]
        rest = tl.zeros([BLOCK_B, MORE], tl.float32)
    if PDL:
        for ahead in tl.static_range(0, EARLY * BLOCK_K, LINE):
            column = tl.minimum(start + ahead, COLUMNS - 1)
            fetch(weight + rows * COLUMNS + column)
            if MORE > 0:
                fetch(weight + more_rows * COLUMNS + column)
    follow(PDL)
    for first in tl.range(0, SHARE, BLOCK_K, num_stages=STAGES):
        if EVEN:
            value = tl.load(inputs + first, mask=in_batch[:, None], other=0.0, eviction_policy=KEEP)
            block = tl.load(weights + first, mask=in_rows[None, :], other=0.0, eviction_policy=PASS)
        else:
            inside = start + first + lanes < COLUMNS
            value = tl.load(inputs + first, mask=in_batch[:, None] & inside[None, :], other=0.0, eviction_policy=KEEP)
            both = inside[:, None] & in_rows[None, :]
            block = tl.load(weights + first, mask=both, other=0.0, eviction_policy=PASS)
        total = tl.dot(value, block, total, input_precision=PRECISION)
        if MORE > 0:
            if EVEN:
                block = tl.load(others + first, mask=in_more[None, :], other=0.0, eviction_policy=PASS)
            else:
                both = inside[:, None] & in_more[None, :]
                block = tl.load(others + first, mask=both, other=0.0, eviction_policy=PASS)
            rest = tl.dot(value, block, rest, input_precision=PRECISION)
    out += part * BATCH * ROWS
    store_turned(
        total, bias, out, also, begin, end, also_at, BATCH, ROWS, BLOCK_B, BLOCK_R, SWIGLU, BIAS, ALSO
    )  # fmt: skip
    if MORE > 0:
        store_turned(
            rest, bias, out, also, second, end, also_at, BATCH, ROWS, BLOCK_B, MORE, SWIGLU, BIAS, ALSO
        )  # fmt: skip


def batch_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, divided: bool = False) -> Tensor:
    """y = W x (+ bias): x [B, K] of contiguous rows, B at most 128, weight [N, K] contiguous -> [B, N] in x's dtype.

    Args:
        divided: y as the sum of parts, which is `add_norm`'s to form: fp32 [S, B, N], no bias.
    """
    (batch, columns), rows = x.shape, weight.shape[0]
    launch = batch_launch(batch, rows, columns, x.element_size(), *card(x.device), divided)
    return launch_batch_product(x, weight, bias, divided, launch)


def product_and_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None, at: int, size: int
) -> tuple[Tensor, Tensor | None]:
    """`batch_product`, and SiLU of its outputs from `at` to `at + size`, [B, size], where the launch can write it along
    (a turned one); else None."""
    (batch, columns), rows = x.shape, weight.shape[0]
    launch = batch_launch(batch, rows, columns, x.element_size(), *card(x.device), False)
    if not launch.turned:
        return launch_batch_product(x, weight, bias, False, launch), None
    also = torch.empty(batch, size, device=x.device, dtype=x.dtype)
    return launch_turned_product(x, weight, bias, False, launch, also=also, also_at=at), also


def launch_batch_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, divided: bool, launch: ProductLaunch
) -> Tensor:
    """`batch_product` as `launch` says."""
    (batch, columns), rows = x.shape, weight.shape[0]
    if launch.turned:
        return launch_turned_product(x, weight, bias, False, launch, divided)
    size, kind = ((launch.parts, batch, rows), torch.float32) if divided else ((batch, rows), x.dtype)
    out = torch.empty(size, device=x.device, dtype=kind)
    share = launch.share(columns)
    batch_product_kernel[(triton.cdiv(rows, launch.rows), launch.parts)](
        x, weight, x if bias is None else bias, out, batch, rows, columns, share, x.stride(0),
        EVEN=share * launch.parts == columns, BIAS=bias is not None, **launch.constants(x),
    )  # fmt: skip
    return out


def swiglu_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, K] contiguous, B at most 128, weight [2 F, K], gate over up -> SiLU(x Wg^T) * (x Wu^T), [B, F]."""
    launch = swiglu_launch(x.shape[0], weight.shape[0] // 2, x.element_size(), *card(x.device))
    return launch_swiglu_product(x, weight, launch)


def launch_swiglu_product(x: Tensor, weight: Tensor, launch: ProductLaunch) -> Tensor:
    """`swiglu_product` as `launch` says."""
    if launch.turned:
        return launch_turned_product(x, weight, None, True, launch)
    rows = weight.shape[0] // 2
    out = torch.empty(x.shape[0], rows, device=x.device, dtype=x.dtype)
    swiglu_product_kernel[(triton.cdiv(rows, launch.rows),)](
        x, weight, out, x.shape[0], COLUMNS=x.shape[1], ROWS=rows, **launch.constants(x)
    )
    return out


def launch_turned_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, swiglu: bool, launch: ProductLaunch, divided: bool = False,
    also: Tensor | None = None, also_at: int = 0,
) -> Tensor:  # fmt: skip
    """y = W x (+ bias), or SiLU(x Wg^T) * (x Wu^T), with the sequences as rows of a tile.

    Args:
        x: [B, K] of contiguous rows.
        weight: [N, K], or [2 N, K], gate over up, with `swiglu`.
        divided: as in `batch_product`.
        also: [B, M] of x's dtype, into which SiLU of the outputs from `also_at` on is written, too.

    Returns:
        [B, N] in x's dtype, or fp32 [S, B, N].
    """
    (batch, columns), rows = x.shape, weight.shape[0] // (2 if swiglu else 1)
    taken, share = launch.outputs(swiglu), launch.share(columns)
    size, kind = ((launch.parts, batch, rows), torch.float32) if divided else ((batch, rows), x.dtype)
    out = torch.empty(size, device=x.device, dtype=kind)
    turned_product_kernel[(triton.cdiv(rows, taken), launch.parts)](
        x, weight, x if bias is None else bias, out, out if also is None else also, batch, rows, columns, share, taken,
        x.stride(0), also_at, MORE=launch.more, EVEN=share * launch.parts == columns, SWIGLU=swiglu,
        BIAS=bias is not None, ALSO=0 if also is None else also.shape[1], **launch.constants(x),
    )  # fmt: skip
    return out
