"""What one training step does: which sub-networks it trains, their gradients, and the sums of losses.

`AlignStage` and `SubnetStage` are the two kinds of a training stage, for nasbench.supernet.loop.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nasbench.data.packing import Batch, Corpus
from nasbench.parallel.context import SINGLE, DistContext
from nasbench.parallel.fsdp import full
from nasbench.runtime.graph import capture
from nasbench.spaces.placement import Placement, is_of
from nasbench.spaces.space import Space
from nasbench.supernet.layer_calls import TEACHER, GraphedLayerCalls, LayerCalls
from nasbench.supernet.losses import distillation_kl, energy, relative_error
from nasbench.supernet.optimizer import MasterAdamW
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.supernet import Supernet

REST = "rest"
"""Names what a finalised hybrid trains of a layer beside its mixer, in losses and files."""


class LossSums:
    """Sums of losses per mixer since the last row of losses.csv, kept on the device: reading them would wait for it.

    Attributes:
        names: of the rows, e.g. `layers.3.J`, and "" for the whole network.
        totals: [3, names] fp32: sum of the finite losses, how many, and how many were not finite.
        now: [2, names] fp32, of the step in progress: weight x loss, weight.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.names = list(names)
        self.index = {name: i for i, name in enumerate(self.names)}
        self.totals = torch.zeros(3, len(self.names), device=device)
        self.now = torch.zeros(2, len(self.names), device=device)

    def add(self, name: str, loss: Tensor, weight: Tensor | float = 1.0) -> None:
        """This step's loss of a row, a detached scalar on the device, and its weight beside other processes'."""
        column = self.now[:, self.index[name]]
        column[0] = loss * weight
        column[1] = weight

    def add_all(self, names: Iterable[str], loss: Tensor) -> None:
        """One loss for several rows."""
        rows = torch.zeros(len(self.names))
        rows[[self.index[name] for name in names]] = 1.0
        rows = rows.to(self.now.device, non_blocking=True)
        self.now[1] += rows
        self.now[0] += torch.where(rows > 0, loss, 0.0)

    def accumulate(self) -> Tensor:
        """Ends the step: its losses go to the totals. Which rows had no loss that is not finite, [names] bool."""
        value, there = self.now[0] / self.now[1], self.now[1] != 0
        good = there & value.isfinite()
        bad = there & ~good
        self.totals += torch.stack((torch.where(good, value, 0.0), good.float(), bad.float()))
        self.now.zero_()
        return ~bad


def reduce_and_clip(optimizer: MasterAdamW, sums: LossSums, workers: DistContext) -> None:
    """Between the backward pass and the optimiser's step: gathers gradients, over processes too, adds the losses
    to the totals, clips gradients and leaves out those that are not finite."""
    optimizer.gather()
    if workers.size > 1:
        own = sums.now[1].clone()
        workers.all_reduce([sums.now])
        optimizer.average(workers, (own / sums.now[1])[1:])
    optimizer.clip(sums.accumulate()[1:], workers)


class GraphedStep:
    """An alignment step with its gradients' clipping, captured once in a CUDA graph and replayed for every batch.

    Aligning thirty layers launches thousands of small kernels, which take longer to launch than to run. Random
    sub-networks differ from step to step and cannot be captured so. Sums over processes stay outside of the graph.
    """

    def __init__(self, stage: Stage, batch: Batch) -> None:
        optimizer, sums, workers = self.optimizer, self.sums, self.workers = stage.optimizer, stage.sums, stage.workers
        self.batch = batch.clone()
        # The warm-up adds its losses too.
        kept = [(tensor, tensor.clone()) for tensor in (sums.totals, sums.now, optimizer.skipped)]

        def step() -> None:
            for parameter in optimizer.working.values():
                parameter.grad = None
            align_step(stage.net, self.batch, sums)
            if workers.size == 1:
                reduce_and_clip(optimizer, sums, workers)

        self.graph = capture(step)
        for tensor, before in kept:
            tensor.copy_(before)
        self.owners = optimizer.masters if workers.size == 1 else optimizer.working
        self.gradients = {name: p.grad for name, p in self.owners.items() if p.grad is not None}

    def __call__(self, batch: Batch) -> None:
        """Adds the losses and sets the masters' gradients of a batch of the shape that was captured."""
        self.batch.copy_(batch)
        self.graph.replay()
        for name, gradient in self.gradients.items():
            self.owners[name].grad = gradient
        if self.workers.size > 1:
            reduce_and_clip(self.optimizer, self.sums, self.workers)


