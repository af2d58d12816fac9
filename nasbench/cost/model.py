"""From a placement to its speed and cache: sums the measured rows of its blocks. Imports no torch.

    decode step = embedding + sum over layers (norms + mixer + FFN) + final norm + head
    prefill     = sum over chunks of the same without the head, + one head for the last token

On a GPU a prompt's kernels are launched one by one. The host runs ahead of the device, so that a chunk takes what is
longer, all of its kernels or all of their launches.

What a whole step costs beyond that sum is nasbench.cost.calibration's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from nasbench.core.dtypes import dtype_bytes
from nasbench.core.errors import UserError
from nasbench.cost.blocks import Blocks
from nasbench.cost.calibration import (
    BS1_OVERHEAD,
    LAUNCH,
    LAUNCH_SD,
    LEVEL_SD,
    OVERHEAD,
    SHARED,
    CalibrationRow,
    Features,
    calibrate,
)
from nasbench.cost.table import NOTHING, Time, total
from nasbench.devices import DEVICES, memory_bytes_of
from nasbench.model.shapes import MODELS, ModelSpec
from nasbench.model.spec import BlockSpec
from nasbench.profiling.plan import check_context
from nasbench.runtime.memory import USABLE, activation_bytes, sequences_that_fit
from nasbench.spaces.placement import Placement, format_placement, parse_placement
from nasbench.store import Row, ffn_names, is_shared


@dataclass(frozen=True)
class Cost:
    """What a placement costs. A speed without rows is None.

    Attributes:
        placement: canonical string.
        context: tokens of each sequence, the new one included (decode), or of the prompt (prefill).
        decode_tok_s: new tokens per second of all sequences together.
        prefill_tok_s: prompt tokens per second of all sequences together.
        step_ms: time of one decode step.
        cache_bytes: keys, values and recurrent states, as arXiv 2508.15884 counts them.
        conv_state_bytes: inputs of short convolutions, which that count leaves out.
        needed_bytes: all memory of a decode step: weights, caches, activations.
        fits: whether the device has that much; None where its memory is not known.
        source: "measured", "estimated" if any row of the sum is, "none" without rows.
        step_stderr_ms, prefill_stderr_tok_s: standard errors, from the scatter of the rows (of estimated ones, their
            error bars), the calibration's coefficients and what it leaves.
        calibration_rows: end-to-end measurements behind the calibration of the step; 0 is the sum of the rows as it is.
        j_per_token: energy of a decode step for each of its tokens, where the rows tell.
        stale: blocks whose rows other kernels than the installed ones made.
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
    conv_state_bytes: int
    needed_bytes: int
    fits: bool | None
    source: str
    step_stderr_ms: float | None = None
    prefill_stderr_tok_s: float | None = None
    calibration_rows: int = 0
    j_per_token: float | None = None
    stale: tuple[str, ...] = ()

    @property
    def step_interval_ms(self) -> tuple[float, float] | None:
        """90 % interval of the step."""
        if self.step_ms is None or self.step_stderr_ms is None:
            return None
        half = LEVEL_SD * self.step_stderr_ms
        return max(0.0, self.step_ms - half), self.step_ms + half


@dataclass(frozen=True)
class Parts:
    """A step or a prompt before calibration.

    Attributes:
        times: (feature, time) of every block by itself: blocks err independently of one another.
        layers: layers times chunks, what the calibration's constant counts.
        constant: which of its constants.
        stale: blocks with rows of other kernels than the installed ones.
        host_sd_us: what the launches of a prompt may take beyond the time of its chunks.
    """

    times: tuple[tuple[str, Time], ...]
    layers: int
    constant: str = OVERHEAD
    stale: tuple[str, ...] = ()
    host_sd_us: float = 0.0

    @property
    def features(self) -> Features:
        found: dict[str, float] = {self.constant: float(self.layers)}
        for feature, time in self.times:
            found[feature] = found.get(feature, 0.0) + time.us
        return found

    @property
    def estimated(self) -> bool:
        return any(time.estimated for _, time in self.times)

    @property
    def joules(self) -> float | None:
        return total(time for _, time in self.times).joules


