"""From a placement to its speed and cache: sums the measured rows of its blocks. Imports no torch.

    decode step = embedding + sum over layers (2 norms + mixer + MLP) + final norm + head
    prefill     = sum over chunks of the same without the head, + one head for the last token

Between measured points the time is piecewise linear in the context and in the batch: a step moves bytes and computes
products in proportion to both, and the constant part of each segment is what the launches and the weights cost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nasbench.backbone.shapes import ModelShape
from nasbench.config import format_size, profiles_dir
from nasbench.errors import UserError, unknown
from nasbench.spaces.placement import Placement, format_placement
from nasbench.store import SHARED_BLOCKS, SIZE_COLUMNS, Database, Row, block_cells, default_db_dir, read_db, replaces

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Cost:
    """What a placement costs. A speed is None where it was not asked for or has no rows.

    Attributes:
        placement: canonical string.
        context: tokens of each sequence, the new one included (decode), or of the prompt (prefill).
        decode_tok_s: new tokens per second of all sequences together.
        prefill_tok_s: prompt tokens per second of all sequences together.
        step_ms: time of one decode step.
        cache_bytes: keys, values and recurrent states, as arXiv 2508.15884 counts them.
        history_bytes: inputs of short convolutions, which that count leaves out.
        source: "measured", "estimated" if any row of the sum is, "none" without rows.
    """

    placement: str
    model: str
    device: str
    context: int
    batch: int
    decode_tok_s: float | None
    prefill_tok_s: float | None
    step_ms: float | None
    cache_bytes: int
    history_bytes: int
    source: str


@dataclass(frozen=True)
class Time:
    """Microseconds, and whether an estimated row is in them."""

    us: float
    estimated: bool = False


def _bracket(known: Sequence[int], at: int, extrapolate: bool) -> tuple[int, int, float] | None:
    """Neighbours of `at` in the sorted `known` and the weight of the second, or None where none are legal."""
    right = bisect_left(known, at)
    if right < len(known) and known[right] == at:
        return known[right], known[right], 0.0
    if not 0 < right < len(known):
        if not extrapolate or len(known) < 2:
            return None
        right = min(max(right, 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    return low, high, (at - low) / (high - low)


class Table:
    """Times of one block over context and batch."""

    def __init__(self) -> None:
        self.points: dict[int, dict[int, Time]] = {}

    def add(self, row: Row) -> None:
        """Keeps the faster one where two implementations measured the same point, measured before estimated."""
        assert row.p50_us is not None
        new = Time(row.p50_us, row.source == "estimated")
        old = self.points.setdefault(row.context, {}).get(row.batch)
        if old is None or (new.estimated, new.us) < (old.estimated, old.us):
            self.points[row.context][row.batch] = new

    def at(self, context: int, batch: int, extrapolate: bool) -> Time | None:
        """The time at a point, or None outside of what was measured.

        Batches first, because the largest batch that fits, and so is measured, differs between contexts.
        """
        for beyond in (False, True) if extrapolate else (False,):
            lines = {size: _along(self.points[size], batch, beyond) for size in sorted(self.points)}
            time = _along({size: line for size, line in lines.items() if line is not None}, context, beyond)
            if time:
                return time
        return None

    def measured(self) -> str:
        """The points, for an error message: `batch 1, 4 at context 1k; batch 1 at 4k`."""
        lines = {size: ", ".join(map(str, sorted(line))) for size, line in sorted(self.points.items())}
        by_batches: dict[str, list[str]] = {}
        for size, batches in lines.items():
            by_batches.setdefault(batches, []).append(format_size(size))
        return "; ".join(
            f"batch {batches}" + (f" at context {', '.join(sizes)}" if sizes != ["0"] else "")
            for batches, sizes in by_batches.items()
        )


def _along(line: dict[int, Time], at: int, extrapolate: bool) -> Time | None:
    bracket = _bracket(sorted(line), at, extrapolate)
    return _blend(line[bracket[0]], line[bracket[1]], bracket[2]) if bracket else None


def _blend(low: Time, high: Time, weight: float) -> Time:
    return Time(max(0.0, low.us + weight * (high.us - low.us)), low.estimated or high.estimated)


def check_context(shape: ModelShape, context: int) -> int:
    """Returns the context, or raises UserError when it is beyond the model's."""
    if not 1 <= context <= shape.max_context:
        raise UserError(f"context {context} is not of {shape.name}: choose 1 to {format_size(shape.max_context)}")
    return context


def dtype_bytes(dtype: str) -> int:
    """Bytes of a weight, activation, key or value. Raises UserError for an unknown name."""
    if dtype not in DTYPE_BYTES:
        raise unknown("dtype", dtype, DTYPE_BYTES)
    return DTYPE_BYTES[dtype]


