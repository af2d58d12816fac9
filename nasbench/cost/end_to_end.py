"""Whole decode steps and whole prompts of many placements of one model: what calibrates the cost model and tests it.

Weights are random, speed does not depend on them: the mixers of a layer are made once for each name, and every
placement is put together from them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from nasbench.checkpoints.load import random_decoder
from nasbench.core.by_device import PREFILL_CHUNK, ByDevice
from nasbench.core.dtypes import dtype_name
from nasbench.core.errors import MachineError, NasbenchError
from nasbench.core.provenance import provenance
from nasbench.cost.calibration import CalibrationRow, add_calibration, read_calibration
from nasbench.cost.holdout import WholePoint, holdout_points, with_between
from nasbench.devices import DeviceInfo, detect
from nasbench.model.decoder import Decoder
from nasbench.model.shapes import ModelSpec
from nasbench.profiling.plan import largest_batch, same_work
from nasbench.runtime.memory import largest_batch as sequences_now
from nasbench.runtime.memory import ran_out
from nasbench.runtime.throughput import prefill_seconds, timed_decode
from nasbench.runtime.timing import summarise
from nasbench.spaces.placement import Placement, format_placement

PROMPT_TOKENS = ByDevice(cpu=2048, cuda=65536)
"""Tokens of all prompts of a calibration point together: half a second on a large GPU, seconds on a CPU."""
RANDOM = ByDevice(cpu=3, cuda=10)
"""Random placements that calibrate, in each mode."""
MOST_SEQUENCES = ByDevice(cpu=4, cuda=1 << 20)
"""Most sequences of a step that calibrates."""


class Decoders:
    """Decoders of random weights over one embedding and one set of MLPs, each layer's mixers made once per name."""

    def __init__(self, shape: ModelSpec, device: str, dtype: torch.dtype) -> None:
        self.shape = shape
        self._make = partial(random_decoder, shape, dtype=dtype, device=device)
        self._by_name: dict[str, Decoder] = {}

    def of(self, placement: Placement) -> Decoder:
        """The decoder of a placement."""
        for name in placement:
            if name not in self._by_name:
                made = self._make((name,) * self.shape.num_layers)
                first = next(iter(self._by_name.values()), made)
                self._by_name[name] = first.with_mixers(made.mixers, made.placement)
        mixers = [self._by_name[name].mixers[i] for i, name in enumerate(placement)]
        return next(iter(self._by_name.values())).with_mixers(mixers, placement)


