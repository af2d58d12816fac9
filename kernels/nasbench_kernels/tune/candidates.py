"""Launches that differ from a given one in a thing or two, and the check of a launch against fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench_kernels.common.launch import LIBRARY, LaunchKey, sm_limits
from nasbench_kernels.gated_delta.decode import StepLaunch, StepWorkspace, recurrent_step
from nasbench_kernels.gated_delta.naive import RowLayout, naive_recurrent_step
from nasbench_kernels.linear.gemm import run_gemm
from nasbench_kernels.linear.gemv import gemv
from nasbench_kernels.linear.launch import (
    GemmLaunch,
    full_swap_ab_launch,
    gemm_launch,
    swap_ab_launch,
    swap_ab_split_k_launch,
)

ELEMENT = 2
"""Bytes of a weight: the tuner serves half precision."""
TUNED = ("gemv", "gemm", "recurrent step")
CLOSE = 1e-2
"""Relative RMSE allowed in half precision."""


def neighbours(key: LaunchKey, launch: Any, device: torch.device) -> list[Any]:
    """Launches to try instead of `launch`, each once."""
    if key.op == "gemv":
        found = _gemv_neighbours(launch)
    elif key.op == "gemm":
        found = _gemm_neighbours(key, launch, *sm_limits(device))
    else:
        found = _step_neighbours(key, launch)
    return [one for one in dict.fromkeys(found) if one != launch]


def _gemv_neighbours(launch: tuple[int, int, int]) -> list[Any]:
    rows, columns, warps = launch
    found = [(2 * rows, columns, warps), (rows // 2, columns, warps), (rows, columns, 2 * warps)]
    found += [(rows, columns, warps // 2), (rows, 2 * columns, warps), (rows, columns // 2, warps)]
    found += [(2 * rows, columns // 2, warps), (rows // 2, 2 * columns, warps)]
    return [(n, k, w) for n, k, w in found if n >= 1 and k >= 64 and 1 <= w <= 16 and n * k <= 256 * 32 * w]


def _gemm_neighbours(key: LaunchKey, launch: Any, sms: int, shared_memory: int) -> list[Any]:
    batch, rows, columns = key.sizes
    split, swiglu = key.variant == "split_k", key.variant == "swiglu"
    outputs, limits = rows // 2 if swiglu else rows, (ELEMENT, sms, shared_memory)
    found: list[Any] = [swap_ab_launch(batch, outputs, *limits, swiglu=swiglu)]
    found += [full_swap_ab_launch(batch, outputs, *limits, swiglu=swiglu)]
    if split:
        found = [swap_ab_split_k_launch(batch, rows, columns, *limits)]
    if not swiglu:
        found += [gemm_launch(batch, rows, columns, *limits, split), LIBRARY]
    if launch != LIBRARY:
        found += [replace(launch, prefetch=0), replace(launch, prefetch=launch.stages)]
        found += [replace(launch, stages=launch.stages + change) for change in (-1, 1)]
        found += [replace(launch, warps=12 - launch.warps), replace(launch, swap_ab=False, block_n2=0, outputs=0)]
        found += [replace(launch, block_k=2 * launch.block_k, stages=max(1, launch.stages // 2))]
        found += [replace(launch, block_n=size, block_n2=0, outputs=0) for size in (32, 64, 128)]
        if split:
            blocks = -(-columns // launch.block_k)
            shares = {-(-blocks // max(1, launch.split_k * f // 6)) for f in (3, 4, 9, 12)}
            found += [replace(launch, split_k=-(-blocks // share)) for share in shares]
    return [one for one in found if one == LIBRARY or (one and _fits(one, swiglu, shared_memory))]


def _fits(launch: GemmLaunch, swiglu: bool, shared_memory: int) -> bool:
    return launch.stages >= 1 and launch.stages * launch.stage_bytes(ELEMENT, swiglu) <= shared_memory - 2048


def _step_neighbours(key: LaunchKey, launch: StepLaunch) -> list[Any]:
    it, whole = launch, 1 << (key.sizes[-1] - 1).bit_length()
    found = [
        replace(it, block_v=it.block_v // 2, tiles=2 * it.tiles),
        replace(it, tiles=it.tiles // 2, parts=2 * it.parts),
    ]
    found += [replace(it, block_v=2 * it.block_v, tiles=it.tiles // 2)]
    found += [replace(it, tiles=2 * it.tiles, parts=it.parts // 2)]
    found += [replace(it, warps=2 * it.warps), replace(it, warps=it.warps // 2)]
    found += [replace(it, stages=it.stages + change) for change in (-1, 1)]
    found += [StepLaunch(size, 1, whole // size, 4, 1) for size in (32, 64) if size <= whole]
    return [
        one for one in found
        if one.block_v * one.tiles * one.parts == whole and one.block_v >= 8 and 1 <= one.warps <= 8 and one.stages >= 1
    ]  # fmt: skip


def error(key: LaunchKey, launch: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Relative RMSE of a launch against fp32; infinite for one that does not run."""
    try:
        with torch.inference_mode():
            form = _step_error if key.op == "recurrent step" else _product_error
            return 0.0 if launch == LIBRARY else form(key, launch, device, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of what does not compile here
        return float("inf")


def _relative_rmse(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def _product_error(key: LaunchKey, launch: Any, device: torch.device, dtype: torch.dtype) -> float:
    swiglu, columns = key.variant == "swiglu", key.sizes[-1]
    batch, rows = (1, key.sizes[0] * (2 if swiglu else 1)) if key.op == "gemv" else key.sizes[:2]
    x = torch.randn(batch, columns, device=device, dtype=dtype)
    weight = torch.randn(rows, columns, device=device, dtype=dtype) * columns**-0.5
    exact = F.linear(x.float(), weight.float())
    if swiglu:
        gate, up = exact.chunk(2, -1)
        exact = F.silu(gate) * up
    if key.op == "gemv":
        return _relative_rmse(gemv(x, weight, swiglu=swiglu, launch=launch), exact)
    split = key.variant == "split_k"
    result = run_gemm(x, weight, None, launch, swiglu=swiglu, split_k=split)
    return _relative_rmse(result.sum(0) if split else result, exact)


def _step_error(key: LaunchKey, launch: Any, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of outputs and states of two steps; the second one reads what the first one wrote."""
    batch, heads, key_dim, value_dim = key.sizes
    keys, values = heads * key_dim, heads * value_dim
    layout = RowLayout(0, keys, 2 * keys, 2 * keys + values, 2 * keys + 2 * values, 2 * keys + 2 * values + heads)
    row = torch.randn(batch, layout.beta + heads, device=device, dtype=dtype)
    kind = torch.bfloat16 if "bfloat16" in key.variant else torch.float32
    state = torch.randn(batch, heads, key_dim, value_dim, device=device, dtype=kind)
    a_log, dt_bias = (torch.randn(heads, device=device) for _ in range(2))
    weights = a_log, dt_bias, torch.randn(value_dim, device=device, dtype=dtype)
    exact, workspace, found = state.clone(), StepWorkspace(), [0.0]
    for _ in range(2):
        output = recurrent_step(row, layout, state, *weights, workspace, launch=launch)
        wanted, exact, _ = naive_recurrent_step(row, layout, exact, *weights)
        found += [_relative_rmse(output, wanted), _relative_rmse(state, exact)]
    return float(torch.tensor(found).max())
