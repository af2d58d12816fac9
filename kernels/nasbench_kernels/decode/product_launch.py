"""How products for 2 to 128 sequences are launched, by measurements on an H100: `benchmarks/launches.py` of each alone,
`benchmarks/step_launches.py` of whole steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from nasbench_kernels.decode.overlap import dependent

MOST_SEQUENCES = 128
"""One tile holds them all; beyond, products are bound by arithmetic and cuBLAS is the faster."""


def fits(x: Tensor) -> bool:
    """Whether x [B, K] is better served here than by cuBLAS: few sequences, two bytes an element (tiles of fp32 spill
    their registers)."""
    return 2 <= x.shape[0] <= MOST_SEQUENCES and x.element_size() == 2


@dataclass(frozen=True)
class ProductLaunch:
    """How a product is launched. A row of a block of `swiglu_launch` and `batch_launch` is one or two lines of the
    cache, 128 bytes each.

    Attributes:
        rows: of the weights in a block; without `turned`, SwiGLU has two blocks, of gate and of up.
        sequences: in a block, a power of two, at least 16.
        columns: of a block.
        warps: of a program.
        stages: of its pipeline.
        parts: that the columns are divided into; not of SwiGLU.
        early: blocks of weights that are asked for before the launch ahead is done.
        turned: sequences are the rows of the tile. With SwiGLU rows of gate and up then alternate in one block.
        more: rows of a second, smaller block of a turned product's program; 0: none.
        taken: outputs of a turned product's program, if they are fewer than its blocks hold; 0: as many.
        hints: tell the second-level cache to let go of weights first and of x last.
    """

    rows: int
    sequences: int
    columns: int
    warps: int
    stages: int
    parts: int = 1
    early: int = 0
    turned: bool = False
    more: int = 0
    taken: int = 0
    hints: bool = False

    def share(self, columns: int) -> int:
        """Columns of a part, whole blocks."""
        return triton.cdiv(triton.cdiv(columns, self.parts), self.columns) * self.columns

    def outputs(self, swiglu: bool) -> int:
        """Of a turned product's program."""
        return self.taken or (self.rows + self.more) // (2 if swiglu else 1)

    def constants(self, x: Tensor) -> dict[str, int | str]:
        """Keywords of every kernel here for x."""
        return {
            "BLOCK_R": self.rows, "BLOCK_B": self.sequences, "BLOCK_K": self.columns, "STAGES": self.stages,
            "EARLY": self.early, "LINE": 128 // x.element_size(), "KEEP": "evict_last" if self.hints else "",
            "PASS": "evict_first" if self.hints else "", "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
            "num_warps": self.warps, **dependent(x.device),
        }  # fmt: skip


