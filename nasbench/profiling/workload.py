"""The work that a row times: several instances of a block, called one after another on random data.

A block runs by the stream that the engine would run it by, between the norm before it and the residual addition after
it: those two are the `norm` row. In a step for one sequence on a GPU they are parts of the products next to them, so
the norm has no time of its own and the blocks' rows hold it.

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
from nasbench.model.block import Block, BlockCache
from nasbench.model.decoder import Decoder
from nasbench.model.meta import Meta
from nasbench.model.shapes import ModelSpec
from nasbench.model.stream import stream_for
from nasbench.profiling.amounts import Amounts, amounts
from nasbench.profiling.plan import Point
from nasbench.store import block_spec

NO_CALL = "for one sequence a part of the products after it"
"""Why the norm has no time of its own."""
FEWEST, MOST = 4, 64
"""Instances that a workload goes round, unless memory allows fewer."""
SMALL = ByDevice(cpu=16, cuda=64)
"""Calls of a small block in one timed run; on a GPU enough to hide the launch of the graph."""
COLD = 8
"""Size of all instances over that of the last-level cache: at 2, caches that do not evict strictly in turn still held
a part of them, and A at batch 4 and 2k came out a fifth too fast."""
EVICTED_BYTES = 16 << 20
"""What passes through the caches between two small blocks: about the weights of a layer."""
MOST_PREFILL = 2
"""Instances of a prefill workload, whose time is arithmetic, not the fetching of weights ..."""
LONG_PREFILL = 16384
"""... and half of them where its chunks have as many tokens together: they evict themselves."""


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
    return _PARTS.get(point.block, _block)(bench, point)


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


def _meta(bench: Bench, point: Point) -> Meta:
    """Where the point's tokens stand, what its layers look up made already."""
    # A decoder of one word knows where tokens stand.
    (decoder,) = _instances(bench, "places", partial(_layerless, replace(bench.shape, vocab_size=1)), 1)
    meta: Meta
    if point.mode == "prefill":
        meta = decoder.sequence_meta(point.context - point.chunk, point.chunk)
    else:
        decoder.prepare(point.context)
        positions = torch.full((point.batch,), point.context - 1, device=bench.device)
        # The engine's graphs read positions from the device.
        meta = decoder.step_meta(positions, point.context, equal_lengths=bench.device == "cpu")
    meta.rotary(bench.shape.layer())
    return meta


def _call(block: Block, norm: nn.Module | None, x: Tensor, meta: Meta, cache: BlockCache | None) -> Tensor:
    """A block as the engine runs it. Plain PyTorch adds its output to x in an operation of its own, which belongs to
    the `norm` row."""
    stream = stream_for(x, meta, residual=fused.autograd_kernels(x))
    block.run(stream, norm, meta, cache)
    return stream.x


def _calls(
    bench: Bench, blocks: list[Any], x: Tensor, meta: Meta, caches: Sequence[BlockCache | None]
) -> list[Callable[[], object]]:
    norm = None
    if stream_for(x, meta).fuses_norm:
        # Its weight is too small to matter to the caches.
        size, eps = bench.shape.hidden_size, bench.shape.rms_eps
        (norm,) = _instances(bench, "norm before", partial(nn.RMSNorm, size, eps), 1)
    return [partial(_call, block, norm, x.clone(), meta, cache) for block, cache in zip(blocks, caches, strict=True)]


def _caches(bench: Bench, blocks: list[Any], point: Point) -> list[BlockCache | None]:
    """A cache per block, full to the context. One is filled with random numbers, the others copy it: faster."""
    size = {"device": bench.device, "dtype": bench.dtype}
    caches = [block.new_cache(point.batch, point.context, **size) for block in blocks]
    if caches[0] is None:
        return caches
    caches[0].fill_random()
    for cache in caches[1:]:
        for name, tensor in cache.tensors.items():
            tensor.copy_(caches[0].tensors[name])
    return caches


