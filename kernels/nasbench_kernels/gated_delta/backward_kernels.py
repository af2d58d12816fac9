"""The chunked gated delta rule backward. README.md derives the equations and names the symbols."""

from __future__ import annotations

import triton
import triton.language as tl

from nasbench_kernels.common.tile import decays, matrix


@triton.jit
def bwd_state_kernel(
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
        score = matrix(scores + first * CHUNK, rows, rows, HEADS * CHUNK, in_rows, rows < CHUNK)
        keys = matrix(k + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        left = tl.exp(tl.where(in_rows, last - total, float("-inf")))
        dupdate = tl.dot(keys, rounded, input_precision=PRECISION) * left[:, None]
        dupdate = tl.dot(tl.trans(score), given.to(kind), dupdate, input_precision=PRECISION)
        dwritten = dupdate.to(kind)
        tl.store(dupdates + at, dwritten, mask=in_values)
        queries = matrix(q + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        read = matrix(reads + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
        grown = (given.to(tl.float32) * (tl.exp(total) * scale)[:, None]).to(kind)
        dstate = dstate * tl.exp(last) + tl.dot(tl.trans(queries), grown, input_precision=PRECISION)
        dstate -= tl.dot(tl.trans(read), dwritten, input_precision=PRECISION)
    tl.store(dstate_in + head_of_batch * KEY * VALUE + tile, dstate, mask=in_tile)


@triton.jit
def bwd_qk_kernel(
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

    queries = matrix(q + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
    keys = matrix(k + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
    at = first * KEY + rows[:, None] * (HEADS * KEY) + columns[None, :]
    in_keys = in_rows[:, None] & in_columns[None, :]

    # Outputs: scale (exp(G) q S + P u').
    dqueries *= (tl.where(in_rows, tl.exp(total), 0.0) * scale)[:, None]
    dtotal = tl.sum(dqueries * queries.to(tl.float32), 1)
    dscore = dscore * decays(total, rows, in_rows, False) * scale
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
def bwd_kv_kernel(
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
    b_beta = tl.load(beta + gates, mask=in_rows, other=0.0).to(tl.float32)
    flipped = tl.trans(matrix(inverses + first * CHUNK, rows, rows, HEADS * CHUNK, in_rows, rows < CHUNK))

    # Sums over the value channels.
    dreads = tl.zeros((CHUNK, BLOCK_K), tl.float32)  # du S^T, negative
    dinverse = tl.zeros((CHUNK, CHUNK), tl.float32)  # du (beta v)^T
    b_dbeta = tl.zeros((CHUNK,), tl.float32)
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
        weighted = (values * b_beta[:, None]).to(kind)
        dinverse = tl.dot(dupdate, tl.trans(weighted), dinverse, input_precision=PRECISION)
        dweighted = tl.dot(flipped, dupdate, input_precision=PRECISION)
        b_dbeta += tl.sum(dweighted * values, 1)
        tl.store(dv + here, (dweighted * b_beta[:, None]).to(dv.dtype.element_ty), mask=in_values)

    keys = matrix(k + first * KEY, rows, columns, HEADS * KEY, in_rows, in_columns)
    at = first * KEY + rows[:, None] * (HEADS * KEY) + columns[None, :]
    in_keys = in_rows[:, None] & in_columns[None, :]
    grown = tl.where(in_rows, tl.exp(total), 0.0)

    # The inverse: dA = -X^T dX X^T below the diagonal.
    factor = (b_beta * grown)[:, None]
    reads = (-dreads).to(kind)
    weighted = (keys.to(tl.float32) * factor).to(kind)
    dinverse = tl.dot(reads, tl.trans(weighted), dinverse, input_precision=PRECISION)
    dcoupling = tl.dot(flipped, dinverse.to(kind), input_precision=PRECISION)
    dcoupling = -tl.dot(dcoupling.to(kind), flipped, input_precision=PRECISION)
    dcoupling *= decays(total, rows, in_rows, True)
    change = dcoupling * tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    b_dbeta += tl.sum(change, 1)
    change *= b_beta[:, None]
    dtotal = tl.sum(change, 1) - tl.sum(change, 0)
    small = (dcoupling * b_beta[:, None]).to(kind)

    # Reads: (I + A)^-1 beta exp(G) k.
    dsum = tl.dot(flipped, reads, input_precision=PRECISION)
    along = tl.sum(dsum * keys.to(tl.float32), 1) * grown
    b_dbeta += along
    dtotal += along * b_beta
    dsum = tl.load(dkeys + at, mask=in_keys, other=0.0) + dsum * factor
    dsum = tl.dot(small, keys, dsum, input_precision=PRECISION)
    dsum = tl.dot(tl.trans(small), keys, dsum, input_precision=PRECISION)
    tl.store(dk + at, dsum.to(dk.dtype.element_ty), mask=in_keys)
    tl.store(dbeta + gates, b_dbeta, mask=in_rows)
    tl.store(dg + gates, tl.load(dg + gates, mask=in_rows, other=0.0) + _later(dtotal, in_rows), mask=in_rows)
