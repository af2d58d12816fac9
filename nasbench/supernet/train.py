"""Distilling the supernet: closed-form readouts, block-wise alignment, then random sub-networks.

1. ridge: every readout is solved on the teacher's activations (nasbench.supernet.ridge), the writing strength set.
2. align: one pass of the teacher gives every layer's input and the attention's output; every alternative of every layer
   learns that map by itself. No gradient crosses a layer, so a step costs the mixers' forward and backward only.
   The readouts are solved again at the end.
3. supernet: a random sub-network per step, KL to the teacher's distribution; only its mixers get gradients.

MLPs, norms, embeddings and the attention stay as they are throughout.
"""

from __future__ import annotations

import random
import threading
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nasbench.backbone.load import LoadedModel, load_model
from nasbench.blocks.mixer import TokenMixer
from nasbench.errors import UserError
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, kind_of
from nasbench.spaces.space import Space
from nasbench.supernet import checkpoint
from nasbench.supernet.data import Batch, Corpus
from nasbench.supernet.forward import chunk_of, mixing
from nasbench.supernet.loop import GraphedStep, Loop, LossSums, Progress, no_progress, stop_on_signal
from nasbench.supernet.losses import distillation_kl, output_weight, relative_error
from nasbench.supernet.optimizer import MasterAdamW
from nasbench.supernet.ridge import calibrate_writing, solve_readouts
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.supernet import Supernet

STAGES = ("align", "supernet")
SOLVE_BATCH_TOKENS = 2048
"""Tokens of one forward while readouts are solved; without gradients more fit at once."""
_FREE_TO_CHANGE = ("log_every", "checkpoint_every_s")
_OFFSETS = {"ridge": 0, "refit": 1, "align": 2, "supernet": 3}
"""Added to the seed, so that stages see the text in different orders."""


def sample_placement(space: Space, config: DistillConfig, seed: int, step: int) -> Placement:
    """The sub-network of a training step: a function of the seed and the step.

    Every fourth step is the smallest network (the sandwich rule's half that needs training: the largest is the
    teacher itself). Else the number of full-attention layers is uniform between the configured shares, and either one
    trained kind fills the other layers or each draws its own.
    """
    generator = random.Random(f"{seed}/{step}")
    layers = space.num_layers
    least, most = round(config.least_full * layers), round(config.most_full * layers)
    count = least if step % 4 == 0 else generator.randint(least, most)
    full = frozenset(generator.sample(range(layers), count))
    trained = [name for name in space.names if kind_of(name) not in ("A", *config.frozen)]
    common = generator.choice(trained) if trained and generator.random() < 0.5 else None
    drawn = []
    for layer in range(layers):
        fillers = space.fillers(layer)
        drawn.append(common if common in fillers else generator.choice(fillers) if fillers else "A")
    return space.with_full_attention(tuple(str(name) for name in drawn), full)


def align_step(net: Supernet, batch: Batch, sums: LossSums) -> None:
    """Gradients of every trained mixer's relative L2 error on the teacher's activations of a batch."""
    teacher = net.teacher
    with torch.no_grad():
        x, chunk = teacher.embed(batch.tokens), chunk_of(teacher, batch)
    trained = net.trained()
    for i, layer in enumerate(teacher.layers):
        with torch.no_grad():
            inputs = layer.attention_input(x)
            target = layer.self_attn(inputs, chunk)
            x = layer.finish(x, target)
        for name in net.space.fillers(i):
            mixer = trained.get(f"layers.{i}.{name}")
            if mixer is not None:
                loss = relative_error(mixer(inputs, chunk), target)
                loss.backward()
                sums.add(f"layers.{i}.{name}", loss.detach())


