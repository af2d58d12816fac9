"""The decode step's Triton kernels against plain PyTorch: on a GPU, or else under the interpreter."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

GPU = torch.cuda.is_available()
pytest.importorskip("triton")

# ruff: noqa: E402
import triton
from nasbench_kernels.attention.naive import naive_decode_attention
from nasbench_kernels.common.pdl import pdl_launch, without_pdl
from nasbench_kernels.conv import short_conv_step
from nasbench_kernels.gated_delta.decode import StepLaunch
from nasbench_kernels.gated_delta.naive import RowLayout, naive_recurrent_step
from nasbench_kernels.linear.gemm import run_gemm, swap_ab_gemm_kernel
from nasbench_kernels.linear.launch import GemmLaunch, gemm_launch, swap_ab_launch
from nasbench_kernels.ops import (
    StepWorkspace,
    add_norm,
    argmax,
    conv_step,
    decode_attention,
    gemm,
    gemm_and_silu,
    gemv,
    recurrent_step,
    rotary_write,
    silu_part,
    swiglu,
    swiglu_gemm,
)
from tolerances import relative_rmse

DEVICE = "cuda" if GPU else "cpu"
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
DTYPES = list(CLOSE)
# The interpreter multiplies bf16 matrices as if they were integers: those products are checked on a GPU.
PRODUCTS = DTYPES if GPU else [torch.float32, torch.float16]


def draw(*size: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(*size, generator=generator).to(DEVICE, dtype)


def check_step(sizes, dynamic, dtype, state_dtype=torch.float32, launch=None):
    """Two steps of sizes (B, H, K, V): the second finds state, conv_state and counters that the first left."""
    batch, heads, key_dim, value_dim = sizes
    values = heads * value_dim
    widths = [heads * key_dim, heads * key_dim, values, values, 5, heads, heads]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    layout = RowLayout(*(starts[i] for i in (0, 1, 2, 3, 5, 6)))
    row = draw(batch, sum(widths), dtype=dtype)
    a_log, dt_bias, weight = draw(heads), draw(heads, seed=1), draw(value_dim, dtype=dtype)
    conv_weight = draw(batch, values, 4, dtype=dtype) if dynamic else None
    conv_state = draw(batch, 3, values, dtype=dtype) if dynamic else None
    ours_state = draw(batch, heads, key_dim, value_dim, dtype=state_dtype)
    state, ours_conv_state = ours_state.float().clone(), None if conv_state is None else conv_state.clone()
    theirs_conv_state = None if conv_state is None else conv_state.float().clone()
    close, state_close = (CLOSE[dtype], 1e-5) if state_dtype == torch.float32 else (1e-2, 1e-2)
    workspace = StepWorkspace()
    for _ in range(2):
        ours = recurrent_step(
            row, layout, ours_state, a_log, dt_bias, weight, workspace, conv_weight, ours_conv_state, launch=launch
        )
        theirs, state, theirs_conv_state = naive_recurrent_step(
            row, layout, state, a_log, dt_bias, weight, conv_weight, theirs_conv_state
        )
        assert relative_rmse(ours.float(), theirs) < close
        assert relative_rmse(ours_state.float(), state) < state_close
    if ours_conv_state is not None:
        assert torch.equal(ours_conv_state.float(), theirs_conv_state)
    assert workspace.counters is not None
    assert not workspace.counters.any()


@pytest.mark.parametrize("sizes", [(2, 3, 24, 40), (1, 2, 64, 171), (3, 1, 96, 256), (1, 1, 192, 64)])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recurrent_step(sizes, dynamic, dtype):
    check_step(sizes, dynamic, dtype)


@pytest.mark.parametrize("dynamic", [True, False])
def test_recurrent_step_with_a_bf16_state(dynamic):
    check_step((2, 2, 16, 32), dynamic, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    "launch",
    [
        StepLaunch(64, 4, 1, 2, 2),
        StepLaunch(64, 4, 1, 2, 1),
        StepLaunch(32, 8, 1, 2, 3),
        StepLaunch(16, 16, 1, 1, 3),
        StepLaunch(64, 2, 2, 4, 2),
        StepLaunch(32, 2, 4, 2, 2),
        StepLaunch(32, 1, 8, 1, 1),
        StepLaunch(64, 1, 4, 4, 1),
        StepLaunch(256, 1, 1, 8, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_recurrent_step_in_any_launch(launch, dynamic, state_dtype):
    """Whole heads, and value channels beyond which tiles and parts lie partly or wholly."""
    dtype = torch.bfloat16 if state_dtype == torch.bfloat16 else torch.float32
    for sizes in ((1, 1, 96, 256), (3, 1, 24, 171)):
        check_step(sizes, dynamic, dtype, state_dtype, launch)


def test_a_launch_must_reach_all_channels():
    with pytest.raises(ValueError, match="leaves some of 40 value channels out"):
        check_step((1, 1, 16, 40), False, torch.float32, launch=StepLaunch(8, 2, 2, 1, 1))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 64), (3, 1, 96), (4, 4, 128)])
@pytest.mark.parametrize("lengths", [(1, 2, 3), (64, 65, 63), (200, 1, 130)])
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_decode_attention(heads, kv_heads, dim, lengths, dtype):
    slots = 203
    q = draw(3, heads, dim, dtype=dtype)
    keys, values = draw(3, kv_heads, slots, dim, dtype=dtype), draw(3, kv_heads, slots, dim, dtype=dtype, seed=1)
    positions = torch.tensor(lengths, device=DEVICE) - 1
    for max_seqlen in (max(lengths), slots):
        ours = decode_attention(q, keys, values, positions, max_seqlen)
        for b, theirs in enumerate(naive_decode_attention(q, keys, values, positions)):
            assert relative_rmse(ours[b].float(), theirs) < CLOSE[dtype], (b, max_seqlen)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_write(norm, dtype):
    batch, heads, kv_heads, dim, slots = 3, 4, 2, 16, 8
    row = draw(batch, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = torch.arange(40, device=DEVICE)[:, None] * 0.1 ** torch.arange(dim // 2, device=DEVICE)
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    positions = torch.tensor((0, 7, 21), device=DEVICE)
    keys, values = (draw(batch, kv_heads, slots, dim, dtype=dtype, seed=s) for s in (2, 3))
    wanted_keys, wanted_values = keys.clone(), values.clone()
    weights = (draw(dim, dtype=dtype), draw(dim, dtype=dtype, seed=5)) if norm else (None, None)
    q = rotary_write(row, positions, cos[positions], sin[positions], keys, values, heads, *weights, eps=1e-6)
    parts = row.float().unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
    turned = []
    for x, weight in zip(parts[:2], weights, strict=True):
        y = x if weight is None else F.rms_norm(x, (dim,), weight.float(), 1e-6)
        half = torch.cat((-y[..., dim // 2 :], y[..., : dim // 2]), -1)
        turned.append(y * cos[positions][:, None] + half * sin[positions][:, None])
    assert relative_rmse(q.float(), turned[0]) < CLOSE[dtype]
    for b, position in enumerate(positions.tolist()):
        wanted_keys[b, :, position % slots] = turned[1][b].to(dtype)
        wanted_values[b, :, position % slots] = parts[2][b].to(dtype)
    assert relative_rmse(keys.float(), wanted_keys.float()) < CLOSE[dtype]
    assert torch.equal(values, wanted_values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pointwise(dtype):
    x, delta, weight = draw(3, 70, dtype=dtype), draw(3, 70, dtype=dtype, seed=1), draw(70, dtype=dtype)
    summed = x + delta
    wanted = F.rms_norm(summed.float(), (70,), weight.float(), 1e-5)
    assert relative_rmse(add_norm(x, delta, weight, 1e-5).float(), wanted) < CLOSE[dtype]
    assert relative_rmse(x.float(), summed.float()) < CLOSE[dtype]
    before = x.clone()
    assert relative_rmse(add_norm(x, None, weight, 1e-5).float(), wanted) < CLOSE[dtype]
    assert torch.equal(x, before)
    row = draw(3, 2 * 1100, dtype=dtype)
    gate, up = row.float().chunk(2, -1)
    assert relative_rmse(swiglu(row).float(), F.silu(gate) * up) < CLOSE[dtype]
    assert relative_rmse(silu_part(row, 33, 77).float(), F.silu(row[:, 33:110].float())) < CLOSE[dtype]


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm_of_partial_sums(parts, dtype):
    x, delta, weight = draw(3, 70, dtype=dtype), draw(parts, 3, 70), draw(70, dtype=dtype)
    summed = (x.float() + delta.sum(0)).to(dtype)
    wanted = F.rms_norm(summed.float(), (70,), weight.float(), 1e-5)
    assert relative_rmse(add_norm(x, delta, weight, 1e-5).float(), wanted) < CLOSE[dtype]
    assert relative_rmse(x.float(), summed.float()) < CLOSE[dtype]


def test_launches_overlap_only_where_the_card_can(monkeypatch):
    early = GPU and torch.cuda.get_device_capability()[0] >= 9
    assert pdl_launch(torch.device(DEVICE)) == ({"PDL": True, "launch_pdl": True} if early else {"PDL": False})
    monkeypatch.setattr("nasbench_kernels.common.pdl.capability", lambda device: 9)
    assert pdl_launch(torch.device(DEVICE)) == {"PDL": True, "launch_pdl": True}
    with without_pdl():
        assert pdl_launch(torch.device(DEVICE)) == {"PDL": False}
    monkeypatch.setattr("nasbench_kernels.common.pdl.capability", lambda device: 8)
    assert pdl_launch(torch.device(DEVICE)) == {"PDL": False}


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_step(dtype):
    row, weight, conv_state = draw(2, 320, dtype=dtype), draw(300, 4, dtype=dtype), draw(2, 3, 300, dtype=dtype)
    rest, wide = row[:, 300:].clone(), conv_state.float().clone()
    wanted = short_conv_step(row[:, None, :300].float(), weight.float(), wide)[:, 0]
    conv_step(row, weight, conv_state)
    assert relative_rmse(row[:, :300].float(), wanted) < CLOSE[dtype]
    assert torch.equal(conv_state.float(), wide)
    assert torch.equal(row[:, 300:], rest)


@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (130, 100), (33, 2100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gemv(rows, columns, dtype):
    x, weight, bias = draw(1, columns, dtype=dtype), draw(rows, columns, dtype=dtype), draw(rows, dtype=dtype)
    norm, both = draw(columns, dtype=dtype, seed=3), draw(2 * rows, columns, dtype=dtype)
    wide, w = x.float(), weight.float()
    normed = F.rms_norm(wide, (columns,), norm.float(), 1e-6)
    residual = draw(1, rows, dtype=dtype)
    added = residual.float() + wide @ w.T
    gate, up = (normed @ both.float().T).chunk(2, -1)
    for ours, theirs in (
        (gemv(x, weight), wide @ w.T),
        (gemv(x, weight, bias), wide @ w.T + bias.float()),
        (gemv(x, weight, before="silu"), F.silu(wide) @ w.T),
        (gemv(x, weight, bias, before="norm", norm_weight=norm, eps=1e-6), normed @ w.T + bias.float()),
        (gemv(x, both, before="norm", norm_weight=norm, eps=1e-6, swiglu=True), F.silu(gate) * up),
        (gemv(x, weight, add_to=residual), added),
    ):
        assert relative_rmse(ours.float(), theirs) < CLOSE[dtype]
    assert relative_rmse(residual.float(), added) < CLOSE[dtype]


@pytest.mark.parametrize(("batch", "hidden", "inner"), [(2, 72, 100), (17, 64, 64), (100, 136, 200)])
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_swiglu_gemm(batch, hidden, inner, dtype):
    x, weight = draw(batch, hidden, dtype=dtype), draw(2 * inner, hidden, dtype=dtype)
    gate, up = (part.to(dtype).float() for part in F.linear(x.float(), weight.float()).chunk(2, -1))
    assert relative_rmse(swiglu_gemm(x, weight).float(), F.silu(gate) * up) < CLOSE[dtype]


@pytest.mark.parametrize(("batch", "columns", "rows"), [(2, 72, 100), (3, 700, 37), (17, 64, 64), (100, 1100, 72)])
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_gemm(batch, columns, rows, dtype):
    wide, weight = draw(batch, 2 * columns, dtype=dtype), draw(rows, columns, dtype=dtype)
    x, bias = wide[:, columns:], draw(rows, dtype=dtype)
    wanted = x.float() @ weight.float().T
    assert relative_rmse(gemm(x, weight).float(), wanted) < CLOSE[dtype]
    assert relative_rmse(gemm(x, weight, bias).float(), wanted + bias.float()) < CLOSE[dtype]
    parts = gemm(x, weight, split_k=True)
    assert parts.dtype == torch.float32
    assert parts.shape[1:] == (batch, rows)
    assert relative_rmse(parts.sum(0), wanted) < 1e-5


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_products_of_any_launch(parts, prefetch):
    """Uneven shares, and parts that lie beyond the columns."""
    x, weight, both = draw(5, 200), draw(70, 200), draw(140, 200)
    launch = GemmLaunch(64, 16, 32, 4, 2, parts, prefetch)
    ours = run_gemm(x, weight, None, launch, split_k=True)
    assert relative_rmse(ours.sum(0), x @ weight.T) < 1e-5
    gate, up = (x @ both.T).chunk(2, -1)
    assert relative_rmse(run_gemm(x, both, None, launch, swiglu=True), F.silu(gate) * up) < 1e-5


SWAPPED = {
    "one block": GemmLaunch(32, 16, 32, 4, 2, swap_ab=True),
    "two blocks": GemmLaunch(64, 16, 32, 4, 2, prefetch=3, swap_ab=True, block_n2=16),
    "a part of a block": GemmLaunch(64, 16, 64, 4, 3, prefetch=2, swap_ab=True, outputs=23),
    "a part of two": GemmLaunch(32, 16, 64, 4, 3, swap_ab=True, block_n2=16, outputs=21),
}
"""Outputs of a plain product; of SwiGLU, where each has two rows, half as many."""


@pytest.mark.parametrize("name", SWAPPED)
@pytest.mark.parametrize(("batch", "columns", "rows"), [(3, 200, 71), (17, 128, 64), (41, 72, 100), (100, 136, 72)])
@pytest.mark.parametrize("dtype", PRODUCTS)
def test_swap_ab_gemm(name, batch, columns, rows, dtype):
    """Odd batches, rows that fill no tile, columns that do and do not fill their blocks, with and without a bias."""
    launch = replace(SWAPPED[name], block_m=max(16, triton.next_power_of_2(batch)))
    wide, weight = draw(batch, 2 * columns, dtype=dtype), draw(2 * rows, columns, dtype=dtype)
    x, bias = wide[:, columns:], draw(rows, dtype=dtype)
    wanted = x.float() @ weight.float().T
    for offset in (None, bias):
        ours = run_gemm(x, weight[:rows], offset, launch)
        assert ours.dtype == dtype
        added = 0 if offset is None else offset.float()
        assert relative_rmse(ours.float(), wanted[:, :rows] + added) < CLOSE[dtype]
    gate, up = (part.to(dtype).float() for part in wanted.chunk(2, -1))
    ours = run_gemm(x, weight, None, replace(launch, outputs=launch.outputs // 2), swiglu=True)
    assert ours.dtype == dtype
    assert relative_rmse(ours.float(), F.silu(gate) * up) < CLOSE[dtype]
    for parts in (1, 2, 3, 7):
        ours = run_gemm(x, weight, None, replace(launch, split_k=parts), split_k=True)
        assert ours.shape == (parts, batch, 2 * rows)
        assert relative_rmse(ours.sum(0), wanted) < CLOSE[dtype]


@pytest.mark.parametrize("name", SWAPPED)
def test_silu_of_some_outputs_beside_all(name):
    x, weight, bias = (draw(*size, dtype=torch.float16) for size in ((3, 64), (100, 64), (100,)))
    launch = SWAPPED[name]
    wanted = run_gemm(x, weight, bias, launch)
    for at, size in ((0, 100), (30, 41), (63, 2), (90, 10)):
        active = torch.full((3, size), torch.nan, device=DEVICE, dtype=torch.float16)
        ours = run_gemm(x, weight, bias, launch, activated=active, activated_at=at)
        assert torch.equal(ours, wanted)
        assert relative_rmse(active.float(), F.silu(wanted[:, at : at + size].float())) < CLOSE[torch.float16]


@pytest.mark.parametrize("batch", [3, 40, 100])
def test_the_product_with_silu_is_the_product_without(batch):
    x, weight = draw(batch, 1536, dtype=torch.float16), 0.1 * draw(200, 1536, dtype=torch.float16)
    row, active = gemm_and_silu(x, weight, None, 50, 64)
    assert relative_rmse(row.float(), x.float() @ weight.float().T) < CLOSE[torch.float16]
    assert (active is None) == (batch != 40)
    if active is not None:
        assert relative_rmse(active.float(), F.silu(row[:, 50:114].float())) < CLOSE[torch.float16]


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_swap_ab_program_writes_its_own_outputs_only(swiglu):
    """Its blocks reach into those of the next one, and the two run at once."""
    x, weight, taken = draw(3, 64), draw(2 * 40, 64), 11
    launch = GemmLaunch(16, 16, 32, 4, 2, swap_ab=True, block_n2=16, outputs=taken)
    rows = 40 if swiglu else 80
    out = torch.full((3, rows), torch.nan, device=DEVICE)
    swap_ab_gemm_kernel[(2,)](
        x, weight, x, out, out, 3, rows, 64, 64, taken, 64, 0, BLOCK_N2=16, EVEN=True, SWIGLU=swiglu, BIAS=False,
        ACTIVATED=0, **launch.constants(x),
    )  # fmt: skip
    gate, up = (x @ weight.T).chunk(2, -1)
    wanted = F.silu(gate) * up if swiglu else x @ weight.T
    assert relative_rmse(out[:, : 2 * taken], wanted[:, : 2 * taken]) < 1e-5
    assert out[:, 2 * taken :].isnan().all()


@pytest.mark.parametrize("batch", [2, 16, 64, 100, 128])
@pytest.mark.parametrize("outputs", [8960, 11008, 8856, 151936, 7])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("sms", "shared"), [(132, 228 << 10), (16, 164 << 10), (82, 100 << 10), (1, 100 << 10)])
def test_swap_ab_launches_divide_the_outputs_evenly(batch, outputs, swiglu, sms, shared):
    width = 2 if swiglu else 1
    launch = swap_ab_launch(batch, outputs, 2, sms, shared, swiglu)
    programs = triton.cdiv(outputs, launch.outputs)
    assert launch.outputs * width <= launch.block_n + launch.block_n2 <= 192
    assert launch.block_n2 < launch.block_n
    assert launch.block_m >= batch
    assert launch.stages * (launch.block_n + launch.block_n2 + launch.block_m) * 128 < shared
    # Whole rounds of programs, none of them nearly empty.
    rounds = triton.cdiv(programs, sms)
    assert (programs - 1) * launch.outputs < outputs <= rounds * sms * launch.outputs
    assert outputs == 7 or programs > 0.94 * rounds * sms


@pytest.mark.parametrize("batch", [2, 16, 64, 100, 128])
@pytest.mark.parametrize(("columns", "rows"), [(1536, 8856), (3072, 1536), (8960, 1536), (384, 12288), (64, 7)])
@pytest.mark.parametrize("split_k", [False, True])
def test_parts_of_a_product_cover_its_columns(batch, columns, rows, split_k):
    launch = gemm_launch(batch, rows, columns, 2, 132, 228 << 10, split_k)
    share = launch.share(columns)
    assert share % launch.block_k == 0
    assert (launch.split_k - 1) * share < columns <= launch.split_k * share
    assert launch.block_m >= batch
    assert launch.split_k == 1 or split_k


@pytest.mark.parametrize(("batch", "size"), [(1, 3), (3, 4096), (5, 10_001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax(batch, size, dtype):
    logits = draw(batch, size, dtype=dtype)
    assert torch.equal(argmax(logits), logits.argmax(-1))
    few = logits.round().clamp(-1, 1)  # thousands of equals
    assert torch.equal(argmax(few), (few == few.amax(-1, keepdim=True)).int().argmax(-1))
    assert torch.equal(argmax(few), few.float().cpu().argmax(-1).to(DEVICE))
    assert argmax(torch.full_like(logits, -torch.inf)).tolist() == [0] * batch
    wide = draw(batch, 2, size, dtype=dtype)
    assert torch.equal(argmax(wide[:, 1]), wide[:, 1].argmax(-1))
