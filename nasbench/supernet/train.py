"""Distilling the supernet: closed-form readouts, block-wise alignment, then random sub-networks.

1. ridge: every readout is solved on the teacher's activations (nasbench.supernet.ridge), the writing strength set.
2. align: one pass of the teacher gives every layer's input and the attention's output; every alternative of every layer
   learns that map by itself. No gradient crosses a layer, so a step costs the mixers' forward and backward only.
   The readouts are solved again at the end.
3. supernet: a random sub-network per step, KL to the teacher's distribution; only its mixers get gradients.

MLPs, norms, embeddings and the attention stay as they are throughout.

A run that is asked for more tokens than it has had goes on: the stage gets another cycle of the learning rate over the
tokens that are new (nasbench.supernet.loop). Where alignment grows after random sub-networks were trained, it goes on
from the present weights, and the whole supernet stage follows again.
"""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nasbench.checkpoints.load import LoadedModel, load_model
from nasbench.core.by_device import ByDevice
from nasbench.core.errors import UserError
from nasbench.data.packing import Batch, Corpus
from nasbench.model.block import Block
from nasbench.parallel import fsdp
from nasbench.parallel.context import SINGLE, DistContext
from nasbench.runs import Run
from nasbench.spaces.placement import Placement
from nasbench.supernet import checkpoint, sharded_checkpoint
from nasbench.supernet.forward import kinds_without_varlen
from nasbench.supernet.layer_calls import GraphedLayerCalls
from nasbench.supernet.loop import (
    GraphedStep,
    Loop,
    LossSums,
    Notice,
    Progress,
    no_notice,
    no_progress,
    reduce_and_clip,
    stop_on_signal,
)
from nasbench.supernet.optimizer import MasterAdamW
from nasbench.supernet.ridge import calibrate, out_name, solve_output_projections
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.steps import align_step, distill_step, nonfinite_layer, sample_placement
from nasbench.supernet.supernet import Supernet

STAGES = ("align", "supernet")
SOLVE_BATCH_TOKENS = ByDevice(cpu=2048, cuda=32768)
"""Tokens of one forward while readouts are solved; without gradients more fit at once."""
_FREE_TO_CHANGE = ("log_every", "checkpoint_every_s", "recompute", "graphs", "shard", "tensorboard")
_FREE_TO_GROW = ("align_tokens", "supernet_tokens")
_OFFSETS = {"ridge": 0, "refit": 1, "align": 2, "supernet": 3}
"""Added to the seed, so that stages see the text in different orders."""


def training_corpus(
    run: Run, net: Supernet, config: DistillConfig, sequence: int | None = None, corpus: Corpus | None = None
) -> Corpus:
    """The run's text in rows of `sequence` tokens (the run's own by default), or `corpus` where it is read already.
    Raises UserError, also when documents are to be kept apart and a layer kind does not, or rows are to repeat."""
    corpus = corpus or Corpus.load(run.spec.data, net.tokenizer, sequence or run.spec.sequence)
    if not config.documents:
        return corpus.without_documents().repeating(config.repeat_share)
    if config.repeat_share:
        raise UserError(
            f"repeat_share {config.repeat_share} is for rows that are read as one text: set documents = false"
        )
    if letters := kinds_without_varlen(net.mixers()):
        raise UserError(f"layer kind {', '.join(letters)} does not keep documents apart: set documents = false")
    return corpus


