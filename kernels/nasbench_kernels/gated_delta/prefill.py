"""The chunked gated delta rule in Triton, forward and backward. README.md derives the equations and names the symbols.

    fwd_prepare     every chunk at once: (I + A)^-1, writes u, reads w, scores P
    fwd_state       chunk by chunk, a program per tile of value channels: state, updates, outputs
    bwd_state       chunk by chunk backwards: gradients of states and updates
    bwd_qk, bwd_kv  every chunk at once: gradients of q, k, g from the outputs; of k, v, g, beta from the updates

States stay in registers in fp32; operands of matrix products are in the inputs' dtype and accumulate in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from nasbench_kernels.gated_delta.backward_kernels import bwd_kv_kernel, bwd_qk_kernel, bwd_state_kernel
from nasbench_kernels.gated_delta.forward_kernels import fwd_prepare_kernel, fwd_state_kernel

CHUNK = 64
SCAN_STAGES = 2
WGMMA_OFF = "DISABLE_MMA_V3"
"""Triton's switch, read when a kernel is compiled, that takes Ampere's matrix instructions on Hopper as well.

Hopper's read shared memory by descriptors, whose upper half ptxas 12.9 (in Triton 3.6) fills from the wrong register
for some tile sizes here: results of arbitrary memory, or an illegal access.
"""


@contextmanager
def without_wgmma() -> Iterator[None]:
    before = os.environ.get(WGMMA_OFF)
    os.environ[WGMMA_OFF] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[WGMMA_OFF]
        else:
            os.environ[WGMMA_OFF] = before


@dataclass(frozen=True)
class _Tiles:
    keys: int
    scan: int
    """Value channels of a scan's program."""
    prepare: int
    collect: int
    stages: int
    """Of the scans' loads: keys of more than 128 take a second one beyond the shared memory of an RTX 3090."""
    warps: int
    """Of every kernel. All take 255 registers a thread: with four warps, two blocks share a multiprocessor, and one
    computes while the other waits. On an H100, forward and backward with eight and with four: 4039 and 2128 us for the
    64 x 64 states of SmolLM2's training, 2969 and 2165 for the 2B's of 96 x 256. Keys of more than 128 and fp32 have
    tiles twice as large."""


def _tiles(like: Tensor, value_dim: int) -> _Tiles:
    key_dim, values = like.shape[-1], max(16, triton.next_power_of_2(value_dim))
    wide = like.dtype == torch.float32 or key_dim > 128
    return _Tiles(
        keys=max(16, triton.next_power_of_2(key_dim)),
        scan=min(32, values),
        prepare=min(32 if wide else 64, values),
        collect=16,
        stages=SCAN_STAGES if key_dim <= 128 else 1,
        warps=8 if wide else 4,
    )


def _sizes(like: Tensor, value_dim: int, tiles: _Tiles) -> dict[str, Any]:
    """Constants of every kernel. fp32 inputs keep fp32's precision, as three products of tf32: exact ones take a minute
    to compile."""
    precision = "tf32x3" if like.dtype == torch.float32 else "tf32"
    return {
        "KEY": like.shape[-1], "VALUE": value_dim, "CHUNK": CHUNK, "BLOCK_K": tiles.keys, "PRECISION": precision
    }  # fmt: skip


class _ChunkedGatedDelta(torch.autograd.Function):
    @staticmethod
    @without_wgmma()
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        batch, tokens, heads, key_dim = q.shape
        value_dim, count, kind = v.shape[-1], -(-tokens // CHUNK), k.dtype
        keep = any(ctx.needs_input_grad)
        tiles = _tiles(k, value_dim)
        sizes = _sizes(k, value_dim, tiles)
        totals = torch.empty(batch, tokens, heads, device=k.device)
        scores = torch.empty(batch, tokens, heads, CHUNK, device=k.device, dtype=kind)
        writes, reads, out = torch.empty_like(v, dtype=kind), torch.empty_like(k), torch.empty_like(v)
        inverses = torch.empty_like(scores) if keep else scores
        fwd_prepare_kernel[(count, batch * heads)](
            q, k, v, g, beta, totals, inverses, writes, reads, scores, tokens, heads, scale,
            **sizes, BLOCK_V=tiles.prepare, KEEP=keep, num_warps=tiles.warps,
        )  # fmt: skip
        state_out = torch.empty(batch, heads, key_dim, value_dim, device=k.device)
        states = torch.empty(batch * heads, count, key_dim, value_dim, device=k.device, dtype=kind) if keep else out
        updates = torch.empty_like(writes) if keep else out
        fwd_state_kernel[(triton.cdiv(value_dim, tiles.scan), batch * heads)](
            q, k, totals, writes, reads, scores, state_out if state is None else state.contiguous(), state_out,
            states, updates, out, tokens, heads, scale,
            **sizes, BLOCK_V=tiles.scan, STATE=state is not None, KEEP=keep, STAGES=tiles.stages,
            num_warps=tiles.warps,
        )  # fmt: skip
        if keep:
            ctx.save_for_backward(q, k, v, beta, totals, inverses, reads, scores, states, updates)
            ctx.scale, ctx.stateful, ctx.gates = scale, state is not None and state.requires_grad, g.dtype
        return out, state_out

    @staticmethod
    @without_wgmma()
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, totals, inverses, reads, scores, states, updates = ctx.saved_tensors
        dout, dstate_out = (x.contiguous() for x in gradients)
        batch, tokens, heads, _ = q.shape
        value_dim, count = v.shape[-1], -(-tokens // CHUNK)
        tiles = _tiles(k, value_dim)
        sizes = _sizes(k, value_dim, tiles)
        dstate_in, dstates, dupdates = torch.empty_like(dstate_out), torch.empty_like(states), torch.empty_like(updates)
        bwd_state_kernel[(triton.cdiv(value_dim, tiles.scan), batch * heads)](
            q, k, totals, reads, scores, dout, dstate_out, dstate_in, dstates, dupdates, tokens, heads, ctx.scale,
            **sizes, BLOCK_V=tiles.scan, STATE=True, STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dg, dbeta = torch.empty_like(totals), torch.empty_like(totals)
        dkeys = torch.empty_like(k, dtype=torch.float32)  # what the outputs and the kept updates give
        bwd_qk_kernel[(count, batch * heads)](
            q, k, totals, states, updates, dout, dstates, dq, dkeys, dg, tokens, heads, ctx.scale,
            **sizes, BLOCK_V=tiles.collect, num_warps=tiles.warps,
        )  # fmt: skip
        bwd_kv_kernel[(count, batch * heads)](
            k, v, beta, totals, inverses, states, dupdates, dkeys, dk, dv, dg, dbeta, tokens, heads,
            **sizes, BLOCK_V=tiles.collect, num_warps=tiles.warps,
        )  # fmt: skip
        return dq, dk, dv, dg.to(ctx.gates), dbeta.to(beta.dtype), dstate_in if ctx.stateful else None, None


def triton_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `naive_gated_delta`, differentiable in all of them.

    q, k and v share a dtype: matrix products take it and accumulate in fp32. K is at most 256.
    """
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share a dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _ChunkedGatedDelta.apply(q, k, v, g, beta, state, scale)
