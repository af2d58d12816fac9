"""How skinny products, of 2 to 128 sequences, are launched: chosen by measurements of whole decode steps on an H100
(`benchmarks/launches.py`). N rows of the weight, K columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from nasbench_kernels.common.launch import LIBRARY, launch_for, sm_limits
from nasbench_kernels.common.pdl import pdl_launch

MAX_SEQUENCES = 128
"""One tile holds them all; beyond, products are bound by arithmetic and cuBLAS is the faster."""
MAX_ROWS, MAX_ROWS_OF_MANY = 192, 144
"""Of a swap-AB program: where all programs run at once, and where many take turns on a multiprocessor."""
FEWEST_STAGES = 3
"""With fewer, a swap-AB program waits for each block."""
LINE_BYTES = 128


@dataclass(frozen=True)
class GemmLaunch:
    """How a product is launched.

    Attributes:
        block_n: rows of the weight in a block; without `swap_ab`, SwiGLU has two blocks, of gate and of up.
        block_m: sequences in a block, a power of two, at least 16.
        block_k: columns of a block: one or two lines of the cache.
        warps, stages: of a program and its pipeline.
        split_k: parts that the columns are split into; not of SwiGLU.
        prefetch: blocks of weights that are asked for before the launch ahead is done.
        swap_ab: sequences are the rows of the tile. With SwiGLU, rows of gate and up then alternate in one block.
        block_n2: rows of a second, smaller block of a swap-AB program; 0: none.
        outputs: of a swap-AB program, if fewer than its blocks hold; 0: as many.
    """

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1
    prefetch: int = 0
    swap_ab: bool = False
    block_n2: int = 0
    outputs: int = 0

    def share(self, columns: int) -> int:
        """Columns of a part, whole blocks."""
        return triton.cdiv(triton.cdiv(columns, self.split_k), self.block_k) * self.block_k

    def outputs_each(self, swiglu: bool) -> int:
        """Outputs of a program."""
        if not self.swap_ab:
            return self.block_n
        return self.outputs or (self.block_n + self.block_n2) // (2 if swiglu else 1)

    def stage_bytes(self, element_size: int, swiglu: bool) -> int:
        """Shared memory of one stage."""
        rows = self.block_n + self.block_n2 if self.swap_ab else self.block_n * (2 if swiglu else 1)
        return (rows + self.block_m) * self.block_k * element_size

    def constants(self, x: Tensor) -> dict[str, int | str]:
        """Keywords of every kernel here for x."""
        return {
            "BLOCK_N": self.block_n, "BLOCK_M": self.block_m, "BLOCK_K": self.block_k, "STAGES": self.stages,
            "PREFETCH": self.prefetch, "LINE": LINE_BYTES // x.element_size(),
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32", "num_warps": self.warps,
            **pdl_launch(x.device),
        }  # fmt: skip


def skinny_gemm_supported(x: Tensor) -> bool:
    """Whether these kernels serve x [B, K]: few sequences, two bytes an element (tiles of fp32 spill registers)."""
    return 2 <= x.shape[0] <= MAX_SEQUENCES and x.element_size() == 2


def prefer_skinny_gemm(x: Tensor, weight: Tensor, split_k: bool = False) -> bool:
    """Whether W x, or with `split_k` the parts that `add_norm` sums, is faster here than by cuBLAS: up to 64 sequences,
    and beyond where it is split or the columns are few.

    Args:
        x: [B, K].
        weight: [N, K].
    """
    if not skinny_gemm_supported(x):
        return False
    ours = split_k or x.shape[0] <= 64 or weight.shape[1] <= 512
    return gemm_choice(x, weight, split_k, ours) != LIBRARY


def gemm_choice(x: Tensor, weight: Tensor, split_k: bool, ours: bool = True) -> Any:
    """The GemmLaunch of a product, or LIBRARY where it is not `ours` by default."""
    (batch, columns), rows = x.shape, weight.shape[0]

    def default() -> GemmLaunch | str:
        return gemm_launch(batch, rows, columns, x.element_size(), *sm_limits(x.device), split_k) if ours else LIBRARY

    return launch_for("gemm", "split_k" * split_k, (batch, rows, columns), default)


def swiglu_gemm_choice(x: Tensor, weight: Tensor) -> GemmLaunch:
    """The launch of gate and up together."""
    (batch, columns), outputs = x.shape, weight.shape[0] // 2

    def default() -> GemmLaunch:
        return swiglu_gemm_launch(batch, outputs, x.element_size(), *sm_limits(x.device))

    return launch_for("gemm", "swiglu", (batch, 2 * outputs, columns), default)


def swiglu_gemm_launch(batch: int, outputs: int, element_size: int, sms: int, shared_memory: int) -> GemmLaunch:
    block_m = max(16, triton.next_power_of_2(batch))
    if block_m > 32 and (found := full_swap_ab_launch(batch, outputs, element_size, sms, shared_memory, swiglu=True)):
        return found
    block_k = LINE_BYTES // element_size
    stages, warps = (4, 4) if block_m <= 32 else (3, 4) if block_m <= 64 else (3, 8)
    tile = (2 * 64 + block_m) * block_k * element_size
    stages = max(1, min(stages, (shared_memory - 4096) // tile))
    return GemmLaunch(64, block_m, block_k, warps, stages, prefetch=stages if block_m == 64 else 0)


def gemm_launch(
    batch: int, rows: int, columns: int, element_size: int, sms: int, shared_memory: int, split_k: bool
) -> GemmLaunch:
    """Of a plain product, or of one that may be split: into one program for each multiprocessor, two where there are
    many columns, but parts of twelve blocks at least."""
    block_m = max(16, triton.next_power_of_2(batch))
    block_k, block_n = LINE_BYTES // element_size, 64
    blocks, tiles = triton.cdiv(columns, block_k), triton.cdiv(rows, block_n)
    long = blocks >= 100
    found = None
    if not split_k and block_m == 64 and blocks >= 12:
        found = full_swap_ab_launch(batch, rows, element_size, sms, shared_memory)
    elif split_k and (block_m == 128 or (block_m == 64 and long)):
        found = swap_ab_split_k_launch(batch, rows, columns, element_size, sms, shared_memory)
    if found:
        return found
    parts = max(1, min((2 if long else 1) * sms // tiles, blocks // 12)) if split_k else 1
    share = triton.cdiv(blocks, parts)
    tile = (block_n + block_m) * block_k * element_size
    stages = max(1, min(4 if split_k and long else 5, (shared_memory // 2 - 4096) // tile))
    # Where two programs share a multiprocessor, one's loop hides the other's start.
    prefetch = 0 if (split_k and (long or block_m > 32)) or blocks < 8 else stages
    return GemmLaunch(block_n, block_m, block_k, 4, stages, triton.cdiv(blocks, share), prefetch)


def swap_ab_launch(
    batch: int, outputs: int, element_size: int, sms: int, shared_memory: int, swiglu: bool = False
) -> GemmLaunch:
    """One swap-AB program for each multiprocessor, or a multiple of that, with the same number of outputs each."""
    width = 2 if swiglu else 1
    each = triton.cdiv(outputs, sms)
    if each * width > MAX_ROWS:
        each = triton.cdiv(outputs, sms * triton.cdiv(outputs * width, sms * MAX_ROWS_OF_MANY))
    block_n = max(16, 1 << (each * width).bit_length() - 1)
    block_n2 = max(0, each * width - block_n)
    # The matrix unit takes 16 columns at least, and one block is better than two of the same size.
    block_n2 = max(16, triton.next_power_of_2(block_n2)) if block_n2 else 0
    block_n, block_n2 = (2 * block_n, 0) if block_n2 == block_n else (block_n, block_n2)
    block_m, block_k = max(16, triton.next_power_of_2(batch)), LINE_BYTES // element_size
    tile = (block_n + block_n2 + block_m) * LINE_BYTES
    # Half of the shared memory, if three stages fit in it: the next launch's programs then find room.
    half = (shared_memory // 2 - 4096) // tile
    stages = max(1, min(4, half if half >= FEWEST_STAGES else (shared_memory - 4096) // tile))
    warps = 8 if block_m == 128 else 4
    return GemmLaunch(block_n, block_m, block_k, warps, stages, 1, stages, True, block_n2, each)


def full_swap_ab_launch(
    batch: int, outputs: int, element_size: int, sms: int, shared_memory: int, swiglu: bool = False
) -> GemmLaunch | None:
    """`swap_ab_launch` with stages that fill a multiprocessor's shared memory; None where that holds too few stages.

    Up to 64 sequences two lines of each row of the weights are asked for at once, which opens fewer pages of the
    memory; for small blocks and for more sequences one line and more stages did better.
    """
    launch = swap_ab_launch(batch, outputs, element_size, sms, shared_memory, swiglu)
    fit = (shared_memory - 2048) // ((launch.block_n + launch.block_n2 + launch.block_m) * LINE_BYTES)
    if launch.block_m <= 64 and launch.block_n > 32 and fit >= 2 * FEWEST_STAGES:
        return replace(launch, block_k=2 * launch.block_k, stages=min(4, fit // 2), prefetch=2)
    if fit < FEWEST_STAGES:
        return None
    return replace(launch, stages=min(8, fit), prefetch=min(launch.prefetch, 4))


def swap_ab_split_k_launch(
    batch: int, rows: int, columns: int, element_size: int, sms: int, shared_memory: int
) -> GemmLaunch | None:
    """A swap-AB launch of a split product: blocks of 64 rows, parts of eight blocks at least, one program for each
    multiprocessor that fills its shared memory; None where that holds too few stages."""
    block_m, block_k, block_n = max(16, triton.next_power_of_2(batch)), LINE_BYTES // element_size, 64
    blocks, tiles = triton.cdiv(columns, block_k), triton.cdiv(rows, block_n)
    share = triton.cdiv(blocks, max(1, min(sms // tiles, blocks // 8)))
    stages = min(6, (shared_memory - 2048) // ((block_n + block_m) * LINE_BYTES))
    if stages < FEWEST_STAGES:
        return None
    parts, warps = triton.cdiv(blocks, share), 8 if block_m == 128 else 4
    return GemmLaunch(block_n, block_m, block_k, warps, stages, parts, min(stages, 4), swap_ab=True)
