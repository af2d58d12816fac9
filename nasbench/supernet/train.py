"""Distilling the supernet: closed-form output projections, block-wise alignment, then random sub-networks.

1. ridge: nasbench.supernet.ridge solves every output projection on the teacher's activations and calibrates the gates.
2. align: one pass of the teacher gives every layer's input and the attention's output; every alternative of every layer
   learns that map by itself. No gradient crosses a layer, so a step costs the mixers' forward and backward only.
   At the end the output projections are solved again ("refit").
3. supernet: a random sub-network per step, KL to the teacher's distribution; only its mixers get gradients.

MLPs, norms, embeddings and the attention stay as they are throughout.

A finished run takes more tokens: the stage gets another cycle of the learning rate over the new tokens
(nasbench.supernet.loop). Where alignment grows after random sub-networks were trained, it continues from the present
weights, and the whole supernet stage follows again.
"""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nasbench.checkpoints.load import LoadedModel, load_model
from nasbench.core.by_device import ByDevice
from nasbench.core.errors import MachineError, UserError
from nasbench.data.packing import Batch, Corpus
from nasbench.model.block import Block, kinds_without_varlen
from nasbench.parallel import fsdp
from nasbench.parallel.context import SINGLE, DistContext
from nasbench.runs import Run
from nasbench.spaces.placement import Placement
from nasbench.supernet import checkpoint
from nasbench.supernet.loop import Loop, Notice, Progress, silent, stop_on_signal
from nasbench.supernet.optimizer import MasterAdamW
from nasbench.supernet.ridge import calibrate, out_name, solve_output_projections
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.steps import AlignStage, Stage, SubnetStage, nonfinite_layer, sample_placement
from nasbench.supernet.supernet import Supernet

STAGES = ("align", "supernet")
SOLVE_BATCH_TOKENS = ByDevice(cpu=2048, cuda=32768)
"""Tokens of one forward while output projections are solved; without gradients more fit at once."""
_FREE_TO_CHANGE = ("log_every", "checkpoint_every_s", "recompute", "graphs", "shard", "tensorboard")
_OFFSETS = {"ridge": 0, "refit": 1, "align": 2, "supernet": 3}
"""Added to the seed, so that stages see the text in different orders."""


