"""The work that a row times: several instances of a block, called one after another on random data.

On a GPU each block runs as the engine runs it between its kernels (nasbench.profiling.fused_calls).

In a model every layer has weights and a cache of its own, so each finds the last-level cache full of its predecessors'.
One instance called again and again would find its own there. A workload therefore goes round instances that together
are several times larger than the last-level cache, and calls the very modules that the decoder is made of.

Small blocks (norm, embedding) stand between large ones, whose weights have pushed the processor's code and data out of
its inner caches: on a CPU a norm takes three times as long there as in a loop of norms. Their workloads have an
`evict` that runs, untimed, before each call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nasbench.core.by_device import ByDevice
from nasbench.model import fused
from nasbench.model.block import Chunk, MixerCache, Step
from nasbench.model.decoder import Decoder, GatedMLP
from nasbench.model.shapes import ModelSpec
from nasbench.profiling import fused_calls
from nasbench.profiling.amounts import Amounts, amounts
from nasbench.profiling.plan import Point

FEWEST, MOST = 4, 64
"""Instances that a workload goes round, unless memory allows fewer."""
SMALL = ByDevice(cpu=16, cuda=64)
"""Calls of a small block in one timed run; on a GPU enough to hide the launch of the graph."""
COLD = 8
"""Size of all instances over that of the last-level cache: at 2, caches that do not evict strictly in turn still held
a part of them, and A at batch 4 and 2k came out a fifth too fast."""
EVICTED_BYTES = 16 << 20
"""What passes through the caches between two small blocks: about the weights of a layer."""
MOST_PREFILL = 4
"""Instances of a prefill workload, whose time is arithmetic, not the fetching of weights ..."""
LONG_PREFILL = 16384
"""... and half of them where its chunks have as many tokens together: they take tens of milliseconds each."""


@dataclass(frozen=True)
class Bench:
    """Where workloads run.

    Attributes:
        llc_bytes: last-level cache that instances must not fit in.
        memory_bytes: most that the instances of one workload may take.
    """

    shape: ModelSpec
    device: str
    dtype: torch.dtype
    llc_bytes: int
    memory_bytes: int
    pool: dict[str, list[Any]] = field(default_factory=dict)
    """Modules with weights that the points of a group share; `pool.clear()` frees them."""


@dataclass(frozen=True)
class Workload:
    """Each of `calls` does the block's work once, on an instance of its own; without calls the work is a part of other
    blocks' calls, and `reason` says so.

    Attributes:
        evict: untimed, before each call; None where the calls evict one another.
        moved_bytes: least bytes that one instance reads and writes.
        flops: floating-point operations of one instance.
        cache_bytes, conv_state_bytes: what the allocator gave to one instance's cache; None without a cache.
    """

    calls: Sequence[Callable[[], object]]
    moved_bytes: int
    flops: int
    cache_bytes: int | None = None
    cache_formula_bytes: int | None = None
    conv_state_bytes: int | None = None
    evict: Callable[[], object] | None = None
    reason: str = ""


def build(bench: Bench, point: Point) -> Workload:
    """The workload of a point; raises what torch raises when the memory is not enough."""
    return _SHARED[point.block](bench, point) if point.shared else _mixer(bench, point)


def _count(bench: Bench, point: Point, instance_bytes: int) -> int:
    """How many instances a workload goes round. Raises MemoryError where not even one fits: a system that overcommits
    would otherwise kill the process instead of refusing."""
    if instance_bytes > bench.memory_bytes:
        raise MemoryError(f"one layer needs {instance_bytes} bytes, usable are {bench.memory_bytes}")
    wanted = max(FEWEST, min(most_instances(point), -(-COLD * bench.llc_bytes // max(1, instance_bytes))))
    return min(wanted, most_instances(point), bench.memory_bytes // max(1, instance_bytes))


def most_instances(point: Point) -> int:
    """Instances that the workload of a point goes round at most."""
    if point.mode == "decode":
        return MOST
    return MOST_PREFILL if point.batch * point.chunk < LONG_PREFILL else MOST_PREFILL // 2


def _instances(bench: Bench, name: str, make: Callable[[], nn.Module], count: int) -> list[Any]:
    """`count` modules that share no memory, of random weights, those that start as zeros included."""
    modules = bench.pool.setdefault(name, [])
    if not modules:
        with torch.device(bench.device):
            module = make().to(dtype=bench.dtype).requires_grad_(False)
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
        modules.append(module)
    modules.extend(copy.deepcopy(modules[0]) for _ in range(count - len(modules)))
    return modules[:count]


def _amounts(bench: Bench, point: Point) -> Amounts:
    return amounts(bench.shape, point, bench.dtype.itemsize)


def _activations(bench: Bench, point: Point, size: int) -> Tensor:
    return torch.randn(point.batch, point.chunk or 1, size, device=bench.device, dtype=bench.dtype)


def _evict(bench: Bench) -> Callable[[], object] | None:
    """Reads a buffer with all threads. Not on a GPU: replayed graphs run no code of the host."""
    if bench.device != "cpu":
        return None
    return torch.ones(EVICTED_BYTES // 4).sum


def _layerless(shape: ModelSpec) -> Decoder:
    """A decoder without layers: embedding, rotary tables, final norm and head."""
    return Decoder(replace(shape, num_layers=0, published_placement=""), ())


def _places(bench: Bench) -> Decoder:
    """A decoder of one word, for its rotary tables alone."""
    return _instances(bench, "places", partial(_layerless, replace(bench.shape, vocab_size=1)), 1)[0]


def _fused(x: Tensor, point: Point) -> bool:
    """Whether the engine would run this point, a decode step, by its fused step."""
    return point.mode == "decode" and fused.usable(x)


def _norm_of(bench: Bench) -> nn.RMSNorm:
    """A norm that stands before a block: its weight is too small to matter to the caches."""
    size, eps = bench.shape.hidden_size, bench.shape.rms_eps
    return _instances(bench, "norm before", partial(nn.RMSNorm, size, eps), 1)[0]


def _positions(bench: Bench, point: Point) -> Tensor:
    return torch.full((point.batch,), point.context - 1, device=bench.device)


def _step(bench: Bench, decoder: Decoder, point: Point) -> Step:
    chunk = decoder.chunk(point.context - 1, 1)
    positions = _positions(bench, point)
    rows = (point.batch, 1, chunk.cos.shape[-1])
    return Step(positions, point.context, True, chunk.cos.expand(rows), chunk.sin.expand(rows))


def _caches(bench: Bench, mixers: list[Any], point: Point) -> list[MixerCache]:
    """A cache per mixer, full to the context. One is filled with random numbers, the others copy it: faster."""
    size = {"device": bench.device, "dtype": bench.dtype}
    caches = [mixer.new_cache(point.batch, point.context, **size) for mixer in mixers]
    caches[0].fill_random()
    for cache in caches[1:]:
        for ours, first in ((cache.state, caches[0].state), (cache.history, caches[0].history)):
            for name, tensor in ours.items():
                tensor.copy_(first[name])
    return caches


def _mixer(bench: Bench, point: Point) -> Workload:
    config = bench.shape.mixer(point.block)
    width = bench.dtype.itemsize
    formula = config.cache_bytes(point.batch, point.context, width)
    count = _count(bench, point, config.parameters() * width + formula)
    mixers = _instances(bench, point.block, config.build, count)
    caches = _caches(bench, mixers, point)
    decoder = _places(bench)
    x = _activations(bench, point, bench.shape.hidden_size)
    where: Step | Chunk
    calls: list[Callable[[], object]]
    if _fused(x, point):
        where, norm = fused_calls.step_tables(decoder, _positions(bench, point), point.context), _norm_of(bench)
        calls = [
            partial(fused_calls.mixer_call, mixer, norm, x[:, 0].clone(), where, cache)
            for mixer, cache in zip(mixers, caches, strict=True)
        ]
    elif point.mode == "decode":
        where = _step(bench, decoder, point)
        calls = [partial(mixer.step, x, where, cache) for mixer, cache in zip(mixers, caches, strict=True)]
    else:
        where = decoder.chunk(point.context - point.chunk, point.chunk)
        calls = [partial(mixer, x, where, cache) for mixer, cache in zip(mixers, caches, strict=True)]
    return Workload(calls, *_amounts(bench, point), caches[0].nbytes, formula, caches[0].history_nbytes)


def _mlp(bench: Bench, point: Point) -> Workload:
    nbytes = bench.shape.mlp_parameters() * bench.dtype.itemsize
    count = _count(bench, point, nbytes)
    x = _activations(bench, point, bench.shape.hidden_size)
    mlps = _instances(bench, "mlp", partial(GatedMLP, bench.shape), count)
    calls: list[Callable[[], object]]
    if _fused(x, point):
        norm = _norm_of(bench)
        calls = [partial(fused_calls.mlp_call, mlp, norm, x[:, 0].clone()) for mlp in mlps]
    elif fused.usable(x):
        calls = [partial(fused_calls.mlp_chunk_call, mlp, x) for mlp in mlps]
    else:
        calls = [partial(mlp, x) for mlp in mlps]
    return Workload(calls, *_amounts(bench, point))


def _small(bench: Bench) -> int:
    return SMALL.of(bench.device)


def _norm(bench: Bench, point: Point) -> Workload:
    """Residual addition and RMSNorm, twice in every layer."""
    size = bench.shape.hidden_size
    x, y = (_activations(bench, point, size) for _ in range(2))
    if _fused(x, point) and point.batch == 1:
        return Workload([], *_amounts(bench, point), reason=fused_calls.NO_CALL)
    norms = _instances(bench, "norm", partial(nn.RMSNorm, size, bench.shape.rms_eps), _small(bench))

    def call(norm: nn.Module) -> Tensor:
        return norm(x + y)

    calls: list[Callable[[], object]]
    if fused.usable(x):
        calls = [partial(fused_calls.norm_call, norm, x, y) for norm in norms]
    else:
        calls = [partial(call, norm) for norm in norms]
    return Workload(calls, *_amounts(bench, point), evict=_evict(bench))


def _embedding(bench: Bench, point: Point) -> Workload:
    """The look-up and, in a decode step, the rotary tables that all layers share."""
    (decoder,) = _instances(bench, "decoder", partial(_layerless, bench.shape), 1)
    tokens = torch.randint(bench.shape.vocab_size, (_small(bench), point.batch, point.chunk or 1), device=bench.device)
    where = replace(point, context=1)
    calls: list[Callable[[], object]]
    if _fused(decoder.head_weight, point):
        positions = _positions(bench, where)
        calls = [partial(fused_calls.embedding_call, decoder, ids[:, 0], positions, 256) for ids in tokens]
        return Workload(calls, *_amounts(bench, point))

    def call(ids: Tensor) -> Tensor:
        if point.mode == "decode":
            _step(bench, decoder, where)
        return decoder.embed(ids)

    calls = [partial(call, ids) for ids in tokens]
    return Workload(calls, *_amounts(bench, point), evict=_evict(bench))


def _head(bench: Bench, point: Point) -> Workload:
    """Logits of one token per sequence and the greedy choice."""
    nbytes = bench.shape.vocab_size * bench.shape.hidden_size * bench.dtype.itemsize
    count = 1 if nbytes >= 3 * bench.llc_bytes else _count(bench, point, nbytes)
    x = _activations(bench, replace(point, chunk=0), bench.shape.hidden_size)

    def call(decoder: Decoder) -> Tensor:
        return decoder.logits(x)[:, 0].argmax(-1)

    decoders = _instances(bench, "decoder", partial(_layerless, bench.shape), count)
    calls: list[Callable[[], object]]
    if _fused(x, point):
        tokens = torch.zeros(point.batch, dtype=torch.int64, device=bench.device)
        calls = [partial(fused_calls.head_call, decoder, x[:, 0], tokens) for decoder in decoders]
    else:
        calls = [partial(call, decoder) for decoder in decoders]
    return Workload(calls, *_amounts(bench, point))


_SHARED = {"mlp": _mlp, "norm": _norm, "embedding": _embedding, "head": _head}