def sample_placement(space: Space, config: DistillConfig, seed: int, step: int, done: float = 0.0) -> Placement:
    """The sub-network of a training step: a function of the seed, the step and the share of the stage that is `done`.

    Every `smallest_every`-th step is the smallest network (the sandwich rule's half that needs training: the largest
    is the teacher itself). Else the number of full-attention layers is uniform between the configured shares; with a
    falling schedule the upper one falls to the lower. Either one trained mixer fills the other layers or each draws its
    own.
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
        x, meta = teacher.begin(batch.tokens, batch.documents)
    trained = net.trained()
    for i, layer in enumerate(teacher.layers):
        with torch.no_grad():
            inputs = layer.input_layernorm(x)
            target = layer.self_attn(inputs, meta)
            whole = energy(target)
            x = layer.finish(x, target, meta)
        losses = []
        for name in net.space.alternatives(i):
            if mixer := trained.get(key := f"layers.{i}.{name}"):
                loss = relative_error(mixer(inputs, meta), target, whole)
                sums.add(key, loss.detach(), whole)
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

    Teacher and student share the layers before the first that differs. The KL counts for the network and for each
    part of it that is trained.
    """
    teacher, layers = net.teacher, net.teacher.layers
    calls = calls or LayerCalls(net, config.recompute)
    firsts = [net.space.first_changed(placement) for placement in placements]
    with torch.no_grad():
        x, meta = teacher.begin(batch.tokens, batch.documents)
        shared = {0: x}
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


def nonfinite_layer(net: Supernet, placement: Placement, batch: Batch, workers: DistContext = SINGLE) -> str | None:
    """The first layer of a sub-network whose output on a batch is not finite in any process, None where none is."""
    decoder = net.select(placement)
    return decoder.nonfinite_layer(
        batch.tokens, batch.documents, lambda bad: workers.any(bool(bad), batch.tokens.device)
    )


@dataclass
class Stage(ABC):
    """One training stage: what it trains, on which batches. Batch number n is a function of the seed and n.

    Attributes:
        name: in files and messages.
        optimizer: over what the stage trains.
        rows: of a batch, over all processes.
        sums: of the losses since they were last logged.
    """

    name: str
    net: Supernet
    optimizer: MasterAdamW
    corpus: Corpus
    rows: int
    seed: int
    config: DistillConfig
    workers: DistContext
    sums: LossSums = field(init=False)

    def __post_init__(self) -> None:
        self.sums = LossSums(["", *self.optimizer.groups], self.optimizer.device)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all processes."""
        return self.rows * self.corpus.sequence

    def batch(self, index: int) -> Batch:
        """This process's rows of a step's batch, on its device."""
        batch = self.corpus.batch(index, self.rows, self.seed)
        return self.workers.local_rows(batch).to(self.net.teacher.device)

    @abstractmethod
    def gradients(self, index: int) -> None:
        """Gradients of a step, ready for the optimiser, and its losses."""

    def first_nonfinite_layer(self, index: int) -> str | None:
        """Names the layer that made the network's loss of a step not finite, None where none is found."""
        return None


@dataclass
class AlignStage(Stage):
    """Block-wise alignment of every trained mixer."""

    _graphed: GraphedStep | None = field(default=None, init=False)

    def gradients(self, index: int) -> None:
        batch = self.batch(index)
        if batch.tokens.is_cuda and not self.net.sharded:
            self._graphed = self._graphed or GraphedStep(self, batch)
            self._graphed(batch)
        else:
            align_step(self.net, batch, self.sums, self.workers)
            reduce_and_clip(self.optimizer, self.sums, self.workers)


@dataclass
class SubnetStage(Stage):
    """Distillation of sub-networks.

    Attributes:
        placements: the sub-networks of step n.
        choices: per layer the mixers that they choose from.
    """

    placements: Callable[[int], Sequence[Placement]]
    choices: Sequence[Sequence[str]]
    _calls: GraphedLayerCalls | None = field(default=None, init=False)

    def gradients(self, index: int) -> None:
        batch = self.batch(index)
        if self._calls is None and self.config.graphs and batch.tokens.is_cuda:
            self._calls = GraphedLayerCalls(self.net, self.choices, batch)
        distill_step(self.net, self.placements(index), batch, self.sums, self.config, self.workers, self._calls)
        reduce_and_clip(self.optimizer, self.sums, self.workers)

    def first_nonfinite_layer(self, index: int) -> str | None:
        batch = self.batch(index)
        found = (nonfinite_layer(self.net, each, batch, self.workers) for each in self.placements(index))
        return next((name for name in found if name), None)
