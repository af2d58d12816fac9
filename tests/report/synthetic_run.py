"""A run folder with every file that a report reads, made up but of one piece. Nothing in it was measured."""

import math
import random

import numpy as np
from search.synthetic import SyntheticObjective

from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.files import write_text
from nasbench.cost import CostModel
from nasbench.evaluation.scores import ScoreKey, Scores, ScoreStore
from nasbench.runs import Run, RunSpec
from nasbench.search.objective import Speed
from nasbench.search.session import Options, Session, run_search
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import Target, TrialRow, add_trials, front_rows, read_trials, write_front
from nasbench.spaces.placement import format_placement
from nasbench.store import SHARED_BLOCKS, Database, Row, block_cells

NAMES = ("A", "W", "J", "G")
CONTEXTS, BATCHES = (1024, 2048, 4096, 8192), (1, 4)
BASE_US = {"A": 60.0, "W": 75.0, "J": 170.0, "G": 150.0, "norm": 5.0, "mlp": 330.0, "embedding": 8.0, "head": 2900.0}
PER_KTOKEN_US = {"A": 120.0}


def profile_rows(shape, device="made-up-cpu-2c", source="measured"):
    """Decode rows: a constant a block, growing with the batch and, for full attention, with the context."""
    rows = []
    for name, base in BASE_US.items():
        shared = name in SHARED_BLOCKS
        config = None if shared else shape.mixer(name)
        cells = block_cells(shape, name) if config is None else block_cells(shape, config.kind, config.args)
        for batch in BATCHES:
            for context in (0,) if shared else CONTEXTS:
                us = base * (0.6 + 0.4 * batch) + PER_KTOKEN_US.get(name, 0.0) * batch * context / 1024
                rate = {"gb_s": 3000 / us, "tflop_s": 90 / us / batch, "energy_j": 1e-6 * us}
                rate |= {"bandwidth_fraction": 150 / us, "compute_fraction": 45 / us / batch}
                rows.append(
                    Row(
                        device=device, **cells, batch=batch, context=context, dtype="bf16", source=source, **rate,
                        p20_us=0.97 * us, p50_us=us, p80_us=1.06 * us, repeats=30, torch="2.13.0", project="0.1.0",
                        measured_utc="2026-01-02T03:04:05Z",
                    )
                )  # fmt: skip
    return rows


class MadeUpObjective(SyntheticObjective):
    """Additive losses and the cost model's speeds for the default model's shape."""

    def __init__(self, shape, rows, context, batch):
        super().__init__(shape.num_layers, NAMES, seed=5, version="5f0c1d2e")
        scale = {"W": 0.05, "J": 0.22, "G": 0.3}
        self.cost = {key: value * scale[key[1]] for key, value in self.cost.items()}
        self.pair = self.pair * 0.1
        self.reference = math.log(shape.vocab_size)
        self.model = CostModel(rows, shape, "bf16")
        self.target = Target(rows[0].device, context, batch, "bf16")

    def kl(self, placement):
        return 0.8 * (self.loss(placement) - 3.0)

    def test_scores(self, placement):
        return self.loss(placement) + 0.02, 0.019, math.nan

    def speed(self, placement):
        cost = self.model.decode(placement, self.target.context, self.target.batch)
        return Speed(cost.decode_tok_s, math.nan, cost.step_ms, cost.cache_bytes, cost.source)


def make_run(
    path,
    *,
    device="made-up-cpu-2c",
    source="measured",
    targets=((8192, 4),),
    extras=True,
    strategies=("beam",),
    evaluations=30,
):
    """(run, folder of profile databases). `extras` False leaves out what later stages write."""
    assert "beam" in STRATEGIES
    run = Run.create(path / "run", RunSpec("default", NAMES, 30))
    shape = resolve_shape("default")
    rows = profile_rows(shape, device, source)
    Database(path / "db" / f"{device}.csv").merge(rows)
    for context, batch in targets:
        objective = MadeUpObjective(shape, rows, context, batch)
        objective.store = ScoreStore(run.scores)
        for strategy in strategies:
            search = Session(run.path, objective, Options((1, 2, 4, 8, 15), evaluations=evaluations))
            run_search(search, strategy)
        found = front_rows(search.trials(), objective.reference, objective.test_scores)
        write_front(run.front, objective.target, found)
    if extras:
        _write_extras(run, objective, found)
    return run, path / "db"


