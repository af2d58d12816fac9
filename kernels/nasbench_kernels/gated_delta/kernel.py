"""The chunked gated delta rule in Triton, forward and backward. README.md derives the equations and names the symbols.

    prepare   every chunk at once: (I + A)^-1, writes u, reads w, scores P
    scan      chunk by chunk, a program per tile of value channels: state, updates, outputs
    unscan    chunk by chunk backwards: gradients of states and updates
    collect   every chunk at once, in two kernels: gradients of q, k, v, g and beta

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
import triton.language as tl
from torch import Tensor

CHUNK = 64
BLOCK = 16
"""Rows whose triangle is inverted by substitution; blocks of them are put together by matrix products."""
SCAN_STAGES = 2
WARPS = 8
WGMMA_OFF = "DISABLE_MMA_V3"
"""Triton's switch, read when a kernel is compiled, that takes Ampere's matrix instructions on Hopper as well.

Hopper's read shared memory by descriptors, whose upper half ptxas 12.9 (in Triton 3.6) fills from the wrong register
for some tile sizes here: results of arbitrary memory, or an illegal access.
"""


@contextmanager
def _without_wgmma() -> Iterator[None]:
    before = os.environ.get(WGMMA_OFF)
    os.environ[WGMMA_OFF] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[WGMMA_OFF]
        else:
            os.environ[WGMMA_OFF] = before


@triton.jit
def _matrix(base, rows, columns, stride, in_rows, in_columns):
    return tl.load(
        base + rows[:, None] * stride + columns[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0
    )


@triton.jit
def _decays(total, rows, in_rows, STRICT: tl.constexpr):
    """exp(G_i - G_j) of earlier tokens j, zero elsewhere, [C, C]."""
    earlier = (rows[:, None] > rows[None, :]) if STRICT else (rows[:, None] >= rows[None, :])
    earlier = earlier & in_rows[:, None]
    # Masked before the exponential: that of a later token overflows.
    return tl.exp(tl.where(earlier, total[:, None] - total[None, :], float("-inf")))


@triton.jit
def _inverse(lower, rows, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular L [C, C], fp32.

    I + L = (I + D) (I + M), D the blocks on the diagonal, M = (I + D)^-1 (L - D). The blocks are inverted row by row,
    all at once, and M is nilpotent: with four blocks (I + M)^-1 = (I - M)(I + M^2).
    """
    COUNT: tl.constexpr = CHUNK // BLOCK
    block = rows // BLOCK
    on_diagonal = block[:, None] == block[None, :]
    inner = tl.arange(0, BLOCK)
    diagonal = tl.sum(tl.reshape(tl.where(on_diagonal, lower, 0.0), (COUNT, BLOCK, COUNT, BLOCK)), axis=2)
    unit = (inner[:, None] == inner[None, :]).to(tl.float32)[None, :, :]
    inverse = tl.broadcast_to(unit, (COUNT, BLOCK, BLOCK))
    for i in tl.static_range(1, BLOCK):
        this = (inner == i)[None, :, None]
        row = tl.sum(tl.where(this, diagonal, 0.0), axis=1)
        solved = tl.sum(row[:, :, None] * inverse, axis=1)
        inverse = tl.where(this, unit - solved[:, None, :], inverse)
    spread = tl.broadcast_to(inverse[:, :, None, :], (COUNT, BLOCK, COUNT, BLOCK))
    spread = tl.where(on_diagonal, tl.reshape(spread, (CHUNK, CHUNK)), 0.0)
    mixed = tl.dot(spread, tl.where(on_diagonal, 0.0, lower), input_precision=PRECISION)
    squared = tl.dot(mixed, mixed, input_precision=PRECISION)
    partial = spread + tl.dot(squared, spread, input_precision=PRECISION)
    return partial - tl.dot(mixed, partial, input_precision=PRECISION)


