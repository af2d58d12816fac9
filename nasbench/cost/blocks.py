"""The time of one block anywhere between its measured rows, and the command that measures what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from nasbench.core.errors import UserError
from nasbench.core.sizes import format_size
from nasbench.cost.table import Table, Time, blend
from nasbench.model.shapes import ModelSpec
from nasbench.profiling.plan import same_work
from nasbench.store import SIZE_COLUMNS, Row, block_cells, is_shared

_IDENTITY = ("block", "args", "variant", *SIZE_COLUMNS)
"""The columns of store.block_cells, in its order."""


class Blocks:
    """Times of one model's blocks on one device.

    Args:
        rows: of the device; those of other shapes and data types, or without a time, are left out.

    Attributes:
        chunks: sizes of prefill chunks that were measured.
    """

    def __init__(self, rows: Iterable[Row], shape: ModelSpec, dtype: str, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._known: dict[tuple[Any, ...], Time] = {}
        sizes = set()
        for row in rows:
            if row.dtype == dtype and row.status == "ok" and row.p50_us is not None:
                key = (*(getattr(row, column) for column in _IDENTITY), row.mode, row.chunk)
                self._tables.setdefault(key, Table(repeated=row.mode == "prefill")).add(row)
            if row.dtype == dtype and row.mode == "prefill":
                sizes.add(row.chunk)
        self.chunks = sorted(sizes)

    def time(self, name: str, mode: str, context: int, batch: int, extrapolate: bool, chunk: int = 0) -> Time:
        """The time of one block; shared ones have context 0. Raises UserError for a point that is not covered."""
        key = (name, mode, context, batch, extrapolate, chunk)
        if key not in self._known:
            self._known[key] = self._look_up(*key)
        return self._known[key]

    def of_chunk(self, name: str, begin: int, tokens: int, batch: int, chunk: int, extrapolate: bool) -> Time:
        """The time of one block for the `tokens` tokens of a prompt that follow position `begin`.

        A last, shorter chunk is its share of the whole one that would end where it ends. A prompt that is shorter than
        a chunk lies between the lengths that were measured at once, or is a share of the shortest.
        """

        def at(end: int, size: int) -> Time:
            return self.time(name, "prefill", 0 if is_shared(name) else end, batch, extrapolate, size)

        if begin == 0 and tokens < chunk:
            # A profile without a prefill has no chunk at all: the look-up below says what is missing.
            sizes = [size for size in self.chunks if size <= chunk] or [chunk]
            longer = next((size for size in sizes if size >= tokens), chunk)
            shorter = max((size for size in sizes if size <= tokens), default=0)
            with suppress(UserError):  # the sizes may be other blocks'
                if longer == tokens or not shorter:
                    return at(longer, longer).scaled(tokens / longer)
                return blend(at(shorter, shorter), at(longer, longer), (tokens - shorter) / (longer - shorter))
        whole = at(max(begin + tokens, chunk), chunk)
        return whole if tokens == chunk else whole.scaled(tokens / chunk)

    def head(self, batch: int, extrapolate: bool) -> Time:
        """The output matrix after a prompt, for at most as many sequences as it was measured with."""
        cells = block_cells(self.shape, "head")
        table = self._tables.get((*cells.values(), "decode", 0))
        largest = max(table.points[0]) if table and 0 in table.points else batch
        return self.time("head", "decode", 0, min(batch, largest), extrapolate)

    def command(self, mode: str, context: int, batch: int, name: str = "") -> str:
        """The command that measures a missing point."""
        blocks = f" --blocks {name}" if name and not is_shared(name) else ""
        contexts = f" --contexts {format_size(context)}" if context else ""
        modes = "decode" if mode == "decode" else "decode,prefill"
        model = self.shape.source or self.shape.name
        return (
            f"measure it there with `nasbench profile --model {model}{blocks}{contexts} --batches {batch} "
            f"--modes {modes} --dtype {self.dtype}`"
        )

    def _look_up(self, name: str, mode: str, context: int, batch: int, extrapolate: bool, chunk: int) -> Time:
        cells = block_cells(self.shape, name)
        table = self._tables.get((*cells.values(), mode, chunk))
        time = table.at(context, batch, extrapolate) if table else None
        if table and time is None and not is_shared(name):
            # A kind that does the same at a measured context takes the same time.
            spec = self.shape.mixer(name)
            equal = [at for at in sorted(table.points) if same_work(spec, at, context, chunk)]
            time = next(filter(None, (table.at(at, batch, extrapolate) for at in equal)), None)
        if time is None:
            title = f"{cells['block']}{cells['args'] and ' ' + cells['args']}"
            at = f"batch {batch}" if is_shared(name) else f"context {format_size(context)}, batch {batch}"
            known = f"measured are {table.measured()}" if table else "it is not measured at all"
            raise UserError(
                f"no {mode} time of block {title} of {self.shape.name} ({self.dtype}) on "
                f"{self.device or 'any device'} at {at}: {known}; {self.command(mode, context, batch, name)}"
            )
        return time