class Distiller:
    """Trains the supernet of a run, from its newest checkpoint on. With `config.shard` the model comes on the CPU.

    Raises UserError when the run was begun with other settings.
    """

    def __init__(
        self,
        run: Run,
        loaded: LoadedModel,
        config: DistillConfig,
        stop: threading.Event,
        progress: Progress = no_progress,
        notice: Notice = no_notice,
        workers: DistContext = SINGLE,
        corpus: Corpus | None = None,
    ) -> None:
        self.run, self.config, self.stop = run, config, stop
        self.workers = workers
        self.progress, self.notice = (progress, notice) if workers.is_main else (no_progress, no_notice)
        self.net = Supernet.build(
            loaded, run.spec.space, config.frozen, run.spec.seed, transfer=config.transfer, solved=config.solved
        )
        self.corpus = training_corpus(run, self.net, config, corpus=corpus)
        fsdp.check(config.shard, workers)
        if config.shard:
            fsdp.shard(self.net, workers)
        self.device = loaded.decoder.device
        dtype = str(loaded.decoder.dtype).removeprefix("torch.")
        settings = {key: value for key, value in asdict(config).items() if key not in _FREE_TO_CHANGE}
        lists = {"frozen": list(config.frozen), "solved": list(config.solved)}
        self.state: dict[str, Any] = {
            **lists,
            "settings": {**settings, **lists, "dtype": dtype, "corpus": self.corpus.fingerprint},
            "cycles": {stage: [self.budget(stage)] for stage in STAGES},
        }
        self.weights: dict[str, Tensor] = {}
        """Master weights, fp32, between stages; the parameters themselves where they are shared out."""

    def train(self) -> Supernet:
        """Runs what is left of the stages and returns the trained supernet."""
        saved = checkpoint.latest(self.run.supernet)
        self.workers.any(False, self.device)  # nobody writes before all have read
        if saved is None:
            self.prepare()
            stage, start = ("align" if self.net.trained() else "done"), 0
            if self.net.trained():
                self._between("align")
        else:
            stage, start = self.resume_point(saved)
            self.weights = saved.weights("cpu" if self.net.sharded else str(self.device))
            self.net.load_weights(self.weights)  # no optimiser puts back what is solved and not trained
            if self.net.sharded:
                self.weights = self._masters()
        resumed = saved if saved is not None and saved.state["stage"] == stage and saved.state["step"] else None
        for name in STAGES[STAGES.index(stage) :] if stage != "done" else ():
            self._stage(name, start, resumed)
            start, resumed = 0, None
            if name == "align":
                self.net.load_weights(self.weights)
                if self.config.align_tokens:
                    self._solve("refit", self.config.ridge_tokens)
                    self._take_output_projections()
            saved = self._between("supernet" if name == "align" else "done")
        if saved is None:
            saved = self._between("done")
        self.net.load_weights(self.weights)
        self.net.version = saved.version
        for mixer in self.net.mixers():
            mixer.requires_grad_(False)
        return self.net

    def prepare(self, tokens: int | None = None) -> None:
        """The supernet before its first step: readouts solved, from the configured number of tokens or `tokens`, and
        the weights as masters."""
        self._solve("ridge", self.config.ridge_tokens if tokens is None else tokens)
        self.weights = self._masters()

    def _masters(self) -> dict[str, Tensor]:
        """The present weights as masters."""
        learnt = {name: parameter.detach() for name, parameter in self.net.trained_parameters().items()}
        return learnt if self.net.sharded else {name: tensor.float().clone() for name, tensor in learnt.items()}

    def budget(self, stage: str) -> int:
        """Tokens asked for a stage."""
        return self.config.align_tokens if stage == "align" else self.config.supernet_tokens

    def step_rows(self, stage: str) -> int:
        """Sequences of a step of a stage, over all processes."""
        config = self.config
        return self._rows(config.align_batch_tokens if stage == "align" else config.supernet_batch_tokens)

    def steps(self, stage: str, tokens: int) -> int:
        """Steps that `tokens` tokens of a stage are."""
        return tokens // self.step_tokens(stage)

    def step_tokens(self, stage: str) -> int:
        """Tokens of a step of a stage, over all processes."""
        return self.step_rows(stage) * self.corpus.sequence

    def _take_output_projections(self) -> None:
        outs = {f"{group}.{out_name(mixer)}" for group, mixer in self.net.closed_form().items()}
        self.weights |= {name: tensor for name, tensor in self._masters().items() if name in outs}

    def _check(self, saved: checkpoint.Checkpoint) -> None:
        old, new = saved.state.get("settings", {}), self.state["settings"]
        changed = [key for key in new if old.get(key) != new[key]]
        changed = [key for key in changed if not (key in _FREE_TO_GROW and old.get(key, 0) < new[key])]
        if changed:
            told = ", ".join(f"{key} {old.get(key)!r} (asked: {new[key]!r})" for key in changed)
            raise UserError(
                f"{self.run.path} was distilled with another {told}: "
                "ask for the same, for more tokens, or choose another folder"
            )

    def resume_point(self, saved: checkpoint.Checkpoint) -> tuple[str, int]:
        """Takes the saved run's cycles, adds those that are asked for beyond them, and returns stage and step to go on
        with. Raises UserError when the run was begun with other settings."""
        self._check(saved)
        stage, start = str(saved.state["stage"]), int(saved.state["step"])
        known = saved.state.get("cycles") or {name: [saved.state["settings"][f"{name}_tokens"]] for name in STAGES}
        grown = []
        for name in STAGES:
            ends = [end for end in known[name] if end]
            if self.steps(name, self.budget(name)) > self.steps(name, ends[-1] if ends else 0):
                grown.append(name)
                ends.append(self.budget(name))
            self.state["cycles"][name] = ends
        if "align" in grown and stage != "align":
            self.state["cycles"]["supernet"] = [self.budget("supernet")]
            return "align", self.steps("align", (known["align"] or [0])[-1])
        if "supernet" in grown and stage == "done":
            return "supernet", self.steps("supernet", (known["supernet"] or [0])[-1])
        return stage, start

    def _rows(self, tokens: int) -> int:
        """Sequences of a batch of about `tokens` tokens."""
        return max(1, tokens // self.corpus.sequence)

    def _batch(self, stage: str, index: int, rows: int) -> Batch:
        seed = self.run.spec.seed * len(_OFFSETS) + _OFFSETS[stage]
        return self.corpus.batch(index, rows, seed)

    def _solve(self, stage: str, tokens: int) -> None:
        rows = self._rows(SOLVE_BATCH_TOKENS.of(self.device))
        rows = min(rows, tokens // self.corpus.sequence) or 1
        batches = tokens // (rows * self.corpus.sequence)
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

        # Where nothing trains a kind, solving it again on other text would change nothing but its noise.
        solved = self.net.closed_form() if stage == "ridge" else self.net.trained()
        mixers: list[dict[str, Block]] = [
            {name: solved[key] for name in self.net.space.alternatives(i) if (key := f"layers.{i}.{name}") in solved}
            for i in range(self.net.space.num_layers)
        ]
        if stage == "ridge":
            calibrate(self.net.teacher, mixers, self._batch(stage, 0, rows).to(self.device))
        texts = (self._batch(stage, index, rows).to(self.device) for index in range(batches))
        solve_output_projections(self.net.teacher, mixers, texts, self.config.ridge, progress)

    def _between(self, stage: str) -> checkpoint.Checkpoint:
        """A checkpoint at the start of a stage: weights alone."""
        state = {**self.state, "stage": stage, "step": 0}
        name = f"{stage}-{0:08d}"
        if self.workers.is_main or self.net.sharded:
            return sharded_checkpoint.save(self.run.supernet, name, self.weights, {}, state, self.workers)
        return checkpoint.Checkpoint(self.run.supernet / name, {**state, "digests": {checkpoint.WEIGHTS: "elsewhere"}})

    def optimizer(self, stage: str) -> MasterAdamW:
        """Over the trained mixers, from the present master weights on."""
        groups = {name: dict(mixer.named_parameters()) for name, mixer in self.net.trained().items()}
        lr = self.config.align_lr if stage == "align" else self.config.supernet_lr
        optimizer = MasterAdamW(groups, lr=lr, weight_decay=self.config.weight_decay, clip=self.config.clip)
        optimizer.set_masters(self.weights)
        return optimizer

    def placements(self, step: int) -> list[Placement]:
        """The sub-networks of a step of the supernet stage."""
        space, seed = self.net.space, self.run.spec.seed
        steps = self.steps("supernet", self.state["cycles"]["supernet"][-1])
        sampled = sample_placement(space, self.config, seed, step, step / max(1, steps))
        if not self.config.sandwich:
            return [sampled]
        smallest = sample_placement(space, self.config.updated({"smallest_every": 1}), seed, step)
        return list(dict.fromkeys((smallest, sampled)))

    def step(self, stage: str, index: int, optimizer: MasterAdamW, sums: LossSums) -> None:
        """Gradients of one step, ready for the optimiser."""
        batch = self.workers.local_rows(self._batch(stage, index, self.step_rows(stage))).to(self.device)
        if stage == "supernet":
            if self._calls is None and self.config.graphs and self.device.type == "cuda":
                choices = [self.net.space.alternatives(i) for i in range(self.net.space.num_layers)]
                self._calls = GraphedLayerCalls(self.net, choices, batch)
            distill_step(self.net, self.placements(index), batch, sums, self.config, self.workers, self._calls)
        elif self.device.type == "cuda" and not self.net.sharded:
            if self._graphed is None:
                self._graphed = GraphedStep(
                    lambda part: align_step(self.net, part, sums), optimizer, sums, batch, self.workers
                )
            self._graphed(batch)
            return
        else:
            align_step(self.net, batch, sums, self.workers)
        reduce_and_clip(optimizer, sums, self.workers)

    _graphed: GraphedStep | None = None
    _calls: GraphedLayerCalls | None = None

    def reset_graphs(self) -> None:
        """Before the optimiser that a captured step works for goes."""
        self._graphed = self._calls = None

    def _stage(self, stage: str, start: int, resumed: checkpoint.Checkpoint | None) -> None:
        optimizer = self.optimizer(stage)
        cycles = [self.steps(stage, tokens) for tokens in self.state["cycles"][stage]] or [0]

        def first_nonfinite_layer(step: int) -> str | None:
            if stage == "align":
                return None
            batch = self.workers.local_rows(self._batch(stage, step, self.step_rows(stage))).to(self.device)
            found = (nonfinite_layer(self.net, placement, batch, self.workers) for placement in self.placements(step))
            return next((name for name in found if name), None)

        loop = Loop(
            self.run.supernet,
            stage,
            optimizer,
            cycles,
            self.step_tokens(stage),
            lambda index, sums: self.step(stage, index, optimizer, sums),
            self.config,
            self.state,
            self.stop,
            self.progress,
            self.notice,
            self.workers,
            first_nonfinite_layer,
            start,
            kept={name: tensor for name, tensor in self.weights.items() if name not in optimizer.masters},
        )
        if resumed is not None:
            loop.resume(resumed)
        self.workers.any(False, self.device)  # nobody writes before all have read
        loop.cut(dict.fromkeys(STAGES[: STAGES.index(stage)], 1 << 60))
        loop.run()
        for name, count in loop.skipped.items():
            self.notice(f"{name}: {count} of {loop.steps - loop.start} steps of {stage} left out, not finite")
        self.reset_graphs()
        self.weights |= optimizer.weights()


def distill(
    run: Run,
    config: DistillConfig,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = no_progress,
    notice: Notice = no_notice,
    loaded: LoadedModel | None = None,
    workers: DistContext = SINGLE,
    corpus: Corpus | None = None,
) -> Supernet:
    """Trains the run's supernet, or continues it, and returns it; a finished one is only loaded.

    Args:
        loaded, corpus: the run's model and text where they have been read already.

    Raises:
        UserError: data, model or settings do not fit the run.
        MachineError: a loss that is not finite, a disk that refuses.
        KeyboardInterrupt: stopped by Ctrl-C, after a checkpoint.
    """
    fsdp.check(config.shard, workers)
    loaded = loaded or load_model(run.spec.model, dtype=dtype, device=fsdp.place_of(config.shard, device))
    with stop_on_signal() as stop:
        return Distiller(run, loaded, config, stop, progress, notice, workers, corpus).train()