@triton.jit
def prepare_kernel(
    q, k, v, g, beta, totals, inverses, writes, reads, scores, T, HEADS, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    rows = tl.arange(0, CHUNK)
    start = tl.program_id(0) * CHUNK
    in_rows = start + rows < T
    first = (sequence * T + start) * HEADS + head  # of the chunk, in units of one head's vector
    kind = k.dtype.element_ty

    gates = first + rows * HEADS
    total = tl.cumsum(tl.load(g + gates, mask=in_rows, other=0.0).to(tl.float32), 0)
    tl.store(totals + gates, total, mask=in_rows)
    strength = tl.load(beta + gates, mask=in_rows, other=0.0).to(tl.float32)
    columns = tl.arange(0, BLOCK_K)
    keys = _matrix(k + first * KEY, rows, columns, HEADS * KEY, in_rows, columns < KEY)
    queries = _matrix(q + first * KEY, rows, columns, HEADS * KEY, in_rows, columns < KEY)

    square = first * CHUNK + rows[:, None] * (HEADS * CHUNK) + rows[None, :]
    score = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * _decays(total, rows, in_rows, False) * scale
    tl.store(scores + square, score.to(kind), mask=in_rows[:, None])

    coupling = tl.dot(keys, tl.trans(keys), input_precision=PRECISION) * _decays(total, rows, in_rows, True)
    inverse = _inverse(coupling * strength[:, None], rows, CHUNK, BLOCK, PRECISION).to(kind)
    if KEEP:
        tl.store(inverses + square, inverse, mask=in_rows[:, None])
    weighted = (keys.to(tl.float32) * (strength * tl.exp(total))[:, None]).to(kind)
    read = tl.dot(inverse, weighted, input_precision=PRECISION)
    at = first * KEY + rows[:, None] * (HEADS * KEY) + columns[None, :]
    tl.store(reads + at, read.to(kind), mask=in_rows[:, None] & (columns < KEY)[None, :])
    for tile in range(0, VALUE, BLOCK_V):
        channels = tile + tl.arange(0, BLOCK_V)
        values = _matrix(v + first * VALUE, rows, channels, HEADS * VALUE, in_rows, channels < VALUE)
        values = (values.to(tl.float32) * strength[:, None]).to(kind)
        write = tl.dot(inverse, values, input_precision=PRECISION)
        place = first * VALUE + rows[:, None] * (HEADS * VALUE) + channels[None, :]
        tl.store(writes + place, write.to(kind), mask=in_rows[:, None] & (channels < VALUE)[None, :])


@triton.jit
def scan_kernel(
    q, k, totals, writes, reads, scores, state_in, state_out, states, updates, out, T, HEADS, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    STATE: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    head_of_batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    columns = tl.arange(0, BLOCK_K)
    channels = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_columns, in_channels = columns < KEY, channels < VALUE
    kind = k.dtype.element_ty
    tile = columns[:, None] * VALUE + channels[None, :]
    in_tile = in_columns[:, None] & in_channels[None, :]
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if STATE:
        state = tl.load(state_in + head_of_batch * KEY * VALUE + tile, mask=in_tile, other=0.0).to(tl.float32)
    count = tl.cdiv(T, CHUNK)
    for n in tl.range(0, count, num_stages=STAGES):
        start = n * CHUNK
        in_rows = start + rows < T
        first = (sequence * T + start) * HEADS + head
        in_values = in_rows[:, None] & in_channels[None, :]
        total = tl.load(totals + first + rows * HEADS, mask=in_rows, other=0.0)
        last = tl.load(totals + (sequence * T + tl.minimum(start + CHUNK, T) - 1) * HEADS + head)
        rounded = state.to(kind)
        if KEEP:
            tl.store(states + (head_of_batch * count + n) * KEY * VALUE + tile, rounded, mask=in_tile)
        at = first * VALUE + rows[:, None] * (HEADS * VALUE) + channels[None, :]
        read = _matrix(reads + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        update = tl.load(writes + at, mask=in_values, other=0.0).to(tl.float32)
        update -= tl.dot(read, rounded, input_precision=PRECISION)
        written = update.to(kind)
        if KEEP:
            tl.store(updates + at, written, mask=in_values)
        queries = _matrix(q + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        score = _matrix(scores + first * CHUNK, rows, rows, HEADS * CHUNK, in_rows, rows < CHUNK)
        result = tl.dot(queries, rounded, input_precision=PRECISION) * (tl.exp(total) * scale)[:, None]
        result = tl.dot(score, written, result, input_precision=PRECISION)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=in_values)
        keys = _matrix(k + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        left = tl.exp(tl.where(in_rows, last - total, float("-inf")))
        # The decay on the updates, not on the keys: those are narrower than a tile of keys.
        kept = (update * left[:, None]).to(kind)
        state = state * tl.exp(last) + tl.dot(tl.trans(keys), kept, input_precision=PRECISION)
    tl.store(state_out + head_of_batch * KEY * VALUE + tile, state, mask=in_tile)


@triton.jit
def unscan_kernel(
    q, k, totals, reads, scores, dout, dstate_out, dstate_in, dstates, dupdates, T, HEADS, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    STATE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    head_of_batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    columns = tl.arange(0, BLOCK_K)
    channels = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_columns, in_channels = columns < KEY, channels < VALUE
    kind = k.dtype.element_ty
    tile = columns[:, None] * VALUE + channels[None, :]
    in_tile = in_columns[:, None] & in_channels[None, :]
    dstate = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if STATE:
        dstate = tl.load(dstate_out + head_of_batch * KEY * VALUE + tile, mask=in_tile, other=0.0).to(tl.float32)
    count = tl.cdiv(T, CHUNK)
    for step in tl.range(0, count, num_stages=STAGES):
        n = count - 1 - step
        start = n * CHUNK
        in_rows = start + rows < T
        first = (sequence * T + start) * HEADS + head
        in_values = in_rows[:, None] & in_channels[None, :]
        total = tl.load(totals + first + rows * HEADS, mask=in_rows, other=0.0)
        last = tl.load(totals + (sequence * T + tl.minimum(start + CHUNK, T) - 1) * HEADS + head)
        rounded = dstate.to(kind)
        tl.store(dstates + (head_of_batch * count + n) * KEY * VALUE + tile, rounded, mask=in_tile)
        at = first * VALUE + rows[:, None] * (HEADS * VALUE) + channels[None, :]
        given = tl.load(dout + at, mask=in_values, other=0.0)
        score = _matrix(scores + first * CHUNK, rows, rows, HEADS * CHUNK, in_rows, rows < CHUNK)
        keys = _matrix(k + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        left = tl.exp(tl.where(in_rows, last - total, float("-inf")))
        dupdate = tl.dot(keys, rounded, input_precision=PRECISION) * left[:, None]
        dupdate = tl.dot(tl.trans(score), given.to(kind), dupdate, input_precision=PRECISION)
        dwritten = dupdate.to(kind)
        tl.store(dupdates + at, dwritten, mask=in_values)
        queries = _matrix(q + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        read = _matrix(reads + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        grown = (given.to(tl.float32) * (tl.exp(total) * scale)[:, None]).to(kind)
        dstate = dstate * tl.exp(last) + tl.dot(tl.trans(queries), grown, input_precision=PRECISION)
        dstate -= tl.dot(tl.trans(read), dwritten, input_precision=PRECISION)
    tl.store(dstate_in + head_of_batch * KEY * VALUE + tile, dstate, mask=in_tile)


@triton.jit
def collect_outputs_kernel(
    q, k, totals, states, updates, dout, dstates, dq, dkeys, dg, T, HEADS, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    rows = tl.arange(0, CHUNK)
    columns = tl.arange(0, BLOCK_K)
    in_columns = columns < KEY
    start = tl.program_id(0) * CHUNK
    in_rows = start + rows < T
    first = (sequence * T + start) * HEADS + head
    kind = k.dtype.element_ty
    gates = first + rows * HEADS
    total = tl.load(totals + gates, mask=in_rows, other=0.0)
    last = tl.load(totals + (sequence * T + tl.minimum(start + CHUNK, T) - 1) * HEADS + head)

    # Sums over the value channels.
    dqueries = tl.zeros((CHUNK, BLOCK_K), tl.float32)  # do S^T
    dkept = tl.zeros((CHUNK, BLOCK_K), tl.float32)  # u' dS'^T
    dscore = tl.zeros((CHUNK, CHUNK), tl.float32)  # do u'^T
    dlast = 0.0
    chunk_state = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * KEY * VALUE
    for tile in range(0, VALUE, BLOCK_V):
        channels = tile + tl.arange(0, BLOCK_V)
        in_values = in_rows[:, None] & (channels < VALUE)[None, :]
        here = first * VALUE + rows[:, None] * (HEADS * VALUE) + channels[None, :]
        spot = chunk_state + columns[:, None] * VALUE + channels[None, :]
        in_spot = in_columns[:, None] & (channels < VALUE)[None, :]
        state = tl.load(states + spot, mask=in_spot, other=0.0)
        dstate = tl.load(dstates + spot, mask=in_spot, other=0.0)
        update = tl.load(updates + here, mask=in_values, other=0.0)
        given = tl.load(dout + here, mask=in_values, other=0.0).to(kind)
        dlast += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        dqueries = tl.dot(given, tl.trans(state), dqueries, input_precision=PRECISION)
        dkept = tl.dot(update, tl.trans(dstate), dkept, input_precision=PRECISION)
        dscore = tl.dot(given, tl.trans(update), dscore, input_precision=PRECISION)

    queries = _matrix(q + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
    keys = _matrix(k + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
    at = first * KEY + rows[:, None] * (HEADS * KEY) + columns[None, :]
    in_keys = in_rows[:, None] & in_columns[None, :]

    # Outputs: scale (exp(G) q S + P u').
    dqueries *= (tl.where(in_rows, tl.exp(total), 0.0) * scale)[:, None]
    dtotal = tl.sum(dqueries * queries.to(tl.float32), 1)
    dscore = dscore * _decays(total, rows, in_rows, False) * scale
    change = dscore * tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    dtotal += tl.sum(change, 1) - tl.sum(change, 0)
    small = dscore.to(kind)
    dqueries = tl.dot(small, keys, dqueries, input_precision=PRECISION)
    tl.store(dq + at, dqueries.to(dq.dtype.element_ty), mask=in_keys)

    # What the next state keeps of the updates.
    dkept *= tl.exp(tl.where(in_rows, last - total, float("-inf")))[:, None]
    change_left = tl.sum(dkept * keys.to(tl.float32), 1)
    dlast = dlast * tl.exp(last) + tl.sum(change_left)
    dtotal -= change_left
    dkept = tl.dot(tl.trans(small), queries, dkept, input_precision=PRECISION)
    tl.store(dkeys + at, dkept, mask=in_keys)
    tl.store(dg + gates, _later(dtotal, in_rows) + dlast, mask=in_rows)


@triton.jit
def _later(dtotal, in_rows):
    """Gradients of g from those of its running totals within a chunk: g_i is part of every later one."""
    dtotal = tl.where(in_rows, dtotal, 0.0)
    return tl.sum(dtotal) - tl.cumsum(dtotal, 0) + dtotal


@triton.jit
def collect_updates_kernel(
    k, v, beta, totals, inverses, states, dupdates, dkeys, dk, dv, dg, dbeta, T, HEADS,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    rows = tl.arange(0, CHUNK)
    columns = tl.arange(0, BLOCK_K)
    in_columns = columns < KEY
    start = tl.program_id(0) * CHUNK
    in_rows = start + rows < T
    first = (sequence * T + start) * HEADS + head
    kind = k.dtype.element_ty
    gates = first + rows * HEADS
    total = tl.load(totals + gates, mask=in_rows, other=0.0)
    strength = tl.load(beta + gates, mask=in_rows, other=0.0).to(tl.float32)
    flipped = tl.trans(_matrix(inverses + first * CHUNK, rows, rows, HEADS * CHUNK, in_rows, rows < CHUNK))

    # Sums over the value channels.
    dreads = tl.zeros((CHUNK, BLOCK_K), tl.float32)  # du S^T, negative
    dinverse = tl.zeros((CHUNK, CHUNK), tl.float32)  # du (beta v)^T
    dstrength = tl.zeros((CHUNK,), tl.float32)
    chunk_state = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * KEY * VALUE
    for tile in range(0, VALUE, BLOCK_V):
        channels = tile + tl.arange(0, BLOCK_V)
        in_values = in_rows[:, None] & (channels < VALUE)[None, :]
        here = first * VALUE + rows[:, None] * (HEADS * VALUE) + channels[None, :]
        spot = chunk_state + columns[:, None] * VALUE + channels[None, :]
        state = tl.load(states + spot, mask=in_columns[:, None] & (channels < VALUE)[None, :], other=0.0)
        dupdate = tl.load(dupdates + here, mask=in_values, other=0.0)
        values = tl.load(v + here, mask=in_values, other=0.0).to(tl.float32)
        dreads = tl.dot(dupdate, tl.trans(state), dreads, input_precision=PRECISION)
        weighted = (values * strength[:, None]).to(kind)
        dinverse = tl.dot(dupdate, tl.trans(weighted), dinverse, input_precision=PRECISION)
        dweighted = tl.dot(flipped, dupdate, input_precision=PRECISION)
        dstrength += tl.sum(dweighted * values, 1)
        tl.store(dv + here, (dweighted * strength[:, None]).to(dv.dtype.element_ty), mask=in_values)

    keys = _matrix(k + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
    at = first * KEY + rows[:, None] * (HEADS * KEY) + columns[None, :]
    in_keys = in_rows[:, None] & in_columns[None, :]
    grown = tl.where(in_rows, tl.exp(total), 0.0)

    # The inverse: dA = -X^T dX X^T below the diagonal.
    factor = (strength * grown)[:, None]
    reads = (-dreads).to(kind)
    weighted = (keys.to(tl.float32) * factor).to(kind)
    dinverse = tl.dot(reads, tl.trans(weighted), dinverse, input_precision=PRECISION)
    dcoupling = tl.dot(flipped, dinverse.to(kind), input_precision=PRECISION)
    dcoupling = -tl.dot(dcoupling.to(kind), flipped, input_precision=PRECISION)
    dcoupling *= _decays(total, rows, in_rows, True)
    change = dcoupling * tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    dstrength += tl.sum(change, 1)
    change *= strength[:, None]
    dtotal = tl.sum(change, 1) - tl.sum(change, 0)
    small = (dcoupling * strength[:, None]).to(kind)

    # Reads: (I + A)^-1 beta exp(G) k.
    dsum = tl.dot(flipped, reads, input_precision=PRECISION)
    along = tl.sum(dsum * keys.to(tl.float32), 1) * grown
    dstrength += along
    dtotal += along * strength
    dsum = tl.load(dkeys + at, mask=in_keys, other=0.0) + dsum * factor
    dsum = tl.dot(small, keys, dsum, input_precision=PRECISION)
    dsum = tl.dot(tl.trans(small), keys, dsum, input_precision=PRECISION)
    tl.store(dk + at, dsum.to(dk.dtype.element_ty), mask=in_keys)
    tl.store(dbeta + gates, dstrength, mask=in_rows)
    tl.store(dg + gates, tl.load(dg + gates, mask=in_rows, other=0.0) + _later(dtotal, in_rows), mask=in_rows)


@dataclass(frozen=True)
class _Tiles:
    keys: int
    scan: int
    """Value channels of a scan's program."""
    prepare: int
    collect: int


def _tiles(like: Tensor, value_dim: int) -> _Tiles:
    key_dim, values = like.shape[-1], max(16, triton.next_power_of_2(value_dim))
    wide = like.dtype == torch.float32 or key_dim > 128
    return _Tiles(
        keys=max(16, triton.next_power_of_2(key_dim)),
        scan=min(32, values),
        prepare=min(32 if wide else 64, values),
        collect=16,
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
    @_without_wgmma()
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
        prepare_kernel[(count, batch * heads)](
            q, k, v, g, beta, totals, inverses, writes, reads, scores, tokens, heads, scale,
            **sizes, BLOCK=BLOCK, BLOCK_V=tiles.prepare, KEEP=keep, num_warps=WARPS,
        )  # fmt: skip
        state_out = torch.empty(batch, heads, key_dim, value_dim, device=k.device)
        states = torch.empty(batch * heads, count, key_dim, value_dim, device=k.device, dtype=kind) if keep else out
        updates = torch.empty_like(writes) if keep else out
        scan_kernel[(triton.cdiv(value_dim, tiles.scan), batch * heads)](
            q, k, totals, writes, reads, scores, state_out if state is None else state.contiguous(), state_out,
            states, updates, out, tokens, heads, scale,
            **sizes, BLOCK_V=tiles.scan, STATE=state is not None, KEEP=keep, STAGES=SCAN_STAGES,
            num_warps=WARPS,
        )  # fmt: skip
        if keep:
            ctx.save_for_backward(q, k, v, beta, totals, inverses, reads, scores, states, updates)
            ctx.scale, ctx.stateful, ctx.gates = scale, state is not None and state.requires_grad, g.dtype
        return out, state_out

    @staticmethod
    @_without_wgmma()
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, totals, inverses, reads, scores, states, updates = ctx.saved_tensors
        dout, dstate_out = (x.contiguous() for x in gradients)
        batch, tokens, heads, _ = q.shape
        value_dim, count = v.shape[-1], -(-tokens // CHUNK)
        tiles = _tiles(k, value_dim)
        sizes = _sizes(k, value_dim, tiles)
        dstate_in, dstates, dupdates = torch.empty_like(dstate_out), torch.empty_like(states), torch.empty_like(updates)
        unscan_kernel[(triton.cdiv(value_dim, tiles.scan), batch * heads)](
            q, k, totals, reads, scores, dout, dstate_out, dstate_in, dstates, dupdates, tokens, heads, ctx.scale,
            **sizes, BLOCK_V=tiles.scan, STATE=True, STAGES=SCAN_STAGES, num_warps=WARPS,
        )  # fmt: skip
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dg, dbeta = torch.empty_like(totals), torch.empty_like(totals)
        dkeys = torch.empty_like(k, dtype=torch.float32)  # what the outputs and the kept updates give
        collect_outputs_kernel[(count, batch * heads)](
            q, k, totals, states, updates, dout, dstates, dq, dkeys, dg, tokens, heads, ctx.scale,
            **sizes, BLOCK_V=tiles.collect, num_warps=WARPS,
        )  # fmt: skip
        collect_updates_kernel[(count, batch * heads)](
            k, v, beta, totals, inverses, states, dupdates, dkeys, dk, dv, dg, dbeta, tokens, heads,
            **sizes, BLOCK_V=tiles.collect, num_warps=WARPS,
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
