"""What a sweep measures: one point per row. Imports no torch, so that a plan can be printed at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from nasbench.core.errors import UserError, unknown
from nasbench.core.sizes import format_size, parse_size
from nasbench.model.shapes import ModelSpec
from nasbench.model.spec import BlockSpec
from nasbench.runtime.memory import lean_hybrid, sequences_that_fit
from nasbench.store import is_shared, shared_blocks

MODES = ("decode", "prefill")
WORDS = ("auto", "max")
"""What may stand for a batch beside numbers: the largest that fits, or powers of two up to it."""
PREFILL_BATCHES = (1, 2, 8, 64)
"""With `auto`: from 8 on a chunk of every kind fills a GPU, the last is what many short prompts come to ..."""
LATER, LONG = 8, 2
"""... and the most at chunks with tokens before them, and beyond LONG_CONTEXT: more would take seconds a row."""
LONG_CONTEXT = 32768
THIRD_TILES = (384, 385, 768, 769)
"""Batches around the end of a product's third tile, of 128 or 256 sequences: shared products are measured there too."""
FIRST_STEP = 32
"""Skinny products run in tiles of 2^n sequences: from here on the next one beyond a power of two is measured too."""
LARGEST_BATCH = 1024
"""`max` stops here: the largest batch of arXiv 2508.15884."""
FULL_MEMORY = 1.0
"""Share of it that a whole model may come to fill, up to which its layers are measured; no less than what
nasbench.runtime.memory lets a model fill, or its largest batch has no rows."""
USABLE_MEMORY = 0.85
"""Share of the device's memory that a plan counts on; the rest is for work space and what else runs."""

Place = tuple[int, int]
"""Context and chunk of a point."""


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
        return is_shared(self.block)

    def __str__(self) -> str:
        where = f" at {format_size(self.context)}" if self.context else ""
        return f"{self.mode} {self.block}{where}, batch {self.batch}"


def check_context(shape: ModelSpec, context: int) -> int:
    """Returns the context, or raises UserError when it is beyond the model's."""
    if not 1 <= context <= shape.max_context:
        raise UserError(f"context {context} is not of {shape.name}: choose 1 to {format_size(shape.max_context)}")
    return context


def same_work(spec: BlockSpec, context: int, other: int, chunk: int = 0) -> bool:
    """Whether a block does the same at two contexts, as recurrent states do, and windows that are full at both."""
    new = chunk or 1
    asked = (
        lambda at: spec.flops(new, max(0, at - new)),
        lambda at: spec.traffic_bytes(1, at),
        lambda at: spec.cache_bytes(1, at),
    )
    return all(amount(context) == amount(other) for amount in asked)