def _block(bench: Bench, point: Point) -> Workload:
    """A mixer or an FFN."""
    spec = block_spec(bench.shape, point.block)
    assert spec is not None
    # A shared block has no context: what it looks back at, if anything, is of constant size.
    point = replace(point, context=point.context or max(1, point.chunk))
    width = bench.dtype.itemsize
    formula = spec.cache_bytes(point.batch, point.context, width)
    conv_state = spec.conv_state_bytes(point.batch, width)
    count = _count(bench, point, spec.parameters() * width + formula + conv_state)
    blocks = _instances(bench, point.block, spec.build, count)
    caches = _caches(bench, blocks, point)
    x = _activations(bench, point, bench.shape.hidden_size)
    work = Workload(_calls(bench, blocks, x, _meta(bench, point), caches), *_amounts(bench, point))
    if caches[0] is None:
        return work
    return replace(
        work, cache_bytes=caches[0].nbytes, cache_formula_bytes=formula, conv_state_bytes=caches[0].conv_state_nbytes
    )


def _norm(bench: Bench, point: Point) -> Workload:
    """Residual addition and RMSNorm, twice or four times in every layer."""
    size = bench.shape.hidden_size
    x, y = (_activations(bench, point, size) for _ in range(2))
    meta = _meta(bench, replace(point, context=max(1, point.chunk)))
    if stream_for(x, meta).fuses_norm:
        return Workload([], *_amounts(bench, point), reason=NO_CALL)
    norms = _instances(bench, "norm", partial(nn.RMSNorm, size, bench.shape.rms_eps), SMALL.of(bench.device))

    def call(norm: nn.Module) -> Tensor:
        stream = stream_for(x, meta)
        stream.add(y)
        return stream.normed(norm)

    return Workload([partial(call, norm) for norm in norms], *_amounts(bench, point), evict=_evict(bench))


def _embedding(bench: Bench, point: Point) -> Workload:
    """The look-up and, in a decode step, the rotary tables that all layers share."""
    (decoder,) = _instances(bench, "decoder", partial(_layerless, bench.shape), 1)
    size = (SMALL.of(bench.device), point.batch, point.chunk or 1)
    tokens = torch.randint(bench.shape.vocab_size, size, device=bench.device)
    decoder.prepare(1)
    positions = torch.zeros(point.batch, dtype=torch.int64, device=bench.device)

    def call(ids: Tensor) -> Tensor:
        if point.mode == "decode":
            decoder.step_meta(positions, 1, equal_lengths=bench.device == "cpu").rotary(bench.shape.layer())
        return decoder.embed(ids)

    return Workload([partial(call, ids) for ids in tokens], *_amounts(bench, point), evict=_evict(bench))


def _head(bench: Bench, point: Point) -> Workload:
    """Logits of one token per sequence and the greedy choice; for one sequence the last norm is a part of it."""
    nbytes = bench.shape.vocab_size * bench.shape.hidden_size * bench.dtype.itemsize
    count = 1 if nbytes >= 3 * bench.llc_bytes else _count(bench, point, nbytes)
    x = _activations(bench, replace(point, chunk=0), bench.shape.hidden_size)
    meta = _meta(bench, replace(point, context=1))
    fuses = stream_for(x, meta).fuses_norm
    tokens = torch.zeros(point.batch, dtype=torch.int64, device=bench.device)

    def call(decoder: Decoder) -> Tensor:
        norm = decoder.model.norm if fuses else None
        return tokens.copy_(fused.most_likely(stream_for(x, meta).logits(norm, decoder.head_weight)[:, 0]))

    decoders = _instances(bench, "decoder", partial(_layerless, bench.shape), count)
    return Workload([partial(call, decoder) for decoder in decoders], *_amounts(bench, point))


_PARTS = {"norm": _norm, "embedding": _embedding, "head": _head}
