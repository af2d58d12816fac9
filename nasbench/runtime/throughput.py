"""End-to-end speed of a whole decoder: decode from a full cache, chunked prefill, share of the roofline.

Decode: the cache is filled with random data as if `context - 1` tokens had been read; a step reads the next token, so
its attention covers exactly `context` keys. The step is repeated at that place with the token it just produced, through
all layers, the output matrix and the argmax; on a GPU as one replayed CUDA graph.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import torch

from nasbench.checkpoints.load import random_decoder
from nasbench.core.by_device import PREFILL_CHUNK
from nasbench.core.dtypes import dtype_name
from nasbench.core.errors import MachineError, UserError
from nasbench.core.provenance import provenance
from nasbench.devices import detect
from nasbench.model import fused
from nasbench.model.decoder import Decoder, DecoderCache
from nasbench.model.shapes import ModelSpec
from nasbench.runtime.generate import prefill
from nasbench.runtime.graph import capture
from nasbench.runtime.memory import free_bytes, largest_batch, peak_bytes, ran_out
from nasbench.runtime.roofline import Ceilings, decode_floor, measure_ceilings
from nasbench.runtime.timing import stopwatch, summarise, synchronise
from nasbench.spaces.placement import Placement, format_placement

SMALLEST_CHUNK = 64
PROMPT_RUNS = 3
"""Times that a prompt is read, unless its seconds are over."""
MOST_SEQUENCES = 4096
"""`max` stops here: beyond it a batch gains nothing and the logits alone fill gigabytes."""


@dataclass(frozen=True)
class ThroughputResult:
    """One end-to-end measurement. Prefill fields are None where it was left out.

    Attributes:
        context: keys that the measured step attends to.
        decode_tok_s: new tokens per second of all sequences, from the median step.
        prefill_tok_s: prompt tokens per second of all sequences.
        prefill_context, prefill_chunk: prompt length of the prefill measurement, and how much is read at a time.
        peak_bytes: most memory held at once: of the GPU's allocator, or of the whole process on a CPU.
        cache_bytes: keys, values and recurrent states as allocated.
        floor_ms: least time of a step at the rates measured in this run (nasbench.runtime.roofline); `floor_parts_ms`
            of each part.
        floor_fraction: floor_ms / step_ms, 1 being the device's limit.
        read_gb_s, copy_gb_s, in_place_gb_s: what the memory did in this run, 10^9 bytes per second.
        matmul_tflop_s: what a large matrix product did in this run.
        launches: GPU kernels of one step; None where they cannot be counted.
        predicted_batch: for batch "max", what the memory model said; `batch` is what was confirmed.
    """

    placement: str
    model: str
    device: str
    dtype: str
    context: int
    batch: int
    decode_tok_s: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    repeats: int
    prefill_tok_s: float | None
    prefill_s: float | None
    prefill_context: int | None
    prefill_chunk: int | None
    peak_bytes: int
    cache_bytes: int
    floor_ms: float
    floor_parts_ms: dict[str, float]
    floor_fraction: float
    read_gb_s: float
    copy_gb_s: float
    in_place_gb_s: float
    matmul_tflop_s: float
    launches: int | None
    predicted_batch: int | None
    threads: int
    torch: str
    driver: str
    nasbench: str
    measured_utc: str
    source: str = "measured"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    shape: ModelSpec,
    placement: Placement,
    *,
    context: int,
    batch: int | Literal["max"],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    decoder: Decoder | None = None,
    prefill_context: int | None = 0,
    chunk: int | None = None,
    seconds: float = 3.0,
    ceilings: Ceilings | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> ThroughputResult:
    """Measures a placement of a model end to end, with random weights unless a decoder is given.

    Args:
        batch: sequences, or "max" for the most that fit: as the memory model says, confirmed by running them.
        decoder: of this shape and placement, on its device and in its dtype.
        prefill_context: prompt tokens of the prefill measurement; 0 = as the context; None leaves it out.
        chunk: prefill tokens of a sequence at a time; default 512 on a CPU, 8192 on a GPU.
        seconds: time for the decode repeats.
        ceilings: of the device where they have just been measured; None to measure them.

    Raises:
        UserError: a context beyond the model's, a batch below 1.
        MachineError: it does not fit in memory.
    """
    device, dtype = (torch.device(device), dtype) if decoder is None else (decoder.device, decoder.dtype)
    _check(shape, context, batch, prefill_context)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    gc.collect()
    ceilings = ceilings or measure_ceilings(device, free_bytes(device), dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    fits = largest_batch(shape, placement, context, dtype.itemsize, device, loaded=decoder is not None)
    if fits < (1 if batch == "max" else batch):
        raise MachineError(
            f"{'not one sequence' if batch == 'max' else f'batch {batch}'} of {context} tokens fits: "
            f"{free_bytes(device) / 1e9:.1f} GB of {device} are free; the largest batch is {fits}"
        )
    decoder = decoder or random_decoder(shape, placement, dtype=dtype, device=device)
    most = min(fits, MOST_SEQUENCES)
    cache, steps_s, launches = _decode(
        decoder, context, most if batch == "max" else batch, seconds, batch == "max", log
    )
    steps = summarise([step_s * 1e6 for step_s in steps_s]).scaled(1e-3)
    prompt = None if prefill_context is None else prefill_context or context
    prefill_s, used_chunk = None, None
    if prompt is not None:
        prefill_s, used_chunk = _prefill(decoder, cache, prompt, chunk or PREFILL_CHUNK.of(device), log)
    info = detect(str(device))
    stamp = provenance(info.slug, info.driver)
    parts = {
        part.name: part.ms for part in decode_floor(shape, placement, cache.batch, context, dtype.itemsize, ceilings)
    }
    floor_ms = sum(parts.values())
    return ThroughputResult(
        placement=format_placement(placement),
        model=shape.name,
        device=info.slug,
        dtype=dtype_name(dtype),
        context=context,
        batch=cache.batch,
        decode_tok_s=cache.batch / steps.p50_us * 1e3,
        step_ms=steps.p50_us,
        step_p20_ms=steps.p20_us,
        step_p80_ms=steps.p80_us,
        repeats=len(steps_s),
        prefill_tok_s=cache.batch * prompt / prefill_s if prompt and prefill_s else None,
        prefill_s=prefill_s,
        prefill_context=prompt,
        prefill_chunk=used_chunk,
        peak_bytes=peak_bytes(device),
        cache_bytes=cache.nbytes,
        floor_ms=floor_ms,
        floor_parts_ms=parts,
        floor_fraction=floor_ms / steps.p50_us,
        **asdict(ceilings),
        launches=launches,
        predicted_batch=most if batch == "max" else None,
        **stamp.cells("threads", "torch", "driver", "measured_utc"),
        nasbench=stamp.project,
    )


def measure_prefill(
    decoder: Decoder, context: int, batch: int, chunk: int | None = None, log: Callable[[str], None] = lambda _: None
) -> tuple[float, int]:
    """(seconds to read prompts of `context` tokens and score their last, tokens of a sequence at a time), on random
    tokens and without a decode; a chunk that does not fit is halved. Raises UserError, and MachineError for memory."""
    _check(decoder.shape, context, batch, None)
    try:
        cache = decoder.new_cache(batch, context)
    except torch.OutOfMemoryError:
        raise MachineError(f"the cache of {batch} sequences of {context} tokens does not fit") from None
    return _prefill(decoder, cache, context, chunk or PREFILL_CHUNK.of(decoder.device), log)


def _check(shape: ModelSpec, context: int, batch: int | str, prefill_context: int | None) -> None:
    for value in (context, prefill_context or 1):
        if not 1 <= value <= shape.max_context:
            raise UserError(f"context {value} is beyond {shape.name}'s: choose 1 to {shape.max_context}")
    if prefill_context and prefill_context > context:
        raise UserError(f"prefill context {prefill_context} is beyond the measured context {context}")
    if batch != "max" and (not isinstance(batch, int) or batch < 1):
        raise UserError(f"bad batch {batch!r}: write a positive whole number or max")


def _decode(
    decoder: Decoder, context: int, batch: int, seconds: float, shrink: bool, log: Callable[[str], None]
) -> tuple[DecoderCache, list[float], int | None]:
    """(cache, seconds of each repeat, kernels of a step). With `shrink`, a batch that does not fit loses a tenth."""
    while True:
        try:
            log(f"decode: {batch} sequences of {context} tokens")
            return timed_decode(decoder, context, batch, seconds, count=True)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            reason = MachineError(f"{batch} sequences of {context} tokens do not fit in the memory of {decoder.device}")
            if not shrink or batch == 1:
                raise reason from None
        # Outside of the handler: the exception holds the frames, and the frames hold the tensors.
        gc.collect()
        if decoder.device.type == "cuda":
            torch.cuda.empty_cache()
        batch = max(1, batch * 9 // 10)


@torch.inference_mode()
def timed_decode(
    decoder: Decoder, context: int, batch: int, seconds: float, count: bool = False
) -> tuple[DecoderCache, list[float], int | None]:
    """(cache, seconds of each repeat, with `count` the kernels of a step) of steps whose last key is the `context`th.
    Raises what torch raises when the memory is not enough."""
    device = decoder.device
    cache = decoder.new_cache(batch, context)
    cache.fill_random(context - 1, torch.Generator(device).manual_seed(0))
    decoder.prepare(context)
    tokens = torch.randint(0, decoder.shape.vocab_size, (batch,), device=device)

    positions = torch.full_like(tokens, context - 1)

    def step() -> None:
        cache.length = context - 1
        # A graph reads positions from the device, as generation does.
        logits = decoder.step_at(tokens, positions, cache) if device.type == "cuda" else decoder.step(tokens, cache)
        tokens.copy_(fused.most_likely(logits))

    step()
    launches = _count_kernels(step, device) if count else None
    work = capture(step).replay if device.type == "cuda" else step
    clock = stopwatch(device)
    warm_s = min(clock(work) for _ in range(2))
    samples = [clock(work) for _ in range(min(200, max(7, int(seconds / max(warm_s, 1e-9)))))]
    cache.length = context
    return cache, samples, launches


def _count_kernels(step: Callable[[], None], device: torch.device) -> int | None:
    """GPU kernels that one step launches; None on a CPU, and where the driver lets nobody count."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        synchronise(device)
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events()) or None