def distill_step(
    net: Supernet, placement: Placement, batch: Batch, sums: LossSums, *, kl_chunk: int, hidden_weight: float
) -> None:
    """Gradients of one sub-network's KL to the teacher on a batch.

    Teacher and student share the layers before the first that differs. The KL is booked for the network and for each of
    its trained mixers.
    """
    teacher = net.teacher
    mixers = [net.mixer(i, name) for i, name in enumerate(placement)]
    first = next((i for i, name in enumerate(placement) if kind_of(name) != "A"), len(placement))
    chunk = chunk_of(teacher, batch)
    with torch.no_grad():
        shared = teacher.embed(batch.tokens)
        for layer in teacher.layers[:first]:
            shared = layer(shared, chunk)
        target = shared
        for layer in teacher.layers[first:]:
            target = layer(target, chunk)
        target = teacher.model.norm(target)
    student = shared
    for layer, mixer in zip(teacher.layers[first:], mixers[first:], strict=True):
        student = layer.with_mixer(mixer)(student, chunk)
    student = teacher.model.norm(student)
    kl = distillation_kl(student, target, output_weight(teacher), kl_chunk)
    loss = kl + hidden_weight * relative_error(student, target) if hidden_weight else kl
    if loss.requires_grad:
        loss.backward()
    sums.add("", kl.detach())
    for i, name in enumerate(placement):
        if f"layers.{i}.{name}" in sums.index:
            sums.add(f"layers.{i}.{name}", kl.detach())


def training_corpus(run: Run, net: Supernet, config: DistillConfig, sequence: int | None = None) -> Corpus:
    """The run's text in rows of `sequence` tokens (the run's own by default). Raises UserError, also when documents are
    to be kept apart and a layer kind does not."""
    corpus = Corpus.load(run.spec.data, net.tokenizer, sequence or run.spec.sequence)
    if not config.documents:
        return corpus.without_documents()
    if letters := mixing(net.mixers()):
        raise UserError(f"layer kind {', '.join(letters)} does not keep documents apart: set documents = false")
    return corpus


