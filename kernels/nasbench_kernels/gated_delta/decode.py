"""One decode step of a linear recurrence in one launch: convolution, activations, norms, gates, state, output norm.

The state is nearly all of the traffic: it is read and written once, in place. A program owns one head of one sequence
(or, where there are few heads, a part of its value channels) and goes through tiles of value channels; the next tiles
are on their way through shared memory while one is computed. Values after the convolution, and outputs before the norm,
stay in a scratch buffer of a hundredth of the state's size. The norm needs all tiles of a head: where several programs
share a head, the last one to finish, by a counter in memory, normalises it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasbench_kernels.common.launch import launch_for, sm_limits
from nasbench_kernels.common.pdl import pdl_launch, wait
from nasbench_kernels.common.tile import silu
from nasbench_kernels.conv.decode import conv_step
from nasbench_kernels.gated_delta.naive import L2_EPS, RowLayout
from nasbench_kernels.gated_delta.step_parts import convolved, decay_of, held, move_on, vector, widened
from nasbench_kernels.norm.naive import NORM_EPS


@triton.jit
def recurrent_step_kernel(
    row, decay_rows, decay_weight, decay_bias, gate_rows, conv_weight, conv_state, state, a_log, dt_bias, norm_weight,
    cos, sin, scratch, counters, out, row_stride, decay_stride, gate_stride, table_stride, q_at, k_at, v_at, gate_at,
    decay_at, beta_at, scale, sign,
    HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_ALL: tl.constexpr, STAGES: tl.constexpr, DYNAMIC: tl.constexpr, L2_EPS_: tl.constexpr,
    NORM_EPS_: tl.constexpr, CHANNELS: tl.constexpr, DELTA: tl.constexpr, UNIT: tl.constexpr, ROTARY: tl.constexpr,
    GATE: tl.constexpr, STATIC: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    part = program % PARTS
    head_of_batch = (program // PARTS).to(tl.int64)
    sequence = head_of_batch // HEADS
    head = head_of_batch % HEADS
    base = row + sequence * row_stride
    outputs = scratch + head_of_batch * VALUE

    own_state = state + head_of_batch * KEY * VALUE
    rate = tl.load(a_log + head)
    # Keys in two blocks of powers of two: 96 = 64 + 32 leaves no lane idle.
    first = tl.arange(0, BLOCK_A)
    second = BLOCK_A + tl.arange(0, BLOCK_B)
    in_first = first < KEY
    in_second = second < KEY
    if CHANNELS:
        shift_a = tl.load(dt_bias + head * KEY + first, mask=in_first, other=0.0).to(tl.float32)
        shift_b = tl.load(dt_bias + head * KEY + second, mask=in_second, other=0.0).to(tl.float32)
    else:
        shift = tl.load(dt_bias + head)
    # The state is the only thing read here that a launch writes: the last step of this layer did. The launch just ahead
    # is a product or a convolution, and it let this one begin when all before it were done.
    if TILES == 1:
        tile_at = part * BLOCK_V + tl.arange(0, BLOCK_V)
        in_tile = tile_at < VALUE
        old_a = tl.load(
            own_state + first[:, None] * VALUE + tile_at[None, :], mask=in_first[:, None] & in_tile[None, :], other=0.0,
        )  # fmt: skip
        old_b = tl.load(
            own_state + second[:, None] * VALUE + tile_at[None, :], mask=in_second[:, None] & in_tile[None, :],
            other=0.0,
        )  # fmt: skip
    BLOCK_P: tl.constexpr = BLOCK_V * TILES
    mine = part * BLOCK_P + tl.arange(0, BLOCK_P)
    in_mine = mine < VALUE
    channel = head * VALUE + mine
    if STATIC:
        # As the state: nothing just ahead writes the last inputs.
        SIZE: tl.constexpr = HEADS * (2 * KEY + VALUE)
        window = conv_state + sequence * (TAPS - 1) * SIZE
        own = head * KEY
        taps_qa, past_qa = held(conv_weight, window, own + first, in_first, SIZE, TAPS, BLOCK_T)
        taps_qb, past_qb = held(conv_weight, window, own + second, in_second, SIZE, TAPS, BLOCK_T)
        taps_ka, past_ka = held(conv_weight, window, HEADS * KEY + own + first, in_first, SIZE, TAPS, BLOCK_T)
        taps_kb, past_kb = held(conv_weight, window, HEADS * KEY + own + second, in_second, SIZE, TAPS, BLOCK_T)
        taps_v, past_v = held(conv_weight, window, 2 * HEADS * KEY + channel, in_mine, SIZE, TAPS, BLOCK_T)
    wait(PDL)
    # Everything else that is read before the state, asked for at once.
    from_q = base + q_at + head * KEY
    from_k = base + k_at + head * KEY
    cos += sequence * table_stride
    sin += sequence * table_stride
    q_a = vector(from_q, first, in_first, cos, sin, KEY, ROTARY)
    k_a = vector(from_k, first, in_first, cos, sin, KEY, ROTARY)
    q_b = vector(from_q, second, in_second, cos, sin, KEY, ROTARY)
    k_b = vector(from_k, second, in_second, cos, sin, KEY, ROTARY)
    from_decay = decay_rows + sequence * decay_stride + decay_at
    if RANK > 0:
        own_weight = decay_weight + head * KEY * RANK
        step_a = widened(own_weight, from_decay, decay_bias + head * KEY, first, in_first, RANK)
        step_b = widened(own_weight, from_decay, decay_bias + head * KEY, second, in_second, RANK)
    elif CHANNELS:
        step_a = tl.load(from_decay + head * KEY + first, mask=in_first, other=0.0)
        step_b = tl.load(from_decay + head * KEY + second, mask=in_second, other=0.0)
    else:
        step = tl.load(from_decay + head)
    beta_logit = tl.load(base + beta_at + head).to(tl.float32)
    v = tl.load(base + v_at + channel, mask=in_mine, other=0.0).to(tl.float32)

    # Values of this part, after the convolution, into the scratch buffer.
    if DYNAMIC:
        width: tl.constexpr = HEADS * VALUE
        tap = tl.arange(0, BLOCK_T)[:, None]
        taps = tl.load(
            conv_weight + (sequence * width + channel[None, :]) * TAPS + tap,
            mask=in_mine[None, :] & (tap < TAPS), other=0.0,
        ).to(tl.float32)  # fmt: skip
        past = conv_state + (sequence * (TAPS - 1) + tap) * width + channel[None, :]
        earlier = tl.load(past, mask=in_mine[None, :] & (tap < TAPS - 1), other=0.0)
        inputs = tl.where(tap == TAPS - 1, v[None, :], earlier.to(tl.float32))
        v = silu(tl.sum(inputs * taps, 0))
        q_a = silu(q_a)
        k_a = silu(k_a)
        q_b = silu(q_b)
        k_b = silu(k_b)
        # Several threads may hold one element: all must have read before any writes.
        tl.debug_barrier()
        tl.store(past - width, inputs.to(conv_state.dtype.element_ty), mask=in_mine[None, :] & (tap > 0) & (tap < TAPS))
    if STATIC:
        inputs_qa, q_a = convolved(q_a, taps_qa, past_qa, TAPS, BLOCK_T)
        inputs_qb, q_b = convolved(q_b, taps_qb, past_qb, TAPS, BLOCK_T)
        inputs_ka, k_a = convolved(k_a, taps_ka, past_ka, TAPS, BLOCK_T)
        inputs_kb, k_b = convolved(k_b, taps_kb, past_kb, TAPS, BLOCK_T)
        inputs_v, v = convolved(v, taps_v, past_v, TAPS, BLOCK_T)
        # As above.
        tl.debug_barrier()
        move_on(inputs_qa, window, own + first, in_first, SIZE, TAPS, BLOCK_T)
        move_on(inputs_qb, window, own + second, in_second, SIZE, TAPS, BLOCK_T)
        move_on(inputs_ka, window, HEADS * KEY + own + first, in_first, SIZE, TAPS, BLOCK_T)
        move_on(inputs_kb, window, HEADS * KEY + own + second, in_second, SIZE, TAPS, BLOCK_T)
        move_on(inputs_v, window, 2 * HEADS * KEY + channel, in_mine, SIZE, TAPS, BLOCK_T)
    tl.store(outputs + mine, v, mask=in_mine)

    if UNIT:
        q_factor = tl.rsqrt(tl.sum(q_a * q_a) + tl.sum(q_b * q_b) + L2_EPS_) * scale
        k_factor = tl.rsqrt(tl.sum(k_a * k_a) + tl.sum(k_b * k_b) + L2_EPS_)
        k_a *= k_factor
        k_b *= k_factor
    else:
        q_factor = scale
    q_a *= q_factor
    q_b *= q_factor
    q_k = tl.sum(q_a * k_a) + tl.sum(q_b * k_b)
    if CHANNELS:
        decay_a = decay_of(step_a, shift_a, rate, sign)
        decay_b = decay_of(step_b, shift_b, rate, sign)
    else:
        decay = decay_of(step, shift, rate, sign)
    beta = 1.0 / (1.0 + tl.exp(-beta_logit))
    every = tl.arange(0, BLOCK_ALL)
    in_head = every < VALUE
    # On their way during the tiles.
    gate = tl.load(gate_rows + sequence * gate_stride + gate_at + head * VALUE + every, mask=in_head, other=0.0)
    weight = tl.load(norm_weight + every, mask=in_head, other=0.0)
    tl.debug_barrier()

    kind = state.dtype.element_ty
    for tile in tl.range(0, TILES, num_stages=STAGES):
        at = (part * TILES + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = at < VALUE
        at_a = own_state + first[:, None] * VALUE + at[None, :]
        at_b = own_state + second[:, None] * VALUE + at[None, :]
        if TILES == 1:
            a = old_a.to(tl.float32)
            b = old_b.to(tl.float32)
        else:
            a = tl.load(at_a, mask=in_first[:, None] & inside[None, :], other=0.0).to(tl.float32)
            b = tl.load(at_b, mask=in_second[:, None] & inside[None, :], other=0.0).to(tl.float32)
        value = tl.load(outputs + at, mask=inside, other=0.0)
        if CHANNELS:
            a *= decay_a[:, None]
            b *= decay_b[:, None]
        else:
            a *= decay
            b *= decay
        # The output from the old state, S_t^T q = (decay S)^T q + (q . k) u: no second pass over what was written.
        read_q = tl.sum(a * q_a[:, None], 0) + tl.sum(b * q_b[:, None], 0)
        write = value
        if DELTA:
            write = beta * (value - tl.sum(a * k_a[:, None], 0) - tl.sum(b * k_b[:, None], 0))
        a += k_a[:, None] * write[None, :]
        b += k_b[:, None] * write[None, :]
        tl.store(at_a, a.to(kind), mask=in_first[:, None] & inside[None, :])
        tl.store(at_b, b.to(kind), mask=in_second[:, None] & inside[None, :])
        tl.store(outputs + at, read_q + q_k * write, mask=inside)

    tl.debug_barrier()
    last = True
    if PARTS > 1:
        last = tl.atomic_add(counters + head_of_batch, 1, sem="acq_rel") == PARTS - 1
    if last:
        # Past the first-level cache, which does not see what other multiprocessors wrote.
        whole = tl.load(outputs + every, mask=in_head, other=0.0, cache_modifier=".cg")
        if PARTS > 1:
            tl.store(counters + head_of_batch, 0)
        normed = whole * tl.rsqrt(tl.sum(whole * whole) / VALUE + NORM_EPS_) * weight.to(tl.float32)
        if GATE == "silu":
            normed *= silu(gate.to(tl.float32))
        if GATE == "sigmoid":
            normed *= tl.sigmoid(gate.to(tl.float32))
        tl.store(out + head_of_batch * VALUE + every, normed.to(out.dtype.element_ty), mask=in_head)


def key_blocks(key_dim: int) -> tuple[int, int]:
    """Two powers of two that hold the keys with least padding: 96 -> 64 and 32, 64 -> 32 and 32."""
    block_a = max(16, triton.next_power_of_2(-(-key_dim // 2)))
    return block_a, max(16, triton.next_power_of_2(max(1, key_dim - block_a)))


@dataclass(frozen=True)
class StepLaunch:
    """How a head's value channels are split: `parts` programs of `tiles` tiles of `block_v` channels each.

    Attributes:
        block_v, tiles: powers of two. A single tile is held in registers and asked for before anything else.
        stages: of the loop over several tiles, s - 1 of which are on their way.
    """

    block_v: int
    tiles: int
    parts: int
    warps: int
    stages: int

    def stages_for(self, element_size: int, key_dim: int, shared_memory: int) -> int:
        """The stages that leave room for two programs in a multiprocessor's shared memory; at least one."""
        tile = sum(key_blocks(key_dim)) * self.block_v * element_size
        return max(1, min(self.stages, shared_memory // 2 // tile))


def step_launch(heads: int, key_dim: int, value_dim: int, sms: int) -> StepLaunch:
    """Few heads are split over programs, so that every multiprocessor reads; many heads are left whole.

    Args:
        heads: of all sequences together.
        sms: multiprocessors of the card.
    """
    whole = triton.next_power_of_2(value_dim)
    if heads < 4 * sms:
        block_v = min(8, whole)
        return StepLaunch(block_v, 1, whole // block_v, 1, 1)
    # Tiles of 24 KB for 96 x 256.
    block_v = 64
    while block_v > 8 and block_v * key_dim > 8192:
        block_v //= 2
    block_v = min(block_v, whole)
    # Two large tiles are unrolled and spill: of 128 x 128 in 64 channels 448 bytes a thread, in 32 none.
    if whole == 2 * block_v and block_v * key_dim > 4096:
        block_v //= 2
    # Three stages against two on an H100: 117 us against 119 at 128 sequences, 453 against 457 at 512; four at 64
    # sequences, 61 against 65. Slower in whole steps: a tile for each program in registers (by 2 %, though 3 % faster
    # alone), and prefetching the state into the second-level cache.
    return StepLaunch(block_v, whole // block_v, 1, 2, 4 if heads < 8 * sms else 3)


class StepForm(NamedTuple):
    """Which recurrence a step is of.

    Attributes:
        unit: queries and keys are brought to norm 1.
        delta: the delta rule; else every token adds k v^T.
        sign: the log decay is -exp(a_log) softplus(sign x + dt_bias); 0: fixed.
        gate: activation of the output gate: "silu", "sigmoid", or "" for none.
    """

    unit: bool = True
    delta: bool = True
    sign: float = 1.0
    gate: str = "silu"


GATED_DELTA = StepForm()
"""Of G and J."""


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
    row: Tensor, layout: RowLayout, state: Tensor, a_log: Tensor, dt_bias: Tensor, norm_weight: Tensor,
    workspace: StepWorkspace, conv_weight: Tensor | None = None, conv_state: Tensor | None = None, *,
    form: StepForm = GATED_DELTA, decay: Tensor | None = None, gate: Tensor | None = None,
    tables: tuple[Tensor, Tensor] | None = None, decay_product: tuple[Tensor, Tensor] | None = None,
    launch: StepLaunch | None = None,
) -> Tensor:  # fmt: skip
    """A whole step of a recurrence of `naive_gated_delta` between the input and the output projection.

    y = RMSNorm(S_t^T q / sqrt(K)) * SiLU(gate) per head (arXiv 2412.06464 equation 10, arXiv 2508.15884 for JetBlock).

    Args:
        row: packed projections [B, P], contiguous rows.
        state: [B, H, K, V] fp32 or bf16, written in place. Not by the launch just before this one, which need not be
            done when the state is first read: between two steps on one state stands another launch.
        a_log, dt_bias: [H] fp32; dt_bias [H * K] where every key channel has a decay.
        norm_weight: [V].
        conv_weight: JetBlock's taps per token [B, H * V, W], with conv_state [B, W-1, H * V], shifted in place; then q,
            k and v pass SiLU here. Or the taps [C, W] of a static convolution of the rows' first C = 2 H K + H V
            columns, with conv_state [B, W-1, C]; SiLU follows. None: no convolution, no SiLU.
        decay: [B, H * K], what decays per channel are made of; None: per head, in the rows.
        decay_product: weight [H * K, R], R a power of two, and bias [H * K]: then decay is [B, R], their input.
        gate: [B, H * V], the output gate before its activation; None: in the rows.
        tables: cosines and sines [B, K] fp32 that rotate queries and keys.
        launch: default: the tuner's or `step_launch`'s.

    Returns:
        [B, H * V] in row's dtype.
    """
    batch, heads, key_dim, value_dim = state.shape
    sms, shared_memory = sm_limits(row.device)
    launch = launch or launch_for(
        "recurrent step", str(state.dtype), (batch, heads, key_dim, value_dim),
        lambda: step_launch(batch * heads, key_dim, value_dim, sms),
    )  # fmt: skip
    if launch.block_v * launch.tiles * launch.parts < value_dim:
        raise ValueError(f"{launch} leaves some of {value_dim} value channels out")
    static = conv_weight is not None and conv_weight.dim() == 2
    if static and launch.parts > 1:
        # Parts share queries and keys: one of them would move the inputs on before another has read them.
        assert conv_weight is not None
        assert conv_state is not None
        conv_step(row, conv_weight, conv_state)
        conv_weight, conv_state, static = None, None, False
    stages = launch.stages_for(state.element_size(), key_dim, shared_memory)
    block_a, block_b = key_blocks(key_dim)
    scratch, counters = workspace.of(batch * heads, value_dim, row.device)
    out = torch.empty(batch, heads * value_dim, device=row.device, dtype=row.dtype)
    taps = conv_weight.shape[-1] if conv_weight is not None else 2
    decay_rows, gate_rows = row if decay is None else decay, row if gate is None else gate
    decay_weight, decay_bias = (row, row) if decay_product is None else decay_product
    cos, sin = (a_log, a_log) if tables is None else tables
    recurrent_step_kernel[(batch * heads * launch.parts,)](
        row, decay_rows, decay_weight, decay_bias, gate_rows, row if conv_weight is None else conv_weight,
        row if conv_state is None else conv_state, state, a_log, dt_bias, norm_weight, cos, sin, scratch, counters, out,
        row.stride(0), decay_rows.stride(0), gate_rows.stride(0), 0 if tables is None else cos.stride(0),
        layout.q, layout.k, layout.v, layout.gate if gate is None else 0, layout.decay if decay is None else 0,
        layout.beta, key_dim**-0.5, form.sign,
        HEADS=heads, KEY=key_dim, VALUE=value_dim, TAPS=taps,
        BLOCK_T=triton.next_power_of_2(taps), BLOCK_A=block_a, BLOCK_B=block_b, BLOCK_V=launch.block_v,
        TILES=launch.tiles, PARTS=launch.parts, BLOCK_ALL=triton.next_power_of_2(value_dim), STAGES=stages,
        DYNAMIC=conv_weight is not None and not static, L2_EPS_=L2_EPS, NORM_EPS_=NORM_EPS, CHANNELS=decay is not None,
        DELTA=form.delta, UNIT=form.unit, ROTARY=tables is not None, GATE=form.gate, STATIC=static,
        RANK=0 if decay_product is None else decay_weight.shape[1], num_warps=launch.warps, **pdl_launch(row.device),
    )  # fmt: skip
    return out
