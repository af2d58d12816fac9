"""The chunked gated delta rule forward. README.md derives the equations and names the symbols."""

from __future__ import annotations

import triton
import triton.language as tl

from nasbench_kernels.common.tile import decays, matrix


@triton.jit
def _inverse(lower, rows, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular L [C, C], fp32, C a power of two up to 64.

    From blocks on the diagonal, X = diag(A^-1, C^-1), to blocks of twice their size: the inverse of [[A, 0], [B, C]]
    has -C^-1 B A^-1 below its diagonal, which is X B X where B keeps its place. As stable as substitution, whose steps
    it takes for all blocks at once.
    """
    above = (rows // 2)[:, None] == (rows // 2)[None, :]
    inverse = (rows[:, None] == rows[None, :]).to(tl.float32) - tl.where(above, lower, 0.0)
    for level in tl.static_range(1, 6):
        if (1 << level) < CHUNK:
            block = rows >> level
            below = (block[:, None] == block[None, :] + 1) & (block % 2 == 1)[:, None]
            right = tl.dot(tl.where(below, lower, 0.0), inverse, input_precision=PRECISION)
            inverse -= tl.dot(inverse, right, input_precision=PRECISION)
    return inverse


@triton.jit
def fwd_prepare_kernel(
    q, k, v, g, beta, totals, inverses, writes, reads, scores, T, HEADS, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr,
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
    b_beta = tl.load(beta + gates, mask=in_rows, other=0.0).to(tl.float32)
    columns = tl.arange(0, BLOCK_K)
    keys = matrix(k + first * KEY, rows, columns, HEADS * KEY, in_rows, columns < KEY)
    queries = matrix(q + first * KEY, rows, columns, HEADS * KEY, in_rows, columns < KEY)

    square = first * CHUNK + rows[:, None] * (HEADS * CHUNK) + rows[None, :]
    score = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * decays(total, rows, in_rows, False) * scale
    tl.store(scores + square, score.to(kind), mask=in_rows[:, None])

    coupling = tl.dot(keys, tl.trans(keys), input_precision=PRECISION) * decays(total, rows, in_rows, True)
    inverse = _inverse(coupling * b_beta[:, None], rows, CHUNK, PRECISION).to(kind)
    if KEEP:
        tl.store(inverses + square, inverse, mask=in_rows[:, None])
    weighted = (keys.to(tl.float32) * (b_beta * tl.exp(total))[:, None]).to(kind)
    read = tl.dot(inverse, weighted, input_precision=PRECISION)
    at = first * KEY + rows[:, None] * (HEADS * KEY) + columns[None, :]
    tl.store(reads + at, read.to(kind), mask=in_rows[:, None] & (columns < KEY)[None, :])
    for tile in range(0, VALUE, BLOCK_V):
        channels = tile + tl.arange(0, BLOCK_V)
        values = matrix(v + first * VALUE, rows, channels, HEADS * VALUE, in_rows, channels < VALUE)
        values = (values.to(tl.float32) * b_beta[:, None]).to(kind)
        write = tl.dot(inverse, values, input_precision=PRECISION)
        place = first * VALUE + rows[:, None] * (HEADS * VALUE) + channels[None, :]
        tl.store(writes + place, write.to(kind), mask=in_rows[:, None] & (channels < VALUE)[None, :])


@triton.jit
def fwd_state_kernel(
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
        read = matrix(reads + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        update = tl.load(writes + at, mask=in_values, other=0.0).to(tl.float32)
        update -= tl.dot(read, rounded, input_precision=PRECISION)
        written = update.to(kind)
        if KEEP:
            tl.store(updates + at, written, mask=in_values)
        queries = matrix(q + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        score = matrix(scores + first * CHUNK, rows, rows, HEADS * CHUNK, in_rows, rows < CHUNK)
        result = tl.dot(queries, rounded, input_precision=PRECISION) * (tl.exp(total) * scale)[:, None]
        result = tl.dot(score, written, result, input_precision=PRECISION)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=in_values)
        keys = matrix(k + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        left = tl.exp(tl.where(in_rows, last - total, float("-inf")))
        # The decay on the updates, not on the keys: those are narrower than a tile of keys.
        kept = (update * left[:, None]).to(kind)
        state = state * tl.exp(last) + tl.dot(tl.trans(keys), kept, input_precision=PRECISION)
    tl.store(state_out + head_of_batch * KEY * VALUE + tile, state, mask=in_tile)