def training_corpus(
    run: Run, net: Supernet, config: DistillConfig, sequence: int | None = None, corpus: Corpus | None = None
) -> Corpus:
    """The run's text in rows of `sequence` tokens (the run's own by default), or `corpus` where it is read already.
    Raises UserError, also when documents are to be kept apart and a mixer cannot, or rows are to repeat."""
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
    """Trains the supernet of a run, from its newest checkpoint on. With `config.shard` the model comes on the CPU; the
    first of several processes has it alone, the others have it on the meta device.

    Raises UserError when the run was begun with other settings.
    """

    def __init__(
        self,
        run: Run,
        loaded: LoadedModel,
        config: DistillConfig,
        stop: threading.Event,
        progress: Progress = silent,
        notice: Notice = silent,
        workers: DistContext = SINGLE,
        corpus: Corpus | None = None,
    ) -> None:
        self.run, self.config, self.stop, self.workers = run, config, stop, workers
        self.progress, self.notice = progress if workers.is_main else silent, notice
        self.net = Supernet(
            loaded, run.spec.space, config.frozen, run.spec.seed, transfer=config.transfer, solved=config.solved
        )
        self.corpus = training_corpus(run, self.net, config, corpus=corpus)
        fsdp.check(config.shard)
        fsdp.spread(self.net, config.shard, workers)
        self.device = loaded.decoder.device
        lists = {"frozen": list(config.frozen), "solved": list(config.solved)}
        settings = {key: value for key, value in asdict(config).items() if key not in _FREE_TO_CHANGE} | lists
        dtype = str(loaded.decoder.dtype).removeprefix("torch.")
        self.state: dict[str, Any] = {
            **lists,
            "settings": {**settings, "dtype": dtype, "corpus": self.corpus.fingerprint},
            "cycles": {stage: [settings[f"{stage}_tokens"]] for stage in STAGES},
        }
        self.weights: dict[str, Tensor] = {}
        """Master weights, fp32, between stages; the parameters themselves where they are sharded."""

    def train(self) -> Supernet:
        """Runs what is left of the stages and returns the trained supernet."""
        saved = checkpoint.latest(self.run.supernet)
        self.workers.wait(self.device)  # nobody writes before all have read
        if self.workers.is_main:
            checkpoint.tidy(self.run.supernet, saved)
        if saved is None:
            self._check_teacher()
            self.prepare()
            saved = self._between(STAGES[0] if self.net.trained() else "done")
            stage, start = str(saved.state["stage"]), 0
        else:
            stage, start = self.resume_point(saved)
            self.weights = saved.weights("cpu" if self.net.sharded else str(self.device))
            self.net.load_weights(self.weights)  # no optimiser puts back what is solved and not trained
            if self.net.sharded:
                self.weights = self._masters()
        resumed = saved if saved.state["stage"] == stage and saved.state["step"] else None
        for name in STAGES[STAGES.index(stage) :] if stage != "done" else ():
            self._train_stage(name, start, resumed)
            start, resumed = 0, None
            if name == "align":
                self.net.load_weights(self.weights)
                if self.config.align_tokens:
                    self._solve("refit", self.config.ridge_tokens)
                    solved = {f"{group}.{out_name(mixer)}" for group, mixer in self.net.closed_form().items()}
                    self.weights |= {key: tensor for key, tensor in self._masters().items() if key in solved}
            saved = self._between("supernet" if name == "align" else "done")
        self.net.load_weights(self.weights)
        self.net.version = saved.version
        for mixer in self.net.mixers():
            mixer.requires_grad_(False)
        return self.net

    def _check_teacher(self) -> None:
        """Raises MachineError where the model itself gives numbers that are not finite, naming the first layer."""
        batch = self.corpus.batch(0, 1, self._seed("ridge")).to(self.device)
        if name := nonfinite_layer(self.net, self.net.space.original, batch, self.workers):
            dtype = self.state["settings"]["dtype"]
            raise MachineError(
                f"{name}: {self.net.source} itself gives numbers that are not finite in {dtype}: nothing can learn "
                "from it; choose another --dtype or another model"
            )

    def prepare(self, tokens: int | None = None) -> None:
        """The supernet before its first step: output projections solved, from the configured number of tokens or
        `tokens`, and the weights as masters."""
        self._solve("ridge", self.config.ridge_tokens if tokens is None else tokens)
        self.weights = self._masters()

    def _masters(self) -> dict[str, Tensor]:
        """The present weights as masters."""
        present = {name: parameter.detach() for name, parameter in self.net.trained_parameters().items()}
        return present if self.net.sharded else {name: tensor.float().clone() for name, tensor in present.items()}

    def step_rows(self, stage: str) -> int:
        """Sequences of a step of a stage, over all processes."""
        return max(1, int(getattr(self.config, f"{stage}_batch_tokens")) // self.corpus.sequence)

    def steps(self, stage: str, tokens: int) -> int:
        """Steps that `tokens` tokens of a stage are."""
        return tokens // (self.step_rows(stage) * self.corpus.sequence)

    def resume_point(self, saved: checkpoint.Checkpoint) -> tuple[str, int]:
        """Takes the saved run's cycles, adds those that are asked for beyond them, ends an unfinished one earlier where
        less is asked for, and returns stage and step to go on with. Raises UserError when the run was begun with other
        settings, or has trained more than what is asked for."""
        old, new = saved.state.get("settings", {}), self.state["settings"]
        stage, start = str(saved.state["stage"]), int(saved.state["step"])
        order = (*STAGES, "done")
        # Steps that a stage has taken: None of a finished one, which cannot end earlier.
        taken = {name: None if order.index(name) < order.index(stage) else start * (name == stage) for name in STAGES}

        def free(key: str) -> bool:
            name = key.removesuffix("_tokens")
            if name not in STAGES or old.get(key, 0) < new[key]:
                return name in STAGES
            done = taken[name]
            return done is not None and self.steps(name, new[key]) > done

        changed = [
            f"{key} {old.get(key)!r} (asked: {new[key]!r})" for key in new if old.get(key) != new[key] and not free(key)
        ]
        if changed:
            raise UserError(
                f"{self.run.path} was distilled with another {', '.join(changed)}: "
                "ask for the same, for more tokens, or choose another folder"
            )
        known = saved.state.get("cycles") or {name: [old[f"{name}_tokens"]] for name in STAGES}
        grown = []
        for name in STAGES:
            asked = new[f"{name}_tokens"]
            ends = [min(end, asked) for end in known[name] if end]
            if self.steps(name, asked) > self.steps(name, ends[-1] if ends else 0):
                grown.append(name)
                ends.append(asked)
            self.state["cycles"][name] = ends
        if "align" in grown and stage != "align":
            self.state["cycles"]["supernet"] = [new["supernet_tokens"]]
            return "align", self.steps("align", (known["align"] or [0])[-1])
        if "supernet" in grown and stage == "done":
            return "supernet", self.steps("supernet", (known["supernet"] or [0])[-1])
        return stage, start

    def _seed(self, stage: str) -> int:
        return self.run.spec.seed * len(_OFFSETS) + _OFFSETS[stage]

    def _solve(self, stage: str, tokens: int) -> None:
        sequence, net = self.corpus.sequence, self.net
        rows = max(1, min(SOLVE_BATCH_TOKENS.of(self.device) // sequence, tokens // sequence))
        batches = tokens // (rows * sequence)
        if not batches:
            return

        def batch(index: int) -> Batch:
            return self.corpus.batch(index, rows, self._seed(stage)).to(self.device)

        def progress(done: int) -> None:
            self.progress(stage, done, batches * rows * sequence)
            if self.stop.is_set():
                raise KeyboardInterrupt

        # Where nothing trains a kind, solving it again on other text would change nothing but its noise.
        solved = net.closed_form() if stage == "ridge" else net.trained()
        mixers: list[dict[str, Block]] = [
            {name: solved[key] for name in net.space.alternatives(i) if (key := f"layers.{i}.{name}") in solved}
            for i in range(net.space.num_layers)
        ]
        if stage == "ridge":
            calibrate(net.teacher, mixers, batch(0), self.workers)
        solve_output_projections(
            net.teacher, mixers, map(batch, range(batches)), self.config.ridge, progress, self.workers
        )

    def _between(self, stage: str) -> checkpoint.Checkpoint:
        """A checkpoint at the start of a stage: weights alone."""
        state = {**self.state, "stage": stage, "step": 0}
        return checkpoint.save(self.run.supernet, f"{stage}-{0:08d}", self.weights, {}, state, self.workers)

    def placements(self, step: int) -> list[Placement]:
        """The sub-networks of a step of the supernet stage."""
        space, seed = self.net.space, self.run.spec.seed
        steps = self.steps("supernet", self.state["cycles"]["supernet"][-1])
        sampled = sample_placement(space, self.config, seed, step, step / max(1, steps))
        if not self.config.sandwich:
            return [sampled]
        smallest = sample_placement(space, self.config.updated({"smallest_every": 1}), seed, step)
        return list(dict.fromkeys((smallest, sampled)))

    def stage(self, name: str) -> Stage:
        """A stage of the trained mixers, from the present master weights on. It takes them over: `weights` keeps what
        it does not train."""
        config, space = self.config, self.net.space
        groups = {group: dict(mixer.named_parameters()) for group, mixer in self.net.trained().items()}
        lr = getattr(config, f"{name}_lr")
        optimizer = MasterAdamW(groups, lr=lr, weight_decay=config.weight_decay, clip=config.clip)
        optimizer.set_masters(self.weights)
        self.weights = {key: tensor for key, tensor in self.weights.items() if key not in optimizer.masters}
        given = (name, self.net, optimizer, self.corpus, self.step_rows(name), self._seed(name), config, self.workers)
        if name == "align":
            return AlignStage(*given)
        return SubnetStage(*given, self.placements, [space.alternatives(i) for i in range(space.num_layers)])

    def _train_stage(self, name: str, start: int, resumed: checkpoint.Checkpoint | None) -> None:
        stage = self.stage(name)
        loop = Loop(
            self.run.supernet,
            stage,
            [self.steps(name, tokens) for tokens in self.state["cycles"][name]] or [0],
            self.state,
            self.stop,
            self.progress,
            self.notice,
            start,
            kept=self.weights,
        )
        loop.run(resumed, earlier=STAGES[: STAGES.index(name)])
        self.weights |= stage.optimizer.weights()


def distill(
    run: Run,
    config: DistillConfig,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = silent,
    notice: Notice = silent,
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
    fsdp.check(config.shard)
    loaded = loaded or load_model(run.spec.model, dtype=dtype, device=fsdp.place_of(config.shard, device, workers))
    with stop_on_signal() as stop:
        return Distiller(run, loaded, config, stop, progress, notice, workers, corpus).train()
