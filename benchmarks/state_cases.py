"""The recurrent steps that benchmarks/launches.py times: the layers of a shape, the launches to try, inputs, check."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.kernel_cases import CLOSE, Call, RecurrentStep, sets_of, worst
from nasbench.model.mixers.gated_delta.spec import JetBlockSpec
from nasbench.model.shapes import ModelSpec

if TYPE_CHECKING:
    from nasbench_kernels.decode.recurrent import StepLaunch

BATCHES = (64, 128, 256, 512)
STATE_BYTES = 4
TRIED = (
    # Programs small enough that all heads of 64 sequences find room at once.
    (32, 8, 2, 3, 128, False, False),
    # One tile, in registers, on its way before the projections are: nothing waits for shared memory.
    (64, 1, 4, 1, 128, False, False),
    (32, 1, 2, 1, 0, False, False),
    (32, 1, 1, 1, 0, False, False),
    (64, 4, 4, 3, 128, False, False),
    (64, 1, 4, 1, 128, True, True),
    (32, 8, 2, 3, 128, False, True),
    (64, 4, 2, 2, 0, False, True),
    (16, 16, 1, 3, 0, False, False),
    (32, 8, 2, 2, 0, False, False),
    (64, 2, 4, 2, 0, False, False),
    (64, 1, 2, 1, 200, False, False),
    (128, 1, 8, 1, 128, False, False),
    (128, 1, 4, 1, 0, False, False),
    (64, 4, 2, 3, 0, False, False),
    (256, 1, 8, 1, 0, False, False),
    (64, 4, 2, 1, 0, False, False),
    (64, 4, 2, 4, 0, False, False),
    (128, 2, 4, 2, 0, False, False),
    (128, 2, 8, 2, 0, False, False),
    (64, 2, 2, 3, 0, False, False),
    (64, 2, 2, 2, 0, False, False),
    (64, 4, 1, 3, 0, False, False),
    (32, 1, 4, 1, 0, True, True),
    (64, 4, 2, 2, 0, False, False),
)
"""Channels of a tile, tiles, warps, stages, most registers, hints on reads and on writes: what promises most first. The
head's other channels go to further programs. For 96 x 256 on an H100 registers and shared memory leave room for one to
sixteen of these programs in a multiprocessor, with 72 to 192 KB on their way, and for four with 96 of the chosen ones.
"""
KEYS, MOST_REGISTERS = 96, 255
"""The registers above are for so many keys; more keys get more, or the state would spill. No thread has over 255."""


def states(shape: ModelSpec) -> Counter[JetBlockSpec]:
    """The JetBlock layers with an fp32 state and how often a step has each."""
    configs = [config for config in shape.mixers(shape.placement) if isinstance(config, JetBlockSpec)]
    return Counter(config for config in configs if config.state_bits == 8 * STATE_BYTES)


def launches(config: JetBlockSpec, batch: int, device: torch.device) -> list[StepLaunch]:
    """Ways to launch a step of `batch` sequences, the chosen one first, with the stages that shared memory leaves."""
    from nasbench_kernels.decode.card import card
    from nasbench_kernels.decode.recurrent import StepLaunch, key_blocks, step_launch

    sms, shared = card(device)
    whole, keys = 1 << (config.value_dim - 1).bit_length(), max(KEYS, sum(key_blocks(config.key_dim)))
    found = [step_launch(batch * config.num_heads, config.key_dim, config.value_dim, sms)]
    for block_v, tiles, warps, stages, registers, evict_reads, stream_writes in TRIED:
        block_v = min(block_v, whole)
        tiles = min(tiles, whole // block_v)
        parts = whole // (block_v * tiles)
        registers = min(MOST_REGISTERS, registers * keys // KEYS // 8 * 8)
        found.append(StepLaunch(block_v, tiles, parts, warps, stages, registers, evict_reads, stream_writes))
    fitting = [replace(it, stages=it.stages_for(STATE_BYTES, config.key_dim, shared)) for it in found]
    return list(dict.fromkeys(fitting))


def label(it: StepLaunch) -> str:
    """64x4p1w2s2: channels x tiles, parts, warps, stages; r most registers, e evict_reads, c stream_writes."""
    text = f"{it.block_v}x{it.tiles}p{it.parts}w{it.warps}s{it.stages}"
    return text + f"r{it.registers}" * bool(it.registers) + "e" * it.evict_reads + "c" * it.stream_writes


class StateCase(RecurrentStep):
    """A JetBlock layer's step of `batch` sequences in any launch.

    Args:
        dtype: of everything but the state, which is fp32.
        sets: copies of the inputs, at least two, since a step may read its state before the one ahead is done; default
            enough that the states exceed the L2 cache together.
    """

    def __init__(
        self, config: JetBlockSpec, batch: int, device: torch.device, dtype: torch.dtype, sets: int | None = None
    ) -> None:
        heads, key_dim, value_dim = config.num_heads, config.key_dim, config.value_dim
        state_bytes = batch * heads * key_dim * value_dim * STATE_BYTES
        sets = max(2, sets or sets_of(state_bytes))
        super().__init__(batch, str(device), heads, key_dim, value_dim, dtype, sets)
        self.launch: StepLaunch | None = None

    def step(self, row: Tensor, kernels: Tensor, history: Tensor, state: Tensor) -> Tensor:
        """-> [B, H * V] in `self.launch`; None is what the kernels choose."""
        from nasbench_kernels.decode import recurrent_step

        return recurrent_step(
            row, self.layout, state, self.a_log, self.dt_bias, self.norm_weight, self.workspace, kernels, history,
            launch=self.launch,
        )  # fmt: skip

    def calls_of(self, launch: StepLaunch) -> list[Call]:
        self.launch = launch
        return self.calls()

    def error(self, launch: StepLaunch) -> float:
        """The largest relative RMSE of two steps, in the measure of the output's: a state must be a hundred times
        closer. Inputs and state are drawn anew: what another launch left in the memory is not taken for an output, and
        counters that it left wrong spoil nothing."""
        from nasbench_kernels.decode import StepWorkspace

        self.launch, self.workspace = launch, StepWorkspace()
        for tensor in self.sets[0]:
            tensor.normal_()
        errors = self.errors()
        return worst([error * CLOSE["output"] / CLOSE[name] for name, error in errors.items()])