class CostModel:
    """Costs of every placement of one model on one device from its profile rows.

    Args:
        rows: of one device; those of other shapes, data types or without a time are left out.
        shape: the model.
        dtype: fp32, bf16 or fp16.
        device: its name, where there are no rows.
        calibration: end-to-end measurements of the device, of this or other built-in models; of other data types they
            are left out.

    Raises:
        UserError: rows of several devices, or an unknown dtype.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        shape: ModelSpec,
        dtype: str,
        calibration: Sequence[CalibrationRow] = (),
        device: str = "",
    ) -> None:
        rows = list(rows)
        devices = sorted({row.device for row in rows})
        if len(devices) > 1:
            raise UserError(f"profile rows of several devices: {', '.join(devices)}")
        self.device = devices[0] if devices else device
        self.shape = shape
        self.dtype = dtype
        self.dtype_bytes = dtype_bytes(dtype)
        memory = memory_bytes_of(self.device) if self.device else None
        self.room_bytes = memory and memory * USABLE.of("cuda" if self.device in DEVICES else "cpu")
        self._activation_bytes = activation_bytes(shape, self.dtype_bytes)
        self._other_parameters = shape.parameters() - sum(mixer.parameters() for mixer in shape.mixers(shape.placement))
        self._bytes: dict[tuple[str, int, int], tuple[int, int, int]] = {}
        self._blocks = Blocks(rows, shape, dtype, self.device)
        self.chunks = self._blocks.chunks
        self._others = {shape.name: self}
        usable = [row for row in calibration if row.device == self.device and row.dtype == dtype]
        self.calibrated_by = {row.key: row for row in usable}
        for name in {row.model for row in usable} - {shape.name}:
            if name in MODELS:
                self._others[name] = CostModel(rows, MODELS[name], dtype)
        self._calibrate()

    def _calibrate(self) -> None:
        rows = self.calibrated_by.values()
        modes = ("decode", "prefill")
        self._calibrations = {mode: calibrate(rows, mode, self.shape.name, self._features_of) for mode in modes}

    def without(self, key: tuple[Any, ...]) -> CostModel:
        """The model if this measurement had not calibrated it; itself where it has not."""
        if key not in self.calibrated_by:
            return self
        other = copy(self)
        other.calibrated_by = {known: row for known, row in self.calibrated_by.items() if known != key}
        other._calibrate()
        return other

    def decode(self, placement: Placement, context: int, batch: int, extrapolate: bool = False) -> Cost:
        """One decode step of `batch` sequences at `context` tokens.

        Raises UserError naming the block and the missing point, and the command that measures it.
        """
        cost = self.cache(placement, context, batch)
        parts = self._decode_parts(placement, context, batch, extrapolate)
        us, stderr_us = self._predict(parts, "decode")
        return replace(
            cost,
            decode_tok_s=batch * 1e6 / us,
            step_ms=us / 1e3,
            source=_source(parts.estimated),
            step_stderr_ms=stderr_us / 1e3,
            calibration_rows=self._calibrations["decode"].rows,
            j_per_token=None if parts.joules is None else parts.joules / batch,
            stale=parts.stale,
        )

    def prefill(
        self, placement: Placement, context: int, batch: int, extrapolate: bool = False, chunk: int | None = None
    ) -> Cost:
        """A prompt of `context` tokens in chunks of `chunk` (default: the largest that was measured).

        A last, shorter chunk costs its share of a whole one, a short prompt what was measured of its length. More
        sequences than were measured together take the time of the largest measured batch in turns. Raises UserError as
        `decode` does.
        """
        cost = self.cache(placement, context, batch)
        size = chunk or (self.chunks[-1] if self.chunks else 0)
        if size not in self.chunks:
            legal = ", ".join(map(str, self.chunks)) or "none"
            raise UserError(
                f"no prefill rows of chunk {size or 'of any size'} for {self.dtype} on {self.device or 'any device'} "
                f"(measured: {legal}): {self._blocks.command('prefill', context, batch)}"
            )
        parts = self._prefill_parts(placement, context, batch, size, extrapolate)
        us, stderr_us = self._predict(parts, "prefill")
        tok_s = batch * context * 1e6 / us
        return replace(
            cost, prefill_tok_s=tok_s, source=_source(parts.estimated), prefill_stderr_tok_s=tok_s * stderr_us / us,
            stale=parts.stale,
        )  # fmt: skip

    def cost(self, placement: Placement, context: int, batch: int, extrapolate: bool = False) -> Cost:
        """Decode and prefill together; prefill_tok_s is None where prefill was not measured."""
        cost = self.decode(placement, context, batch, extrapolate)
        try:
            prefill = self.prefill(placement, context, batch, extrapolate)
        except UserError:
            return cost
        source = _source("estimated" in (cost.source, prefill.source))
        return replace(
            cost,
            prefill_tok_s=prefill.prefill_tok_s,
            prefill_stderr_tok_s=prefill.prefill_stderr_tok_s,
            source=source,
            stale=tuple(sorted({*cost.stale, *prefill.stale})),
        )

    def cache(self, placement: Placement, context: int, batch: int) -> Cost:
        """The part without rows: bytes, and whether they fit. Raises UserError for a context beyond the model's."""
        check_context(self.shape, context)
        if batch < 1:
            raise UserError(f"batch {batch}: choose at least 1")
        parts = [self._bytes_of(name, batch, context) for name in placement]
        parts.append(self._bytes_of("", batch, context))
        weights, cache, conv_state = map(sum, zip(*parts, strict=True))
        needed = weights + cache + conv_state + batch * self._activation_bytes
        return Cost(
            placement=format_placement(placement), model=self.shape.name, device=self.device, context=context,
            batch=batch, decode_tok_s=None, prefill_tok_s=None, step_ms=None, cache_bytes=cache,
            conv_state_bytes=conv_state, needed_bytes=needed,
            fits=None if self.room_bytes is None else needed <= self.room_bytes, source="none",
        )  # fmt: skip

    def largest_batch(self, placement: Placement, context: int) -> int | None:
        """Sequences that fit in the device's memory, 0 if not even one; None where its memory is not known."""
        if self.room_bytes is None:
            return None
        return sequences_that_fit(self.shape, placement, context, self.dtype_bytes, self.room_bytes)

    def _bytes_of(self, name: str, batch: int, context: int) -> tuple[int, int, int]:
        """(weights, cache, conv state) of a mixer; "" for everything else in the model."""
        key = (name, batch, context)
        if key not in self._bytes:
            blocks: list[BlockSpec] = [self.shape.mixer(name)] if name else [*self.shape.ffns()]
            width = self.dtype_bytes
            parameters = blocks[0].parameters() if name else self._other_parameters
            cache = sum(block.cache_bytes(batch, context, width) for block in blocks)
            conv_state = sum(block.conv_state_bytes(batch, width) for block in blocks)
            self._bytes[key] = parameters * width, cache, conv_state
        return self._bytes[key]

    def _shared_counts(self) -> Counter[str]:
        """How often each shared block but the head runs."""
        return Counter({"embedding": 1, "norm": self.shape.norms}) + Counter(ffn_names(self.shape))

    def _decode_parts(self, placement: Placement, context: int, batch: int, extrapolate: bool) -> Parts:
        counts = self._shared_counts() + Counter({"head": 1}) + Counter(placement)
        times = {}
        for name, count in counts.items():
            at = 0 if is_shared(name) else context
            times[name] = self._blocks.time(name, "decode", at, batch, extrapolate) * count
        found = tuple((self._feature(name), time) for name, time in times.items())
        return Parts(found, len(placement), BS1_OVERHEAD if batch == 1 else OVERHEAD, _stale(times))

    def _feature(self, name: str) -> str:
        return SHARED if is_shared(name) else self.shape.mixer(name).kind

    def _prefill_parts(self, placement: Placement, context: int, batch: int, chunk: int, extrapolate: bool) -> Parts:
        chunks, counts = ceil(context / chunk), self._shared_counts() + Counter(placement)
        sums = dict.fromkeys(counts, NOTHING)
        host, host_sd_us = NOTHING, 0.0
        for begin in range(0, context, chunk):
            tokens = min(chunk, context - begin)
            times = {
                name: self._blocks.of_chunk(name, begin, tokens, batch, chunk, extrapolate) * counts[name]
                for name in sums
            }
            every = total(times.values())
            host_sd_us += max(0.0, (1 + LAUNCH_SD) * every.host_us - max(every.us, every.host_us))
            if every.host_us > every.us:
                host += replace(every, us=every.host_us, sd_us=0.0)
            else:
                sums = {name: sums[name] + time for name, time in times.items()}
        found = [(self._feature(name), time) for name, time in sums.items() if time.us]
        found += [(LAUNCH, host)] if host.us else []
        head = self._blocks.head(batch, extrapolate)
        stale = _stale(sums | {"head": head})
        return Parts((*found, (SHARED, head)), len(placement) * chunks, stale=stale, host_sd_us=host_sd_us)

    def _predict(self, parts: Parts, mode: str) -> tuple[float, float]:
        """(microseconds, their standard error)."""
        fit = self._calibrations[mode]
        us, stderr_us = fit.apply(parts.features)
        scatter = {True: 0.0, False: 0.0}
        for feature, time in parts.times:
            # Estimates err together: what one device has more of than another, all of its blocks have.
            sd_us = fit.coefficient(feature) * time.sd_us
            scatter[time.estimated] += sd_us if time.estimated else sd_us**2
        return us, (stderr_us**2 + scatter[True] ** 2 + scatter[False] + parts.host_sd_us**2) ** 0.5

    def _features_of(self, row: CalibrationRow) -> Features | None:
        """The features of an end-to-end measurement; None where the rows do not cover it."""
        costs = self._others.get(row.model)
        if costs is None:
            return None
        try:
            placement = parse_placement(row.placement, costs.shape.num_layers)
            if row.mode == "decode":
                return costs._decode_parts(placement, row.context, row.batch, False).features
            return costs._prefill_parts(placement, row.context, row.batch, row.chunk, False).features
        except UserError:
            return None


def _stale(times: Mapping[str, Time]) -> tuple[str, ...]:
    return tuple(sorted(name for name, time in times.items() if time.stale))


def _source(estimated: bool) -> str:
    return "estimated" if estimated else "measured"
