"""Whole decode steps and whole prompts of many placements of one model: what calibrates the cost model and judges it.

Weights are random, speed does not depend on them: the mixers of a layer are made once for each name, and every
placement is put together from them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import torch

from nasbench import __version__
from nasbench.checkpoints.load import random_decoder
from nasbench.core.errors import MachineError
from nasbench.cost import CalibrationRow
from nasbench.devices import detect
from nasbench.model.decoder import Decoder
from nasbench.model.shapes import ModelSpec
from nasbench.runtime.clock import stopwatch
from nasbench.runtime.generate import default_chunk, prefill
from nasbench.runtime.graph import Stepper
from nasbench.runtime.memory import free_bytes, largest_batch, ran_out
from nasbench.runtime.roofline import Ceilings, measure_ceilings
from nasbench.runtime.throughput import DTYPE_NAMES, measure
from nasbench.spaces.placement import Placement, format_placement

PROMPT_RUNS = 3
"""Times that a prompt is read, unless its seconds are over."""
STEP = 0.005
"""The largest batch is found to this share of itself."""
NEARBY, BEYOND = 1.04, 1.25
"""The next trial over one that ran, and where nobody looks any more, over the predicted batch."""


class Decoders:
    """Decoders of random weights over one embedding and one set of MLPs, each layer's mixers made once per name."""

    def __init__(self, shape: ModelSpec, device: str, dtype: torch.dtype) -> None:
        self.shape = shape
        self._make = partial(random_decoder, shape, dtype=dtype, device=device)
        self._by_name: dict[str, Decoder] = {}

    def of(self, placement: Placement) -> Decoder:
        for name in placement:
            if name not in self._by_name:
                made = self._make((name,) * self.shape.num_layers)
                first = next(iter(self._by_name.values()), made)
                self._by_name[name] = first.with_mixers(made.mixers, made.placement)
        mixers = [self._by_name[name].mixers[i] for i, name in enumerate(placement)]
        return next(iter(self._by_name.values())).with_mixers(mixers, placement)


@dataclass(frozen=True)
class LargestBatch:
    """The largest batch that runs, beside the one that the memory model says.

    Attributes:
        error: predicted / largest - 1.
        free_bytes: before any cache, the weights being there.
        peak_bytes: of the allocator, with the largest batch.
    """

    placement: str
    model: str
    device: str
    dtype: str
    context: int
    predicted_batch: int
    largest_batch: int
    error: float
    free_bytes: int
    peak_bytes: int
    torch: str
    driver: str
    project: str
    measured_utc: str