class CostModel:
    """Costs of every placement of one model on one device from its profile rows.

    Args:
        rows: of one device; those of other shapes, data types or without a time are left out.
        shape: the model.
        dtype: fp32, bf16 or fp16.

    Raises:
        UserError: rows of several devices, or an unknown dtype.
    """

    def __init__(self, rows: Iterable[Row], shape: ModelShape, dtype: str) -> None:
        rows = list(rows)
        devices = sorted({row.device for row in rows})
        if len(devices) > 1:
            raise UserError(f"profile rows of several devices: {', '.join(devices)}")
        self.device = devices[0] if devices else ""
        self.shape = shape
        self.dtype = dtype
        self.dtype_bytes = dtype_bytes(dtype)
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._known: dict[tuple[Any, ...], Time] = {}
        for row in rows:
            if row.dtype == dtype and row.status == "ok" and row.p50_us is not None:
                cells = [getattr(row, column) for column in _IDENTITY]
                self._tables.setdefault((*cells, row.mode, row.chunk), Table()).add(row)
        self._prefills = {(row.batch, row.chunk) for row in rows if row.mode == "prefill" and row.dtype == dtype}
        self.chunks = sorted({chunk for _, chunk in self._prefills})

    def decode(self, placement: Placement, context: int, batch: int, extrapolate: bool = False) -> Cost:
        """One decode step of `batch` sequences at `context` tokens.

        Raises UserError naming the block and the missing point, and the command that measures it.
        """
        cost = self.cache(placement, context, batch)
        layers = [self._layer(name, "decode", context, batch, extrapolate) for name in placement]
        total = self._sum([self._frame("decode", batch, extrapolate), *layers])
        return replace(
            cost, decode_tok_s=batch * 1e6 / total.us, step_ms=total.us / 1e3, source=_source(total.estimated)
        )

    def prefill(
        self, placement: Placement, context: int, batch: int, extrapolate: bool = False, chunk: int | None = None
    ) -> Cost:
        """A prompt of `context` tokens in chunks of `chunk` (default: the largest that was measured).

        A last, shorter chunk costs its share of a whole one. More sequences than were measured together are read in
        turns, so their speed is that of the largest measured batch. Raises UserError as `decode` does.
        """
        cost = self.cache(placement, context, batch)
        size = chunk or (self.chunks[-1] if self.chunks else 0)
        if size not in self.chunks:
            legal = ", ".join(map(str, self.chunks)) or "none"
            raise UserError(
                f"no prefill rows of chunk {size or 'of any size'} for {self.dtype} on {self.device or 'any device'} "
                f"(measured: {legal}): {self._command('prefill', context, batch)}"
            )
        together = min(batch, max(row_batch for row_batch, row_chunk in self._prefills if row_chunk == size))
        times = [self._frame("prefill", together, extrapolate, size, context / size)]
        for name in dict.fromkeys(placement):
            times += [self._prefill_layer(name, context, together, size, extrapolate)] * placement.count(name)
        total = self._sum(times)
        return replace(cost, prefill_tok_s=together * context * 1e6 / total.us, source=_source(total.estimated))

    def cost(self, placement: Placement, context: int, batch: int, extrapolate: bool = False) -> Cost:
        """Decode and prefill together; prefill_tok_s is None where prefill was not measured."""
        cost = self.decode(placement, context, batch, extrapolate)
        try:
            prefill = self.prefill(placement, context, batch, extrapolate)
        except UserError:
            return cost
        source = _source("estimated" in (cost.source, prefill.source))
        return replace(cost, prefill_tok_s=prefill.prefill_tok_s, source=source)

    def cache(self, placement: Placement, context: int, batch: int) -> Cost:
        """The part that needs no rows: cache and history bytes. Raises UserError for a context beyond the model's."""
        check_context(self.shape, context)
        if batch < 1:
            raise UserError(f"batch {batch}: choose at least 1")
        return Cost(
            placement=format_placement(placement), model=self.shape.name, device=self.device, context=context,
            batch=batch, decode_tok_s=None, prefill_tok_s=None, step_ms=None,
            source="none",
            cache_bytes=self.shape.cache_bytes(placement, batch, context, self.dtype_bytes),
            history_bytes=self.shape.history_bytes(placement, batch, self.dtype_bytes),
        )  # fmt: skip

    def decode_many(self, placements: Sequence[Placement], context: int, batch: int, extrapolate: bool = False) -> Any:
        """Decode tokens/s of many placements of equal length: a float64 array, one look-up per distinct name."""
        if not placements:
            return np.empty(0)
        check_context(self.shape, context)
        names = sorted(set(chain.from_iterable(placements)))
        index = {name: i for i, name in enumerate(names)}
        flat = np.fromiter(map(index.__getitem__, chain.from_iterable(placements)), dtype=np.int32)
        layers = np.array([self._layer(name, "decode", context, batch, extrapolate).us for name in names])
        frame = self._frame("decode", batch, extrapolate).us
        return batch * 1e6 / (frame + layers[flat.reshape(len(placements), -1)].sum(axis=1))

    def layer_us(self, name: str, context: int, batch: int, extrapolate: bool = False) -> float:
        """Microseconds that one layer of this name takes of a decode step, its norms and MLP included."""
        return self._layer(name, "decode", context, batch, extrapolate).us

    def _layer(self, name: str, mode: str, context: int, batch: int, extrapolate: bool, chunk: int = 0) -> Time:
        """Two norms, the mixer and the MLP."""
        norm = self._block("norm", mode, 0, batch, extrapolate, chunk)
        mixer = self._block(name, mode, context, batch, extrapolate, chunk)
        return self._sum([norm, norm, mixer, self._block("mlp", mode, 0, batch, extrapolate, chunk)])

    def _prefill_layer(self, name: str, context: int, batch: int, chunk: int, extrapolate: bool) -> Time:
        ends = range(chunk, context + 1, chunk)
        times = [self._layer(name, "prefill", end, batch, extrapolate, chunk) for end in ends]
        rest = context % chunk
        if rest:
            # The shorter last chunk is taken from the whole one that would end where it ends.
            last = self._layer(name, "prefill", max(context, chunk), batch, extrapolate, chunk)
            times.append(Time(last.us * rest / chunk, last.estimated))
        return self._sum(times)

    def _frame(self, mode: str, batch: int, extrapolate: bool, chunk: int = 0, chunks: float = 1.0) -> Time:
        """What stands around the layers: embedding and final norm of every chunk, one head."""
        inner = [self._block(block, mode, 0, batch, extrapolate, chunk) for block in ("embedding", "norm")]
        head = self._block("head", "decode", 0, batch, extrapolate)
        return self._sum([head, *(Time(time.us * chunks, time.estimated) for time in inner)])

    def _block(self, name: str, mode: str, context: int, batch: int, extrapolate: bool, chunk: int = 0) -> Time:
        key = (name, mode, context, batch, extrapolate, chunk)
        if key not in self._known:
            self._known[key] = self._look_up(*key)
        return self._known[key]

    def _look_up(self, name: str, mode: str, context: int, batch: int, extrapolate: bool, chunk: int) -> Time:
        shared = name in SHARED_BLOCKS
        config = None if shared else self.shape.mixer(name)
        cells = block_cells(self.shape, name) if config is None else block_cells(self.shape, config.kind, config.args)
        table = self._tables.get((*cells.values(), mode, chunk))
        time = table.at(context, batch, extrapolate) if table else None
        if time is None:
            title = name if config is None else f"{config.kind}{config.args and ' ' + config.args}"
            at = f"batch {batch}" if shared else f"context {format_size(context)}, batch {batch}"
            known = f"measured are {table.measured()}" if table else "it is not measured at all"
            raise UserError(
                f"no {mode} time of block {title} of {self.shape.name} ({self.dtype}) on "
                f"{self.device or 'any device'} at {at}: {known}; {self._command(mode, context, batch, name)}"
            )
        return time

    def _command(self, mode: str, context: int, batch: int, name: str = "") -> str:
        blocks = f" --blocks {name}" if name and name not in SHARED_BLOCKS else ""
        contexts = f" --contexts {format_size(context)}" if context else ""
        modes = "decode" if mode == "decode" else "decode,prefill"
        return (
            f"measure it there with `nasbench profile --model {self.shape.name}{blocks}{contexts} --batches {batch} "
            f"--modes {modes} --dtype {self.dtype}`"
        )

    @staticmethod
    def _sum(times: Sequence[Time]) -> Time:
        return Time(sum(time.us for time in times), any(time.estimated for time in times))