def swiglu_launch(batch: int, outputs: int, element_size: int, sms: int, shared_memory: int) -> ProductLaunch:
    """Of gate and up product with SiLU and multiplication, by measurements on an H100: `benchmarks/launches.py`."""
    sequences = max(16, triton.next_power_of_2(batch))
    if sequences > 32 and (turned := even_launch(batch, outputs, element_size, sms, shared_memory, swiglu=True)):
        return turned
    block_k = 128 // element_size
    stages, warps = (4, 4) if sequences <= 32 else (3, 4) if sequences <= 64 else (3, 8)
    tile = (2 * 64 + sequences) * block_k * element_size
    stages = max(1, min(stages, (shared_memory - 4096) // tile))
    return ProductLaunch(64, sequences, block_k, warps, stages, early=stages if sequences == 64 else 0)


def batch_launch(
    batch: int, rows: int, columns: int, element_size: int, sms: int, shared_memory: int, divided: bool
) -> ProductLaunch:
    """Of a plain product, or of one that may be divided: into one program for each multiprocessor, two where there are
    many columns, but parts of twelve blocks at least. By measurements on an H100, of single products
    (`benchmarks/launches.py`) and of whole steps with them."""
    sequences = max(16, triton.next_power_of_2(batch))
    block_k, block = 128 // element_size, 64
    blocks, tiles = triton.cdiv(columns, block_k), triton.cdiv(rows, block)
    if not divided and sequences == 64 and blocks >= 12:
        turned = even_launch(batch, rows, element_size, sms, shared_memory)
        if turned:
            return turned
    long = blocks >= 100
    if divided and (sequences == 128 or (sequences == 64 and long)):
        turned = turned_parts(batch, rows, columns, element_size, sms, shared_memory)
        if turned:
            return turned
    parts = max(1, min((2 if long else 1) * sms // tiles, blocks // 12)) if divided else 1
    share = triton.cdiv(blocks, parts)
    tile = (block + sequences) * block_k * element_size
    stages = max(1, min(4 if divided and long else 5, (shared_memory // 2 - 4096) // tile))
    # Where two programs share a multiprocessor, one's loop hides the other's start.
    early = 0 if (divided and (long or sequences > 32)) or blocks < 8 else stages
    return ProductLaunch(block, sequences, block_k, 4, stages, triton.cdiv(blocks, share), early)


MOST_ROWS, MOST_ROWS_OF_MANY = 192, 144
"""Of a turned product's program: where all programs run at once, and where many take turns on a multiprocessor."""
FEWEST_STAGES = 3
"""With fewer, a turned product waits for each block."""


def turned_launch(
    batch: int, outputs: int, element_size: int, sms: int, shared_memory: int, each: int = 1, swiglu: bool = False,
    most: int = 0,
) -> ProductLaunch:  # fmt: skip
    """Of a turned product: `each` programs for each multiprocessor, or a multiple of that, with as many outputs each.

    Args:
        most: rows of the weights that a program takes at most; 0: MOST_ROWS or MOST_ROWS_OF_MANY.
    """
    width, slots = 2 if swiglu else 1, sms * each
    taken = triton.cdiv(outputs, slots)
    if taken * width > (most or MOST_ROWS):
        taken = triton.cdiv(outputs, slots * triton.cdiv(outputs * width, slots * (most or MOST_ROWS_OF_MANY)))
    rows = max(16, 1 << (taken * width).bit_length() - 1)
    more = max(0, taken * width - rows)
    # The matrix unit takes 16 columns at least, and one block is better than two of the same size.
    more = max(16, triton.next_power_of_2(more)) if more else 0
    rows, more = (2 * rows, 0) if more == rows else (rows, more)
    sequences, block_k = max(16, triton.next_power_of_2(batch)), 128 // element_size
    tile = (rows + more + sequences) * 128
    # Half of the shared memory, if three stages fit in it: the next launch's programs then find room.
    half = (shared_memory // 2 - 4096) // tile
    stages = max(1, min(4, half if half >= FEWEST_STAGES else (shared_memory - 4096) // tile))
    warps = 8 if sequences == 128 else 4
    return ProductLaunch(rows, sequences, block_k, warps, stages, 1, stages, True, more, taken)


def even_launch(
    batch: int, outputs: int, element_size: int, sms: int, shared_memory: int, swiglu: bool = False
) -> ProductLaunch | None:
    """A turned launch of one program for each multiprocessor that fills its shared memory; None where that holds too
    few stages.

    Up to 64 sequences two lines of each row of the weights are asked for at once, which opens fewer pages of the
    memory; for small blocks and for more sequences one line and more stages did better.
    """
    launch = turned_launch(batch, outputs, element_size, sms, shared_memory, swiglu=swiglu)
    rows = launch.rows + launch.more + launch.sequences
    fit = (shared_memory - 2048) // (rows * 128)
    if launch.sequences <= 64 and launch.rows > 32 and fit >= 2 * FEWEST_STAGES:
        return replace(launch, columns=2 * launch.columns, stages=min(4, fit // 2), early=2)
    if fit < FEWEST_STAGES:
        return None
    return replace(launch, stages=min(8, fit), early=min(launch.early, 4))


def turned_parts(
    batch: int, rows: int, columns: int, element_size: int, sms: int, shared_memory: int
) -> ProductLaunch | None:
    """A turned launch of a divided product: blocks of 64 rows, parts of eight blocks at least, one program for each
    multiprocessor that fills its shared memory; None where that holds too few stages."""
    sequences, block_k, block = max(16, triton.next_power_of_2(batch)), 128 // element_size, 64
    blocks, tiles = triton.cdiv(columns, block_k), triton.cdiv(rows, block)
    share = triton.cdiv(blocks, max(1, min(sms // tiles, blocks // 8)))
    stages = min(6, (shared_memory - 2048) // ((block + sequences) * 128))
    if stages < FEWEST_STAGES:
        return None
    warps = 8 if sequences == 128 else 4
    return ProductLaunch(
        block, sequences, block_k, warps, stages, triton.cdiv(blocks, share), min(stages, 4), turned=True
    )


def streams(x: Tensor, weight: Tensor, divided: bool = False) -> bool:
    """Whether W x, or with `divided` what add_norm is to sum, is faster here than by cuBLAS: up to 64 sequences, and
    beyond where it is divided or the rows that a program multiplies are short. By measurements on an H100:
    `benchmarks/launches.py`.

    Args:
        x: [B, K].
        weight: [N, K].
    """
    return fits(x) and (divided or x.shape[0] <= 64 or weight.shape[1] <= 512)