class EndToEnd:
    """Measures placements of a model on a device.

    Raises MachineError where one does not fit in memory.
    """

    def __init__(self, shape: ModelSpec, device: str, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.decoders = Decoders(shape, device, dtype)
        self._ceilings: Ceilings | None = None

    def step(self, placement: Placement, context: int, batch: int, seconds: float = 0.5) -> CalibrationRow:
        """One decode step of `batch` sequences that look at `context` keys."""
        decoder = self._decoder(placement)
        self._ceilings = self._ceilings or measure_ceilings(self.device, free_bytes(self.device), self.dtype)
        found = measure(
            self.shape, placement, context=context, batch=batch, decoder=decoder, prefill_context=None,
            seconds=seconds, ceilings=self._ceilings,
        )  # fmt: skip
        times: dict[str, Any] = {"time_ms": found.step_ms, "p20_ms": found.step_p20_ms, "p80_ms": found.step_p80_ms}
        where: dict[str, Any] = {"context": context, "batch": batch, "chunk": 0, "repeats": found.repeats}
        return CalibrationRow(mode="decode", **self._cells(placement), **where, **times)

    @torch.inference_mode()
    def prompt(
        self, placement: Placement, context: int, batch: int, seconds: float = 3.0, chunk: int | None = None
    ) -> CalibrationRow:
        """The reading of `batch` prompts of `context` tokens in chunks, to the logits of the last tokens: the median of
        a few runs, fewer where they would take longer than `seconds` together."""
        decoder = self._decoder(placement)
        chunk = chunk or default_chunk(decoder.device)
        try:
            samples = self._read(decoder, context, batch, chunk, seconds)
        except torch.OutOfMemoryError:
            raise MachineError(
                f"{batch} prompts of {context} tokens do not fit in the memory of {self.device}"
            ) from None
        p20, p50, p80 = (float(value) * 1e3 for value in np.percentile(samples, [20, 50, 80]))
        where: dict[str, Any] = {"context": context, "batch": batch, "chunk": chunk, "repeats": len(samples)}
        times: dict[str, Any] = {"time_ms": p50, "p20_ms": p20, "p80_ms": p80}
        return CalibrationRow(mode="prefill", **self._cells(placement), **where, **times)

    def _read(self, decoder: Decoder, context: int, batch: int, chunk: int, seconds: float) -> list[float]:
        cache = decoder.new_cache(batch, context)
        tokens = torch.randint(0, self.shape.vocab_size, (batch, context), device=decoder.device)
        clock = stopwatch(decoder.device)
        prefill(decoder, tokens[:, :chunk], cache, chunk)  # libraries choose their kernels on first sight
        samples: list[float] = []
        while len(samples) < PROMPT_RUNS and (not samples or sum(samples) + samples[-1] <= seconds):
            cache.reset()
            samples.append(clock(lambda: prefill(decoder, tokens, cache, chunk)))
        return samples

    def largest_batch(self, placement: Placement, context: int) -> LargestBatch:
        """The largest batch that decodes. Raises MachineError where not one sequence does."""
        decoder = self._decoder(placement)
        free = free_bytes(self.device)
        predicted = largest_batch(self.shape, placement, context, self.dtype.itemsize, self.device, loaded=True)
        peaks: dict[int, int] = {}

        def runs(batch: int) -> bool:
            peak = _peak_of_a_step(decoder, context, batch)
            if peak is not None:
                peaks[batch] = peak
            return peak is not None

        largest = find_largest(runs, predicted)
        if not largest:
            raise MachineError(f"not one sequence of {context} tokens fits in the memory of {self.device}")
        cells = self._cells(placement)
        return LargestBatch(
            context=context, predicted_batch=predicted, largest_batch=largest, error=predicted / largest - 1,
            free_bytes=free, peak_bytes=peaks[largest], **cells,
        )  # fmt: skip

    def _decoder(self, placement: Placement) -> Decoder:
        decoder = self.decoders.of(placement)
        gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()
        return decoder

    def _cells(self, placement: Placement) -> dict[str, Any]:
        info = detect(self.device)
        return {
            "device": info.slug,
            "model": self.shape.name,
            "dtype": DTYPE_NAMES[self.dtype],
            "placement": format_placement(placement),
            "torch": torch.__version__,
            "driver": info.driver,
            "project": __version__,
            "measured_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


def _peak_of_a_step(decoder: Decoder, context: int, batch: int) -> int | None:
    """Most bytes held while a batch decodes a token; None where it does not fit."""
    cuda = decoder.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        stepper = Stepper(decoder, decoder.new_cache(batch, context))
        with torch.inference_mode():
            stepper.step(torch.zeros(batch, dtype=torch.int64, device=decoder.device)).argmax(-1).tolist()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, MachineError) as error:
        if not ran_out(error) and not isinstance(error, MachineError):
            raise
        return None
    return torch.cuda.max_memory_allocated() if cuda else 0


def find_largest(runs: Callable[[int], bool], predicted: int) -> int:
    """The largest batch that runs, to STEP of itself; 0 for none. Looks near the predicted one: trials cost time."""
    fits, fails = 0, 0
    trial = max(1, predicted)
    while not fails or fails - fits > max(1, int(STEP * fits)):
        if runs(trial):
            fits = trial
        else:
            fails = trial
        if fails:
            trial = (fits + fails) // 2
        elif fits > BEYOND * predicted:
            break
        else:
            trial = max(fits + 1, int(NEARBY * fits))
    return fits