_IDENTITY = ("block", "args", *SIZE_COLUMNS, "variant")
"""The columns of store.block_cells, in its order."""


def _source(estimated: bool) -> str:
    return "estimated" if estimated else "measured"


def _files(db: Path | None) -> dict[str, list[Path]]:
    """Database files by device; `db` is a folder or one file, None for the shipped ones and then the user's."""
    if db is not None and not Path(db).exists():
        raise UserError(f"no such profile folder or file: {db}")
    found: dict[str, list[Path]] = {}
    places = [Path(db)] if db is not None else list(dict.fromkeys((profiles_dir(), default_db_dir())))
    for place in places:
        for path in sorted(place.glob("*.csv")) if place.is_dir() else [place] if place.is_file() else []:
            found.setdefault(path.stem, []).append(path)
    return found


def profiled_devices(db: Path | None = None) -> list[str]:
    """Names of the devices that have a database."""
    return sorted(_files(db))


def find_profiles(device: str, db: Path | None = None) -> list[Row]:
    """The rows of a device.

    Args:
        db: a folder of databases or one file; None for the shipped databases with the user's own rows over them.

    Raises:
        UserError: no rows of this device (names those that have some), or a bad file.
    """
    files = _files(db)
    if db is not None and Path(db).is_file():
        return [row for row in read_db(Path(db)) if row.device == device] or _no_rows(device, db)
    if device not in files:
        _no_rows(device, db)
    table: dict[tuple[Any, ...], Row] = {}
    for path in files[device]:
        for row in Database(path).read():
            if row.key not in table or replaces(row, table[row.key]):
                table[row.key] = row
    return list(table.values())


def _no_rows(device: str, db: Path | None) -> list[Row]:
    known = profiled_devices(db)
    measure = "measure this machine with `nasbench profile --model MODEL`"
    if not known:
        raise UserError(f"no profile rows of device {device!r}, nor of any other: {measure}")
    raise UserError(f"{unknown('device', device, known)}; or {measure}")