class EndToEnd:
    """Measures placements of a model on a device. Raises MachineError, or torch's own error, for want of memory."""

    def __init__(self, shape: ModelSpec, device: str, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.decoders = Decoders(shape, device, dtype)

    def measure(self, point: WholePoint, seconds: float | None = None, chunk: int | None = None) -> CalibrationRow:
        """One decode step, or the reading of all prompts.

        Args:
            seconds: for the repeats; None for 0.3 of a step, 1 of a prompt.
            chunk: tokens of a prompt at a time; None for the device's.
        """
        decoder = self._decoder(point.placement)
        about = self.shape, point.placement, point.context, self.dtype.itemsize, self.device
        if point.batch > sequences_now(*about, loaded=True):
            raise MachineError(f"{point.batch} sequences of {point.context} tokens do not fit in the free memory")
        if point.mode == "decode":
            return self._row(point, 0, timed_decode(decoder, point.context, point.batch, seconds or 0.3)[1])
        chunk = chunk or PREFILL_CHUNK.of(self.device)
        with torch.inference_mode():
            cache = decoder.new_cache(point.batch, point.context)
            return self._row(point, chunk, prefill_seconds(decoder, cache, point.context, chunk, seconds or 1.0))

    def _decoder(self, placement: Placement) -> Decoder:
        decoder = self.decoders.of(placement)
        gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()
        return decoder

    def _row(self, point: WholePoint, chunk: int, seconds: list[float]) -> CalibrationRow:
        info, timing = detect(self.device), summarise([each * 1e3 for each in seconds])
        return CalibrationRow(
            device=info.slug, model=self.shape.name, dtype=dtype_name(self.dtype), mode=point.mode,
            placement=format_placement(point.placement), context=point.context, batch=point.batch, chunk=chunk,
            time_ms=timing.p50_us, p20_ms=timing.p20_us, p80_ms=timing.p80_us, repeats=timing.repeats,
            **provenance(info.slug, info.driver).cells("torch", "driver", "project", "measured_utc"),
        )  # fmt: skip


def measure_missing(
    whole: EndToEnd,
    points: Iterable[WholePoint],
    path: Path,
    log: Callable[[str], None],
    chunk: int | None = None,
    elsewhere: Sequence[CalibrationRow] = (),
    allows: Callable[[WholePoint], bool] = lambda point: True,
) -> int:
    """Adds the points that a file has not yet; one that does not fit is left out. Returns how many were measured.

    Args:
        elsewhere: rows that count as measured too.
        allows: whether there is time left for a point.
    """
    known = {(r.model, r.dtype, r.mode, r.placement, r.context, r.batch) for r in [*read_calibration(path), *elsewhere]}
    done = left = 0
    for point in points:
        name = format_placement(point.placement)
        cells = (point.mode, name, point.context, point.batch)
        if (whole.shape.name, dtype_name(whole.dtype), *cells) in known:
            continue
        if not allows(point):
            left += 1
            continue
        log(f"whole {point.mode} of {name}, context {point.context}, batch {point.batch}")
        try:
            add_calibration(path, [whole.measure(point, chunk=chunk)])
            done += 1
        except (NasbenchError, RuntimeError) as error:
            if not isinstance(error, NasbenchError) and not ran_out(error):
                raise
            log(f"left out: {error}")
    if left:
        log(f"left out for lack of time: {left} whole steps or prompts")
    return done


def calibration_points(
    shape: ModelSpec,
    names: Sequence[str],
    contexts: Sequence[int],
    info: DeviceInfo,
    dtype_bytes: int,
    profiled: Collection[int] = (),
    asked: int = 1,
) -> list[WholePoint]:
    """The whole prompts and steps that calibrate: all kinds by turns, and every kind alone, at the least and the most
    context and batch that fit; then random placements as the holdout has them, so that what the fit leaves of them is
    what it leaves of others. None is one that a search would choose. Prompts come first; any beginning of the prompts
    and of the steps covers all kinds.

    Args:
        profiled: batches of the profile's decode rows. A step beyond them calibrates nothing; () for no bound.
        asked: a batch that somebody cares for.
    """
    names = list(dict.fromkeys(names))
    most, tokens = MOST_SEQUENCES.of(info.kind), PROMPT_TOKENS.of(info.kind)
    low, high = (min(profiled), max(profiled)) if profiled else (1, most)
    first, last = contexts[0], contexts[-1]
    placements = [(tuple(names[i % len(names)] for i in range(shape.num_layers)), names[0])]
    placements += [((name,) * shape.num_layers, name) for name in names]
    found: list[tuple[int, WholePoint]] = []  # the lowest numbers first
    for placement, widest in placements:
        short, long = min(first, tokens), min(last, tokens)
        for rank, context, batch in ((0, short, 1), (1, short, max(1, tokens // first)), (3, long, 1)):
            found.append((rank, WholePoint("prefill", placement, context, batch)))
        for context in dict.fromkeys((first, last)):
            if context != first and same_work(shape.mixer(widest), first, last):
                continue
            fits = largest_batch(shape, (widest,), context, info.memory_bytes, dtype_bytes)
            largest = min(max(most, asked), fits)
            # A few sequences: what lies between the kernels shows where they are short.
            steps = [(4, 1), (5, largest), (6, min(asked, fits)), (8, min(4, largest) if context == first else 1)]
            for rank, size in steps:
                found.append((rank, WholePoint("decode", placement, context, max(low, min(high, size)))))
    places, count = with_between(contexts), 1 + RANDOM.of(info.kind)
    bounds = {"memory_bytes": info.memory_bytes, "dtype_bytes": dtype_bytes, "largest": min(most, high)}
    for rank, mode in ((2, "prefill"), (7, "decode")):
        drawn = holdout_points(shape, names, mode, places, count, prompt_tokens=tokens // 2, seed=1, **bounds)
        # The first one is the published placement.
        found += [(rank, point) for point in drawn[1:] if mode == "prefill" or point.batch >= low]
    return list(dict.fromkeys(point for _, point in sorted(found, key=lambda pair: pair[0])))