def _write_extras(run, objective, front):
    lines = ["layer,name,loss_increase,loss_stderr,kl"]
    lines += [
        f"{layer},{name},{value:.6g},0.02,{1.1 * value:.6g}"
        for (layer, name), value in objective.importance(NAMES).items()
    ]
    write_text(run.path / "importance.csv", "\n".join(lines) + "\n")
    lines = ["placement,context,batch,predicted_tok_s,measured_tok_s,error,device,measured_utc"]
    target = objective.target
    for index, row in enumerate(front):
        measured = row.decode_tok_s * (1 + 0.05 * math.sin(3 * index))
        cells = (row.placement, target.context, target.batch, f"{row.decode_tok_s:.3f}", f"{measured:.3f}")
        lines.append(
            ",".join(
                map(str, (*cells, f"{row.decode_tok_s / measured - 1:.4f}", target.device, "2026-01-02T05:00:00Z"))
            )
        )
    write_text(run.validation, "\n".join(lines) + "\n")
    lines = ["stage,step,tokens,layer,name,loss"]
    for step in range(1, 17):
        for layer in range(0, 30, 3):
            for name, level in (("J", 0.5), ("G", 0.6)):
                lines.append(
                    f"align,{step},{step * 1024},{layer},{name},{level / (1 + 0.3 * step) + 0.001 * layer:.6g}"
                )
        lines.append(f"supernet,{step},{step * 1024},,,{1.8 / (1 + 0.2 * step):.6g}")
    write_text(run.supernet / "losses.csv", "\n".join(lines) + "\n")
    scores = {}
    for trial in {t.placement: t for t in Session(run.path, objective, Options()).trials()}.values():
        for task, value in (("loss", objective.loss(trial.layers) + 0.02), ("kl", objective.kl(trial.layers))):
            key = ScoreKey(objective.version, trial.placement, task, "test/32x256/abcd", "bfloat16")
            wiggle = np.random.default_rng(len(trial.placement)).normal(0, 0.02, 32)
            scores[key] = Scores.of(value + wiggle - wiggle.mean(), "nats", False)
    objective.store.put(scores)


def crowd(run, count):
    """Adds random placements to a made-up run until its last target has `count` trials."""
    trials = read_trials(run.trials)
    objective = MadeUpObjective(resolve_shape("default"), profile_rows(resolve_shape("default")), 8192, 4)
    draw, known = random.Random(1), {trial.placement for trial in trials}
    like = {name: getattr(trials[-1], name) for name in TrialRow.__dataclass_fields__} | {"strategy": "random"}
    rows, scores = [], {}
    wiggle = np.random.default_rng(0).normal(0, 0.02, 32)
    while len(known) < count:
        placement = tuple(draw.choices(NAMES, [draw.random() for _ in NAMES], k=30))
        text = format_placement(placement)
        if text not in known:
            known.add(text)
            speed = vars(objective.speed(placement))
            told = like | speed | {"placement": text, "k": placement.count("A"), "score": objective.kl(placement)}
            rows.append(TrialRow(**told))
            scores[rows[-1].score_key("loss")] = Scores.of(objective.loss(placement) + wiggle, "nats", False)
            scores[rows[-1].score_key("kl")] = Scores.of(objective.kl(placement) + wiggle, "nats", False)
    ScoreStore(run.scores).put(scores)
    add_trials(run.trials, rows)
    found = front_rows(read_trials(run.trials), objective.reference, objective.test_scores)
    write_front(run.front, objective.target, found)
