"""The chunked recurrence of Mamba2 in Triton, forward. README.md derives the equations and names the symbols."""

from __future__ import annotations

import triton
import triton.language as tl

from nasbench_kernels.common.tile import decays, matrix


@triton.jit
def mamba2_scores_kernel(
    b, b_stride, c, c_stride, scores, T,
    GROUPS: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(1) // GROUPS).to(tl.int64)
    group = tl.program_id(1) % GROUPS
    rows = tl.arange(0, CHUNK)
    lanes = tl.arange(0, BLOCK_N)
    start = tl.program_id(0) * CHUNK
    in_rows = start + rows < T
    first = sequence * T + start
    keys = matrix(b + first * b_stride + group * STATE, rows, lanes, b_stride, in_rows, lanes < STATE)
    queries = matrix(c + first * c_stride + group * STATE, rows, lanes, c_stride, in_rows, lanes < STATE)
    score = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    at = ((first + rows) * GROUPS + group)[:, None] * CHUNK + rows[None, :]
    tl.store(scores + at, score.to(scores.dtype.element_ty), mask=in_rows[:, None])


@triton.jit
def _place(
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program's sequence, head and group; channels and lanes of its tile of the state, and which of them exist."""
    head = tl.program_id(1) % HEADS
    lanes = tl.arange(0, BLOCK_N)
    channels = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    sequence = (tl.program_id(1) // HEADS).to(tl.int64)
    return sequence, head, head // (HEADS // GROUPS), channels, lanes, channels < DIM, lanes < STATE


@triton.jit
def _decay(at, in_rows):
    """Log decays of a chunk: summed from its start to each token, and in all."""
    rate = tl.load(at, mask=in_rows, other=0.0)
    return tl.cumsum(rate, 0), tl.sum(rate)


@triton.jit
def mamba2_scan_kernel(
    x, x_stride, dt, decay, b, b_stride, c, c_stride, scores, skip, state_in, state_out, states, out, T,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, INITIAL: tl.constexpr, SKIP: tl.constexpr, KEEP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, head, group, channels, lanes, in_channels, in_lanes = _place(HEADS, GROUPS, DIM, STATE, BLOCK_P, BLOCK_N)
    rows = tl.arange(0, CHUNK)
    kind = b.dtype.element_ty
    tile = channels[None, :] * STATE + lanes[:, None]
    at_head = (sequence * HEADS + head) * DIM * STATE
    count = tl.cdiv(T, CHUNK)
    in_tile = in_lanes[:, None] & in_channels[None, :]
    # Turned, [N, P]: the longer side as rows of a product takes fewer registers.
    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if INITIAL:
        state = tl.load(state_in + at_head + tile, mask=in_tile, other=0.0).to(tl.float32)
    if SKIP:
        through = tl.load(skip + head)
    for n in tl.range(0, count, num_stages=STAGES):
        start = n * CHUNK
        in_rows = start + rows < T
        first = sequence * T + start
        step = tl.load(dt + (first + rows) * HEADS + head, mask=in_rows, other=0.0)
        total, last = _decay(decay + (first + rows) * HEADS + head, in_rows)
        keys = matrix(b + first * b_stride + group * STATE, rows, lanes, b_stride, in_rows, in_lanes)
        queries = matrix(c + first * c_stride + group * STATE, rows, lanes, c_stride, in_rows, in_lanes)
        score = matrix(scores + (first * GROUPS + group) * CHUNK, rows, rows, GROUPS * CHUNK, in_rows, rows < CHUNK)
        values = matrix(x + first * x_stride + head * DIM, rows, channels, x_stride, in_rows, in_channels)
        # The step size on the scores: values are an operand as they lie.
        score = score.to(tl.float32) * decays(total, rows, in_rows, False) * step[None, :]
        rounded = state.to(kind)
        if KEEP:
            tl.store(states + at_head * count + n * DIM * STATE + tile, rounded, mask=in_tile)
        mixed = tl.dot(queries, rounded, input_precision=PRECISION) * tl.exp(total)[:, None]
        mixed = tl.dot(score.to(kind), values, mixed, input_precision=PRECISION)
        if SKIP:
            mixed += values.to(tl.float32) * through
        at = (first + rows)[:, None] * (HEADS * DIM) + head * DIM + channels[None, :]
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=in_rows[:, None] & in_channels[None, :])
        kept = (keys.to(tl.float32) * (step * tl.exp(last - total))[:, None]).to(kind)
        state = state * tl.exp(last) + tl.dot(tl.trans(kept), values, input_precision=PRECISION)
    tl.store(state_out + at_head + tile, state, mask=in_tile)


@triton.jit
def mamba2_unscan_kernel(
    decay, c, c_stride, dout, dstate_out, dstate_in, dstates, T,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the states behind every chunk, from the last chunk to the first."""
    sequence, head, group, channels, lanes, in_channels, in_lanes = _place(HEADS, GROUPS, DIM, STATE, BLOCK_P, BLOCK_N)
    rows = tl.arange(0, CHUNK)
    kind = c.dtype.element_ty
    tile = channels[None, :] * STATE + lanes[:, None]
    at_head = (sequence * HEADS + head) * DIM * STATE
    count = tl.cdiv(T, CHUNK)
    in_tile = in_lanes[:, None] & in_channels[None, :]
    dstate = tl.load(dstate_out + at_head + tile, mask=in_tile, other=0.0)
    for back in tl.range(0, count, num_stages=STAGES):
        n = count - 1 - back
        start = n * CHUNK
        in_rows = start + rows < T
        first = sequence * T + start
        total, last = _decay(decay + (first + rows) * HEADS + head, in_rows)
        tl.store(dstates + at_head * count + n * DIM * STATE + tile, dstate.to(kind), mask=in_tile)
        queries = matrix(c + first * c_stride + group * STATE, rows, lanes, c_stride, in_rows, in_lanes)
        given = matrix(dout + (first * HEADS + head) * DIM, rows, channels, HEADS * DIM, in_rows, in_channels)
        # The decay on the longer side: given is an operand as it lies.
        queries = (queries.to(tl.float32) * tl.exp(total)[:, None]).to(kind)
        dstate = dstate * tl.exp(last) + tl.dot(tl.trans(queries), given, input_precision=PRECISION)
    tl.store(dstate_in + at_head + tile, dstate, mask=in_tile)


@triton.jit
def mamba2_collect_kernel(
    x, x_stride, dt, decay, b, b_stride, c, c_stride, scores, skip, states, dstates, dout,
    dx, ddt, ddecay, db, dc, dskip, T,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every chunk and head at once: all gradients of the inputs, those of b and c for each head."""
    sequence = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    group = head // (HEADS // GROUPS)
    rows = tl.arange(0, CHUNK)
    lanes = tl.arange(0, BLOCK_N)
    n = tl.program_id(0)
    start = n * CHUNK
    in_rows, in_lanes = start + rows < T, lanes < STATE
    first = sequence * T + start
    kind = b.dtype.element_ty
    gates = (first + rows) * HEADS + head
    step = tl.load(dt + gates, mask=in_rows, other=0.0)
    total, last = _decay(decay + gates, in_rows)
    left = tl.exp(last - total)
    within = decays(total, rows, in_rows, False)
    keys = matrix(b + first * b_stride + group * STATE, rows, lanes, b_stride, in_rows, in_lanes)
    queries = matrix(c + first * c_stride + group * STATE, rows, lanes, c_stride, in_rows, in_lanes)
    score = matrix(scores + (first * GROUPS + group) * CHUNK, rows, rows, GROUPS * CHUNK, in_rows, rows < CHUNK)
    score = score.to(tl.float32) * within
    weights = tl.trans(score.to(kind))
    products = tl.zeros((CHUNK, CHUNK), tl.float32)  # dout . x
    from_state = tl.zeros((CHUNK, BLOCK_N), tl.float32)  # dout h
    to_state = tl.zeros((CHUNK, BLOCK_N), tl.float32)  # x dh
    dstep = tl.zeros((CHUNK,), tl.float32)
    through = tl.zeros((CHUNK,), tl.float32)
    common = tl.zeros((BLOCK_P,), tl.float32)
    factor = 0.0
    if SKIP:
        factor = tl.load(skip + head)
    at_chunk = ((sequence * HEADS + head) * tl.cdiv(T, CHUNK) + n) * DIM * STATE
    for tile in range(0, DIM, BLOCK_P):
        channels = tile + tl.arange(0, BLOCK_P)
        in_channels = channels < DIM
        values = matrix(x + first * x_stride + head * DIM, rows, channels, x_stride, in_rows, in_channels)
        at = (first * HEADS + head) * DIM + rows[:, None] * (HEADS * DIM) + channels[None, :]
        inside = in_rows[:, None] & in_channels[None, :]
        given = tl.load(dout + at, mask=inside, other=0.0)
        state = matrix(states + at_chunk, channels, lanes, STATE, in_channels, in_lanes)
        dstate = matrix(dstates + at_chunk, channels, lanes, STATE, in_channels, in_lanes)
        products = tl.dot(given, tl.trans(values), products, input_precision=PRECISION)
        from_state = tl.dot(given, state, from_state, input_precision=PRECISION)
        to_state = tl.dot(values, dstate, to_state, input_precision=PRECISION)
        common += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        moved = tl.dot(keys, tl.trans(dstate), input_precision=PRECISION) * left[:, None]
        moved = tl.dot(weights, given, moved, input_precision=PRECISION)  # of dt x
        wide = values.to(tl.float32)
        dstep += tl.sum(moved * wide, 1)
        direct = given.to(tl.float32)
        through += tl.sum(direct * wide, 1)
        tl.store(dx + at, (moved * step[:, None] + direct * factor).to(kind), mask=inside)

    wide_keys, wide_queries, grown = keys.to(tl.float32), queries.to(tl.float32), tl.exp(total)
    from_state *= grown[:, None]
    to_state *= (step * left)[:, None]
    products *= step[None, :]
    dtotal = tl.sum(products * score, 1) + tl.sum(from_state * wide_queries, 1) - step * dstep
    dlast = tl.exp(last) * tl.sum(common) + tl.sum(tl.sum(to_state * wide_keys, 1))
    dtotal = tl.where(in_rows, dtotal, 0.0)
    tl.store(ddt + gates, dstep, mask=in_rows)
    tl.store(ddecay + gates, tl.sum(dtotal) - tl.cumsum(dtotal, 0) + dtotal + dlast, mask=in_rows)
    tl.store(dskip + gates, through, mask=in_rows)
    products = (products * within).to(kind)
    from_state = tl.dot(products, keys, from_state, input_precision=PRECISION)
    to_state = tl.dot(tl.trans(products), queries, to_state, input_precision=PRECISION)
    place = (first * HEADS + head) * STATE + rows[:, None] * (HEADS * STATE) + lanes[None, :]
    inside = in_rows[:, None] & in_lanes[None, :]
    tl.store(dc + place, from_state.to(dc.dtype.element_ty), mask=inside)
    tl.store(db + place, to_state.to(db.dtype.element_ty), mask=inside)
