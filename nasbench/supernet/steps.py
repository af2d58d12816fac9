"""What one training step does: which sub-network it trains, and the gradients of alignment and of distillation."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from nasbench.data.packing import Batch
from nasbench.parallel.context import SINGLE, DistContext
from nasbench.parallel.fsdp import full
from nasbench.spaces.placement import Placement, is_of
from nasbench.spaces.space import Space
from nasbench.supernet.forward import meta_of
from nasbench.supernet.layer_calls import TEACHER, LayerCalls
from nasbench.supernet.loop import LossSums
from nasbench.supernet.losses import distillation_kl, energy, relative_error
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.supernet import Supernet

REST = "rest"
"""Names what a finalised hybrid trains of a layer beside its mixer, in losses and files."""


def sample_placement(space: Space, config: DistillConfig, seed: int, step: int, done: float = 0.0) -> Placement:
    """The sub-network of a training step: a function of the seed and the step.

    Every `smallest_every`-th step is the smallest network (the sandwich rule's half that needs training: the largest
    is the teacher itself). Else the number of full-attention layers is uniform between the configured shares, the
    upper one falling to the lower as the stage goes on where `full_schedule` says so, and either one trained kind
    fills the other layers or each draws its own.

    Args:
        done: share of the stage that is over.
    """
    generator = random.Random(f"{seed}/{step}")
    layers = space.num_layers
    least, most = round(config.least_full * layers), round(config.most_full * layers)
    if config.full_schedule == "falling":
        most = round(most - (most - least) * done)
    smallest = bool(config.smallest_every) and step % config.smallest_every == 0
    count = least if smallest else generator.randint(least, most)
    full = frozenset(generator.sample(space.may_be_full, min(count, len(space.may_be_full))))
    trained = [name for name in space.efficient_names if not is_of(name, config.frozen)]
    common = generator.choice(trained) if trained and generator.random() < 0.5 else None
    drawn = []
    for layer in range(layers):
        names = space.efficient(layer)
        drawn.append(common if common in names else generator.choice(names) if names else space.original[layer])
    return space.with_full_attention(tuple(str(name) for name in drawn), full)


def align_step(net: Supernet, batch: Batch, sums: LossSums, workers: DistContext = SINGLE) -> None:
    """Gradients of every trained mixer's relative L2 error on the teacher's activations of a batch."""
    teacher = net.teacher
    with torch.no_grad():
        x, meta = teacher.embed(batch.tokens), meta_of(teacher, batch)
    trained = net.trained()
    for i, layer in enumerate(teacher.layers):
        with torch.no_grad():
            inputs = layer.input_layernorm(x)
            target = layer.self_attn(inputs, meta)
            whole = energy(target)
            x = layer.finish(x, target, meta)
        losses = []
        for name in net.space.alternatives(i):
            mixer = trained.get(f"layers.{i}.{name}")
            if mixer is not None:
                loss = relative_error(mixer(inputs, meta), target, whole)
                sums.add(f"layers.{i}.{name}", loss.detach(), whole)
                if net.sharded:
                    losses.append(loss)
                else:
                    loss.backward()
        if losses:
            # Without shards gradients are weighted after the backward pass. With them, FSDP2 ends each pass with a look
            # at all units, so that a layer's mixers share one.
            total = whole.clone()
            workers.all_reduce([total])
            torch.stack(losses).sum().backward(whole / total * workers.size)


def distill_step(
    net: Supernet,
    placements: Sequence[Placement],
    batch: Batch,
    sums: LossSums,
    config: DistillConfig,
    workers: DistContext = SINGLE,
    calls: LayerCalls | None = None,
) -> None:
    """Gradients of sub-networks' mean KL to the teacher on a batch.

    Teacher and student share the layers before the first that differs. The KL is booked for the network and for each
    part of it that is trained.
    """
    teacher, layers = net.teacher, net.teacher.layers
    calls = calls or LayerCalls(net, config.recompute)
    firsts = [net.space.first_changed(placement) for placement in placements]
    meta = meta_of(teacher, batch)
    with torch.no_grad():
        shared = {0: teacher.embed(batch.tokens)}
        x = shared[0]
        for i in range(len(layers)):
            x = calls(i, TEACHER, x, meta)
            if i + 1 in firsts:
                shared[i + 1] = calls.keep(x)
        target = teacher.model.norm(x)
        head = full(teacher.head_weight)
        whole = energy(target)
        workers.all_reduce([whole])
        whole /= workers.size
    for placement, first in zip(placements, firsts, strict=True):
        student = shared[first]
        for i in range(first, len(layers)):
            student = calls(i, placement[i], student, meta)
        student = teacher.model.norm(student)
        kl = distillation_kl(student, target, head, config.kl_chunk)
        loss = kl
        if config.hidden_weight:
            loss = kl + config.hidden_weight * relative_error(student, target, whole)
        if loss.requires_grad:
            (loss / len(placements)).backward()
        if placement is not placements[-1]:
            calls.keep_gradients()
        names = [f"layers.{i}.{part}" for i, name in enumerate(placement) for part in (name, REST)]
        sums.add_all(["", *(name for name in names if name in sums.index)], kl.detach())


@torch.no_grad()
def nonfinite_layer(net: Supernet, placement: Placement, batch: Batch, workers: DistContext = SINGLE) -> str | None:
    """The first layer of a sub-network whose output on a batch is not finite in any process, None where none is."""
    x, meta = net.teacher.embed(batch.tokens), meta_of(net.teacher, batch)
    for i, name in enumerate(placement):
        x = net.layer(i, name)(x, meta)
        if workers.any(not bool(x.isfinite().all()), x.device):
            return f"layers.{i}.{name}"
    return None