def _prefill(
    decoder: Decoder, cache: DecoderCache, prompt: int, chunk: int, log: Callable[[str], None]
) -> tuple[float, int]:
    """(seconds, chunk): a chunk whose activations do not fit beside the cache is halved."""
    while True:
        log(f"prefill: {cache.batch} sequences of {prompt} tokens, {chunk} at a time")
        try:
            return median(prefill_seconds(decoder, cache, prompt, chunk)), chunk
        except torch.OutOfMemoryError:
            if chunk <= SMALLEST_CHUNK:
                raise MachineError(
                    f"prefill of {cache.batch} sequences does not fit beside their cache, even in chunks of {chunk}: "
                    "leave it out or choose a smaller batch"
                ) from None
        gc.collect()
        torch.cuda.empty_cache()
        chunk //= 2


@torch.inference_mode()
def prefill_seconds(
    decoder: Decoder, cache: DecoderCache, prompt: int, chunk: int, seconds: float = 10.0
) -> list[float]:
    """Seconds of each of up to three readings of a prompt of all sequences, its last token scored; fewer readings where
    they would take longer than `seconds` together."""
    tokens = torch.randint(0, decoder.shape.vocab_size, (cache.batch, prompt), device=decoder.device)
    clock = stopwatch(decoder.device)
    cache.reset()
    prefill(decoder, tokens[:, :chunk], cache, chunk)  # warm-up at the size of the chunks
    samples: list[float] = []
    while len(samples) < PROMPT_RUNS and (not samples or sum(samples) + samples[-1] <= seconds):
        cache.reset()
        samples.append(clock(lambda: prefill(decoder, tokens, cache, chunk)))
    return samples
