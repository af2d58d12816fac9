"""Whole decode steps and whole prompts of many placements of one model: what calibrates the cost model and tests it.

Weights are random, speed does not depend on them: the mixers of a layer are made once for each name, and every
placement is put together from them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nasbench.checkpoints.load import random_decoder
from nasbench.core.by_device import PREFILL_CHUNK, ByDevice
from nasbench.core.dtypes import dtype_name
from nasbench.core.errors import MachineError, NasbenchError
from nasbench.core.provenance import provenance
from nasbench.cost.calibration import CalibrationRow, add_calibration, read_calibration
from nasbench.cost.holdout import WholePoint
from nasbench.devices import DeviceInfo, detect
from nasbench.model.decoder import Decoder
from nasbench.model.shapes import ModelSpec
from nasbench.profiling.plan import largest_batch
from nasbench.runtime.memory import free_bytes
from nasbench.runtime.roofline import Ceilings, measure_ceilings
from nasbench.runtime.throughput import measure, prefill_seconds
from nasbench.runtime.timing import summarise
from nasbench.spaces.placement import Placement, format_placement

PROMPT_TOKENS = ByDevice(cpu=2048, cuda=65536)
"""Tokens of all prompts of a calibration point together: seconds of work on a large GPU, or on a CPU."""
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
    """Measures placements of a model on a device.

    Raises MachineError where one does not fit in memory.
    """

    def __init__(self, shape: ModelSpec, device: str, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.decoders = Decoders(shape, device, dtype)
        self._ceilings: Ceilings | None = None

    def measure(self, point: WholePoint, seconds: float | None = None, chunk: int | None = None) -> CalibrationRow:
        """One decode step, or the reading of all prompts.

        Args:
            seconds: for the repeats; None for 0.5 of a step, 3 of a prompt.
            chunk: tokens of a prompt at a time; None for the device's.
        """
        if point.mode == "decode":
            return self._step(point, seconds or 0.5)
        return self._prompt(point, seconds or 3.0, chunk or PREFILL_CHUNK.of(self.device))

    def _step(self, point: WholePoint, seconds: float) -> CalibrationRow:
        decoder = self._decoder(point.placement)
        self._ceilings = self._ceilings or measure_ceilings(self.device, free_bytes(self.device), self.dtype)
        found = measure(
            self.shape, point.placement, context=point.context, batch=point.batch, decoder=decoder,
            prefill_context=None, seconds=seconds, ceilings=self._ceilings,
        )  # fmt: skip
        times = {"time_ms": found.step_ms, "p20_ms": found.step_p20_ms, "p80_ms": found.step_p80_ms}
        return self._row(point, 0, found.repeats, times)

    @torch.inference_mode()
    def _prompt(self, point: WholePoint, seconds: float, chunk: int) -> CalibrationRow:
        decoder = self._decoder(point.placement)
        try:
            cache = decoder.new_cache(point.batch, point.context)
            samples = prefill_seconds(decoder, cache, point.context, chunk, seconds)
        except torch.OutOfMemoryError:
            raise MachineError(
                f"{point.batch} prompts of {point.context} tokens do not fit in the memory of {self.device}"
            ) from None
        timing = summarise([sample * 1e3 for sample in samples])
        times = {"time_ms": timing.p50_us, "p20_ms": timing.p20_us, "p80_ms": timing.p80_us}
        return self._row(point, chunk, len(samples), times)

    def _decoder(self, placement: Placement) -> Decoder:
        decoder = self.decoders.of(placement)
        gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()
        return decoder

    def _row(self, point: WholePoint, chunk: int, repeats: int, times: dict[str, Any]) -> CalibrationRow:
        info = detect(self.device)
        return CalibrationRow(
            device=info.slug, model=self.shape.name, dtype=dtype_name(self.dtype), mode=point.mode,
            placement=format_placement(point.placement), context=point.context, batch=point.batch, chunk=chunk,
            repeats=repeats, **times,
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
        except (NasbenchError, torch.OutOfMemoryError) as error:
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
    """The whole prompts and steps that calibrate: every kind alone, and all by turns, at the least and the most context
    and batch that fit. Few, and none that a search would choose: those are for the holdout. Prompts come first, short
    ones before long ones: steps leave a profiler behind that slows launches down.

    Args:
        profiled: batches of the profile's decode rows. A step beyond them calibrates nothing; () for no bound.
        asked: a batch that somebody cares for.
    """
    names = list(dict.fromkeys(names))
    most, tokens = MOST_SEQUENCES.of(info.kind), PROMPT_TOKENS.of(info.kind)
    first, last = contexts[0], contexts[-1]
    placements = [((name,) * shape.num_layers, name) for name in names]
    placements.append((tuple(names[i % len(names)] for i in range(shape.num_layers)), names[0]))
    sizes = [(min(first, tokens), 1), (min(first, tokens), max(1, tokens // first)), (min(last, tokens), 1)]
    points = [WholePoint("prefill", placement, *size) for size in sizes for placement, _ in placements]
    for placement, widest in placements:
        for context in dict.fromkeys((first, last)):
            fits = largest_batch(shape, (widest,), context, info.memory_bytes, dtype_bytes)
            largest = min(max(most, asked), fits)
            # A few sequences: what lies between the kernels shows where they are short.
            few = (1, min(4, largest)) if context == first else ()
            wanted = (*few, min(asked, fits), largest) if asked > 1 else (*few, largest)
            low, high = (min(profiled), max(profiled)) if profiled else (1, largest)
            batches = dict.fromkeys(max(low, min(high, batch)) for batch in wanted)
            points += [WholePoint("decode", placement, context, batch) for batch in batches if batch <= largest]
    return list(dict.fromkeys(points))