class Distiller:
    """Trains the supernet of a run, from its newest checkpoint on.

    Raises UserError when the run was begun with other settings.
    """

    def __init__(
        self, run: Run, loaded: LoadedModel, config: DistillConfig, progress: Progress, stop: threading.Event
    ) -> None:
        self.run, self.config, self.progress, self.stop = run, config, progress, stop
        self.net = Supernet.build(loaded, run.spec.space, config.frozen, run.spec.seed)
        self.corpus = training_corpus(run, self.net, config)
        self.device = loaded.decoder.device
        dtype = str(loaded.decoder.dtype).removeprefix("torch.")
        settings = {key: value for key, value in asdict(config).items() if key not in _FREE_TO_CHANGE}
        self.state: dict[str, Any] = {
            "frozen": list(config.frozen),
            "settings": {**settings, "frozen": list(config.frozen), "dtype": dtype, "corpus": self.corpus.fingerprint},
        }
        self.weights: dict[str, Tensor] = {}
        """Master weights, fp32, between stages."""

    def train(self) -> Supernet:
        """Runs what is left of the stages and returns the trained supernet."""
        trained = self.net.trained()
        saved = checkpoint.latest(self.run.supernet)
        if saved is None:
            self._solve("ridge")
            self.weights = {
                f"{group}.{name}": parameter.detach().float().clone()
                for group, mixer in trained.items()
                for name, parameter in mixer.named_parameters()
            }
            if trained:
                saved = self._between("align")
        else:
            self._check(saved)
            self.weights = saved.weights(str(self.device))
        stage = "done" if saved is None else saved.state["stage"]
        for name in STAGES[STAGES.index(stage) :] if stage != "done" else ():
            self._stage(name, saved)
            if name == "align":
                self.net.load_weights(self.weights)
                if self.config.align_tokens:
                    self._solve("refit")
                    for group, mixer in trained.items():
                        self._take_readout(group, mixer)
            saved = self._between("supernet" if name == "align" else "done")
        if saved is None:
            saved = self._between("done")
        self.net.load_weights(self.weights)
        self.net.version = saved.version
        for mixer in trained.values():
            mixer.requires_grad_(False)
        return self.net

    def _take_readout(self, group: str, mixer: TokenMixer) -> None:
        for name, parameter in mixer.named_parameters():
            if name.startswith("o_proj."):
                self.weights[f"{group}.{name}"] = parameter.detach().float().clone()

    def _check(self, saved: checkpoint.Checkpoint) -> None:
        old, new = saved.state.get("settings", {}), self.state["settings"]
        changed = [f"{key} {old.get(key)!r} (asked: {new[key]!r})" for key in new if old.get(key) != new[key]]
        if changed:
            raise UserError(
                f"{self.run.path} was distilled with another {', '.join(changed)}: "
                "ask for the same or choose another folder"
            )

    def _rows(self, tokens: int) -> int:
        """Sequences of a batch of about `tokens` tokens."""
        return max(1, tokens // self.corpus.sequence)

    def _batch(self, stage: str, index: int, rows: int) -> Batch:
        seed = self.run.spec.seed * len(_OFFSETS) + _OFFSETS[stage]
        return self.corpus.batch(index, rows, seed).to(self.device)

    def _solve(self, stage: str) -> None:
        rows = self._rows(SOLVE_BATCH_TOKENS)
        rows = min(rows, self.config.ridge_tokens // self.corpus.sequence) or 1
        batches = self.config.ridge_tokens // (rows * self.corpus.sequence)
        total = batches * rows * self.corpus.sequence
        if not batches:
            return
        done = 0

        def progress(tokens: int) -> None:
            nonlocal done
            done += tokens
            self.progress(stage, done, total)
            if self.stop.is_set():
                raise KeyboardInterrupt

        trained = self.net.trained()
        mixers: list[dict[str, TokenMixer]] = [
            {name: trained[key] for name in self.net.space.fillers(i) if (key := f"layers.{i}.{name}") in trained}
            for i in range(self.net.space.num_layers)
        ]
        if stage == "ridge":
            calibrate_writing(self.net.teacher, mixers, self._batch(stage, 0, rows))
        texts = (self._batch(stage, index, rows) for index in range(batches))
        solve_readouts(self.net.teacher, mixers, texts, self.config.ridge, progress)

    def _between(self, stage: str) -> checkpoint.Checkpoint:
        """A checkpoint at the start of a stage: weights alone."""
        state = {**self.state, "stage": stage, "step": 0}
        return checkpoint.save(self.run.supernet, f"{stage}-{0:08d}", self.weights, {}, state)

    def _stage(self, stage: str, saved: checkpoint.Checkpoint | None) -> None:
        config = self.config
        align = stage == "align"
        rows = self._rows(config.align_batch_tokens if align else config.supernet_batch_tokens)
        step_tokens = rows * self.corpus.sequence
        steps = (config.align_tokens if align else config.supernet_tokens) // step_tokens

        graphed: GraphedStep | None = None

        def step(index: int, sums: LossSums) -> None:
            nonlocal graphed
            tokens = self._batch(stage, index, rows)
            if align and self.device.type == "cuda":
                if graphed is None:
                    graphed = GraphedStep(lambda batch: align_step(self.net, batch, sums), optimizer, sums, tokens)
                graphed(tokens)
            elif align:
                align_step(self.net, tokens, sums)
            else:
                placement = sample_placement(self.net.space, config, self.run.spec.seed, index)
                distill_step(
                    self.net, placement, tokens, sums, kl_chunk=config.kl_chunk, hidden_weight=config.hidden_weight
                )

        groups = {name: dict(mixer.named_parameters()) for name, mixer in self.net.trained().items()}
        lr = config.align_lr if align else config.supernet_lr
        optimizer = MasterAdamW(groups, lr=lr, weight_decay=config.weight_decay, clip=config.clip)
        optimizer.set_masters(self.weights)
        loop = Loop(
            self.run.supernet, stage, optimizer, steps, step_tokens, step, config, self.state, self.stop, self.progress
        )
        if saved is not None and saved.state["step"]:
            loop.resume(saved)
        done = dict.fromkeys(STAGES[: STAGES.index(stage)], 1 << 60)
        loop.losses.cut({**done, stage: loop.start})
        loop.run()
        self.weights = {name: master.detach() for name, master in optimizer.masters.items()}


def distill(
    run: Run,
    config: DistillConfig,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = no_progress,
    loaded: LoadedModel | None = None,
) -> Supernet:
    """Trains the run's supernet, or continues it, and returns it; a finished one is only loaded.

    Raises:
        UserError: data, model or settings do not fit the run.
        MachineError: a loss that is not finite, a disk that refuses.
        KeyboardInterrupt: stopped by Ctrl-C, after a checkpoint.
    """
    loaded = loaded or load_model(run.spec.model, dtype=dtype, device=device)
    with stop_on_signal() as stop:
        return Distiller(run, loaded, config, progress, stop).train()
