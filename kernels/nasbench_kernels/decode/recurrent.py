"""One decode step of the gated delta rule in one launch: convolution, activations, norms, gates, state, output norm.

The state is read and written once, in place; everything else of a step is a few kilobytes a head. Each program owns a
tile of value channels of one head of one sequence, so that even one sequence fills many multiprocessors. The output
norm needs all tiles of a head: the program that finishes last, by a counter in memory, does it for the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

NORM_EPS = 1e-5
L2_EPS = 1e-6


@dataclass(frozen=True)
class RowLayout:
    """Where a stacked projection's parts begin in its rows, in elements."""

    q: int
    k: int
    v: int
    gate: int
    decay: int
    beta: int


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def recurrent_step_kernel(
    row, kernels, history, state, a_log, dt_bias, norm_weight, scratch, counters, out,
    row_stride, q_at, k_at, v_at, gate_at, decay_at, beta_at, scale,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ALL: tl.constexpr, TILES: tl.constexpr,
    DYNAMIC: tl.constexpr, L2_EPS_: tl.constexpr, NORM_EPS_: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % TILES
    head_of_batch = (program // TILES).to(tl.int64)
    sequence = head_of_batch // HEADS
    head = head_of_batch % HEADS
    keys = tl.arange(0, BLOCK_K)
    in_keys = keys < KEY
    channels = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_values = channels < VALUE
    base = row + sequence * row_stride
    # The state first: it is nearly all of the traffic, and what follows hides behind it.
    where = state + (head_of_batch * KEY + keys[:, None]) * VALUE + channels[None, :]
    inside = in_keys[:, None] & in_values[None, :]
    memory = tl.load(where, mask=inside, other=0.0).to(tl.float32)

    q = tl.load(base + q_at + head * KEY + keys, mask=in_keys, other=0.0).to(tl.float32)
    k = tl.load(base + k_at + head * KEY + keys, mask=in_keys, other=0.0).to(tl.float32)
    channel = head * VALUE + channels
    v = tl.load(base + v_at + channel, mask=in_values, other=0.0).to(tl.float32)
    if DYNAMIC:
        q = _silu(q)
        k = _silu(k)
        width: tl.constexpr = HEADS * VALUE
        tap = tl.arange(0, BLOCK_T)[:, None]
        taps = tl.load(
            kernels + (sequence * width + channel[None, :]) * TAPS + tap,
            mask=in_values[None, :] & (tap < TAPS), other=0.0,
        ).to(tl.float32)  # fmt: skip
        past = history + (sequence * (TAPS - 1) + tap) * width + channel[None, :]
        earlier = tl.load(past, mask=in_values[None, :] & (tap < TAPS - 1), other=0.0)
        newest = v
        inputs = tl.where(tap == TAPS - 1, newest[None, :], earlier.to(tl.float32))
        v = _silu(tl.sum(inputs * taps, 0))
        # Several threads may hold one element: all must have read before any writes.
        tl.debug_barrier()
        tl.store(past - width, inputs.to(history.dtype.element_ty), mask=in_values[None, :] & (tap > 0) & (tap < TAPS))
    q = q * tl.rsqrt(tl.sum(q * q) + L2_EPS_) * scale
    k = k * tl.rsqrt(tl.sum(k * k) + L2_EPS_)
    step = tl.load(base + decay_at + head).to(tl.float32) + tl.load(dt_bias + head)
    softplus = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    decay = tl.exp(-tl.exp(tl.load(a_log + head)) * softplus)
    beta = 1.0 / (1.0 + tl.exp(-tl.load(base + beta_at + head).to(tl.float32)))

    memory = memory * decay
    write = beta * (v - tl.sum(memory * k[:, None], 0))
    memory += k[:, None] * write[None, :]
    tl.store(where, memory.to(state.dtype.element_ty), mask=inside)
    mixed = tl.sum(memory * q[:, None], 0)

    every = tl.arange(0, BLOCK_ALL)
    in_head = every < VALUE
    last = True
    if TILES > 1:
        tl.store(scratch + head_of_batch * VALUE + channels, mixed, mask=in_values)
        tl.debug_barrier()
        last = tl.atomic_add(counters + head_of_batch, 1, sem="acq_rel") == TILES - 1
    if last:
        if TILES > 1:
            # Past the first-level cache, which does not see what other multiprocessors wrote.
            whole = tl.load(scratch + head_of_batch * VALUE + every, mask=in_head, other=0.0, cache_modifier=".cg")
            tl.store(counters + head_of_batch, 0)
        else:
            whole = mixed
        gate = tl.load(base + gate_at + head * VALUE + every, mask=in_head, other=0.0).to(tl.float32)
        weight = tl.load(norm_weight + every, mask=in_head, other=0.0).to(tl.float32)
        normed = whole * tl.rsqrt(tl.sum(whole * whole) / VALUE + NORM_EPS_) * weight
        at = out + head_of_batch * VALUE + every
        tl.store(at, (normed * _silu(gate)).to(out.dtype.element_ty), mask=in_head)


def tile_of(key_dim: int, value_dim: int, state_bytes: int) -> tuple[int, int]:
    """(value channels of a program, its warps): a tile of about 8192 fp32 elements, 64 registers a thread, leaves room
    for four programs a multiprocessor, whose reads and writes overlap."""
    block_k = triton.next_power_of_2(key_dim)
    block_v = max(16, min(triton.next_power_of_2(value_dim), 8192 // block_k))
    return block_v, 4


class StepWorkspace:
    """Scratch of one batch of heads, shared by all layers: steps of one stream follow one another.

    Grown when a larger batch comes; what was handed out before stays alive, since captured graphs write to it.
    """

    def __init__(self) -> None:
        self.scratch: Tensor | None = None
        self.counters: Tensor | None = None
        self._handed_out: list[Tensor] = []

    def of(self, heads: int, value_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(scratch fp32 [heads * value_dim], counters int32 [heads], zero)."""
        size = heads * value_dim
        if self.scratch is None or self.scratch.numel() < size or self.scratch.device != device:
            self.scratch = torch.empty(size, device=device, dtype=torch.float32)
            self._handed_out.append(self.scratch)
        if self.counters is None or self.counters.numel() < heads or self.counters.device != device:
            self.counters = torch.zeros(heads, device=device, dtype=torch.int32)
            self._handed_out.append(self.counters)
        return self.scratch, self.counters


def recurrent_step(
    row: Tensor,
    layout: RowLayout,
    state: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    workspace: StepWorkspace,
    kernels: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """A whole JetBlock or Gated DeltaNet step between the input and the output projection.

    y = RMSNorm(S_t^T q / sqrt(K)) * SiLU(gate) per head (arXiv 2412.06464 equation 10, arXiv 2508.15884 for JetBlock).

    Args:
        row: stacked projections [B, P], contiguous rows.
        state: [B, H, K, V] fp32 or bf16, written in place.
        a_log, dt_bias: [H] fp32.
        norm_weight: [V].
        kernels: JetBlock's dynamic kernels [B, H * V, W] with history [B, W-1, H * V], shifted in place; then q, k and
            v pass SiLU here. None: row holds q, k and v after convolution and SiLU.

    Returns:
        [B, H * V] in row's dtype.
    """
    batch, heads, key_dim, value_dim = state.shape
    block_v, warps = tile_of(key_dim, value_dim, state.element_size())
    tiles = triton.cdiv(value_dim, block_v)
    scratch, counters = workspace.of(batch * heads, value_dim, row.device)
    out = torch.empty(batch, heads * value_dim, device=row.device, dtype=row.dtype)
    dynamic = kernels is not None
    recurrent_step_kernel[(batch * heads * tiles,)](
        row, kernels if dynamic else row, history if dynamic else row, state, a_log, dt_bias, norm_weight,
        scratch, counters, out, row.stride(0), layout.q, layout.k, layout.v, layout.gate, layout.decay, layout.beta,
        key_dim**-0.5, HEADS=heads, KEY=key_dim, VALUE=value_dim, TAPS=kernels.shape[-1] if kernels is not None else 2,
        BLOCK_T=triton.next_power_of_2(kernels.shape[-1]) if kernels is not None else 2,
        BLOCK_K=triton.next_power_of_2(key_dim), BLOCK_V=block_v,
        BLOCK_ALL=max(block_v, triton.next_power_of_2(value_dim)),
        TILES=tiles, DYNAMIC=dynamic, L2_EPS_=L2_EPS, NORM_EPS_=NORM_EPS, num_warps=warps,
    )  # fmt: skip
    return out
