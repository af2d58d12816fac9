"""What a sweep measures: one point per row. Imports no torch, so that a plan can be printed at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nasbench.backbone.shapes import ModelShape
from nasbench.config import format_size, parse_size
from nasbench.errors import UserError, unknown
from nasbench.store import SHARED_BLOCKS

MODES = ("decode", "prefill")
LARGEST_BATCH = 1024
"""`max` stops here: the largest batch of arXiv 2508.15884."""
USABLE_MEMORY = 0.85
"""Share of the device's memory that a plan counts on; the rest is for work space and what else runs."""


@dataclass(frozen=True)
class Point:
    """One row to be: a block by its name in placements (`W1152`) or a shared block, and where it is measured.

    The context of a prefill point is the end of its chunk. Shared blocks have context 0.
    """

    block: str
    mode: str
    batch: int
    context: int = 0
    chunk: int = 0

    @property
    def shared(self) -> bool:
        return self.block in SHARED_BLOCKS

    def __str__(self) -> str:
        where = f" at {format_size(self.context)}" if self.context else ""
        return f"{self.mode} {self.block}{where}, batch {self.batch}"


def parse_batches(text: str) -> list[int | str]:
    """`"1,4,max"` -> [1, 4, "max"]. Raises UserError."""
    parts = [part.strip().lower() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError("no batch given: write numbers or max, as 1,4,max")
    return [part if part == "max" else parse_size(part) for part in dict.fromkeys(parts)]


def largest_batch(shape: ModelShape, names: Sequence[str], context: int, memory_bytes: int, dtype_bytes: int) -> int:
    """The largest power of two up to 1024 at which a useful hybrid of these kinds fits in memory: weights, one layer of
    the kind with the largest cache, and all others of the kind with the smallest. At least 1."""
    configs = [shape.mixer(name) for name in names]
    each = [config.cache_bytes(1, context, dtype_bytes) + config.history_bytes(1, dtype_bytes) for config in configs]
    weights = (shape.parameters() + 2 * shape.vocab_size) * dtype_bytes
    room = USABLE_MEMORY * memory_bytes - weights
    per_sequence = max(each) + (shape.num_layers - 1) * min(each)
    fits = min(LARGEST_BATCH, int(room // per_sequence)) if room > 0 else 0
    return 1 << max(0, fits.bit_length() - 1)


def plan(
    shape: ModelShape,
    names: Sequence[str],
    contexts: Sequence[int],
    batches: Sequence[int | str],
    modes: Sequence[str],
    chunk: int,
    memory_bytes: int,
    dtype_bytes: int,
) -> list[list[Point]]:
    """The points of a sweep in groups of one block each, shared blocks first.

    Prefill is measured at its first chunk and at every context; a placement's prefill is summed over chunks in between.

    Raises:
        UserError: unknown kind or mode, a context beyond the model's.
    """
    for mode in modes:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
    for name in names:
        shape.mixer(name)
    for context in contexts:
        if context > shape.max_context:
            raise UserError(f"context {context} is not of {shape.name}: choose up to {format_size(shape.max_context)}")

    def batches_at(context: int) -> list[int]:
        largest = largest_batch(shape, names, context, memory_bytes, dtype_bytes)
        return sorted({largest if batch == "max" else int(batch) for batch in batches})

    everywhere = sorted({batch for context in contexts for batch in batches_at(context)})
    # The prefill batch is the smallest: larger ones only fill the device that a chunk fills already.
    prefill_batch = everywhere[0]
    chunk = min(chunk, shape.max_context)
    ends = sorted({chunk, *(context for context in contexts if context >= chunk)})
    groups = []
    for block in SHARED_BLOCKS:
        group = [Point(block, "decode", batch) for batch in everywhere]
        if "prefill" in modes and block != "head":
            group.append(Point(block, "prefill", prefill_batch, chunk=chunk))
        groups.append(group if "decode" in modes or block == "head" else [p for p in group if p.mode == "prefill"])
    for name in dict.fromkeys(names):
        group = []
        if "decode" in modes:
            group += [Point(name, "decode", batch, context) for context in contexts for batch in batches_at(context)]
        if "prefill" in modes:
            group += [Point(name, "prefill", prefill_batch, end, chunk) for end in ends]
        groups.append(group)
    return [group for group in groups if group]