def parse_batches(text: str) -> list[int | str]:
    """`"1,4,max"` -> [1, 4, "max"]; `auto` stands for powers of two up to the largest that fits. Raises UserError."""
    parts = [part.strip().lower() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError("no batch given: write numbers, max or auto, as 1,4,max")
    return [part if part in WORDS else parse_size(part) for part in dict.fromkeys(parts)]


def largest_batch(shape: ModelSpec, names: Sequence[str], context: int, memory_bytes: int, dtype_bytes: int) -> int:
    """The largest power of two up to 1024 at which a useful hybrid of these kinds fits in memory: one layer of the kind
    with the largest cache, all others of the kind with the smallest. At least 1."""
    room = USABLE_MEMORY * memory_bytes
    hybrids = [lean_hybrid(shape, name, names, context, dtype_bytes) for name in names]
    fits = min(sequences_that_fit(shape, hybrid, context, dtype_bytes, room) for hybrid in hybrids)
    return 1 << max(0, min(LARGEST_BATCH, fits).bit_length() - 1)


def batch_limit(
    shape: ModelSpec, name: str, names: Sequence[str], context: int, memory_bytes: int, dtype_bytes: int
) -> int:
    """The largest batch up to 1024 of a model with a layer of this kind, all others being of the kind of `names` with
    the smallest cache, if that layer alone can be measured. At least 1."""
    hybrid = lean_hybrid(shape, name, (name, *names), context, dtype_bytes)
    fits = sequences_that_fit(shape, hybrid, context, dtype_bytes, FULL_MEMORY * memory_bytes)
    layer = shape.mixer(name)
    each = layer.cache_bytes(1, context, dtype_bytes) + layer.conv_state_bytes(1, dtype_bytes)
    room = USABLE_MEMORY * memory_bytes - layer.parameters() * dtype_bytes
    fits = min(fits, int(room // each)) if each else fits
    # Rounded down: what a larger model's last sequence costs is not known to the byte.
    return max(1, min(LARGEST_BATCH, fits - fits % 8 if fits > 64 else fits))


def plan(
    shape: ModelSpec,
    names: Sequence[str],
    contexts: Sequence[int],
    batches: Sequence[int | str],
    modes: Sequence[str],
    chunk: int,
    memory_bytes: int,
    dtype_bytes: int,
) -> list[list[Point]]:
    """The points of a sweep in groups: the shared blocks, then one kind after another in decode, then in prefill.

    Prefill is measured at its first chunk and at every context; a placement's prefill is summed over chunks in between.
    Contexts below the chunk are prompts that are read at once: their rows are of a chunk of that length. Contexts at
    which a kind does the same are measured once, at the first of them. A sweep that is cut lacks the last of a group:
    decode rows that lie between others, prefill rows that take longest.

    Raises:
        UserError: unknown kind or mode, a context beyond the model's.
    """
    for mode in modes:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
    for name in names:
        shape.mixer(name)
    for context in contexts:
        check_context(shape, context)

    def batches_at(name: str, context: int) -> list[int]:
        largest = batch_limit(shape, name, names, context, memory_bytes, dtype_bytes)
        sizes = {largest if batch == "max" else int(batch) for batch in batches if batch != "auto"}
        # What differs between contexts is the reading of keys, in proportion to the batch.
        auto = _powers(largest) if context == min(contexts) else _few_powers(largest)
        return sorted(sizes | (auto if "auto" in batches else set()))

    everywhere = sorted({batch for name in names for context in contexts for batch in batches_at(name, context)})
    chunk = min(chunk, shape.max_context)
    # (end, chunk): the first chunk may be a whole prompt.
    chunks = sorted({(chunk, chunk), *((context, min(chunk, context)) for context in contexts)})

    def prefill_batches(end: int) -> list[int]:
        # Without `auto` the smallest alone: larger ones only fill the device that a long chunk fills already.
        most = everywhere[-1] if end <= chunk else LATER if end <= LONG_CONTEXT else LONG
        largest = min(most, largest_batch(shape, names, end, memory_bytes, dtype_bytes))
        return [size for size in PREFILL_BATCHES if size <= largest] if "auto" in batches else everywhere[:1]

    few = products = everywhere
    if "auto" in batches:
        few = sorted(_few_powers(everywhere[-1]))
        products = sorted({*everywhere, *(batch for batch in THIRD_TILES if batch < everywhere[-1])})
    first: list[Point] = []
    for block in shared_blocks(shape):
        if "decode" in modes or block == "head":  # prefill ends with one head
            shared = few if block in ("embedding", "norm") else products  # those two take microseconds
            first += [Point(block, "decode", batch) for batch in shared]
        if "prefill" in modes and block != "head":
            sizes = sorted({size for _, size in chunks})
            first += [Point(block, "prefill", batch, chunk=size) for size in sizes for batch in prefill_batches(size)]
    groups = [first]
    kinds = list(dict.fromkeys(names))

    def points(name: str, mode: str, ends: Sequence[Place], batches: Callable[[int], list[int]]) -> list[Point]:
        """The points of a kind: every batch at every place, but those of the same work at the first of them."""
        spec = shape.mixer(name)
        found: dict[Place, set[int]] = {}
        for end, size in ends:
            same = [at for at in found if at[1] == size and same_work(spec, at[0], end, size)]
            found.setdefault(same[0] if same else (end, size), set()).update(batches(end))
        return [Point(name, mode, batch, *at) for at, sizes in found.items() for batch in sorted(sizes)]

    if "decode" in modes:
        for name in kinds:
            group = points(name, "decode", [(end, 0) for end in contexts], partial(batches_at, name))
            groups.append(_corners_first(group))
    if "prefill" in modes:
        for name in kinds:
            group = points(name, "prefill", chunks, prefill_batches)
            groups.append(sorted(group, key=lambda point: (point.batch * point.context, point.context)))
    return [group for group in groups if group]


def _corners_first(points: Sequence[Point]) -> list[Point]:
    """The least and the most context and batch first: what lies between can be interpolated."""
    contexts, batches = ({getattr(point, name) for point in points} for name in ("context", "batch"))

    def inner(point: Point) -> int:
        return (point.context not in (min(contexts), max(contexts))) + (point.batch not in (min(batches), max(batches)))

    return sorted(points, key=inner)


def _powers(largest: int) -> set[int]:
    """1, 2, 4, ..., from FIRST_STEP on their successors, and `largest` itself."""
    powers = [1 << power for power in range(largest.bit_length())]
    return {largest, *powers, *(power + 1 for power in powers if FIRST_STEP <= power < largest)}


def _few_powers(largest: int) -> set[int]:
    """1, and every other power of two from 2 on: one sequence has kernels of its own."""
    return {1, largest, *(1 << power for power in range(1, largest.bit_length(), 2))}
