"""The stages of a reproduction up to its weights: alignment and supernet, search, finalising, remedies.

Every stage is the one that its own command runs; here each gets a budget in tokens or evaluations that fills the
seconds asked for, from a few timed steps on this device.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nasbench.backbone.load import LoadedModel, load_model
from nasbench.backbone.shapes import ModelShape
from nasbench.devices import detect
from nasbench.engine.throughput import DTYPE_NAMES
from nasbench.errors import MachineError
from nasbench.evaluation.evaluator import Evaluator
from nasbench.reproduce import recall
from nasbench.reproduce.recipe import Candidate, Plan, Recipe
from nasbench.reproduce.speed import Speeds
from nasbench.runs import Run, RunSpec
from nasbench.search import strategies
from nasbench.search.objective import Loss, Speed
from nasbench.search.session import Options, Search, baselines
from nasbench.search.trials import TEACHER, UNIFORM, Target, Trial, best_of
from nasbench.spaces.placement import Placement, format_placement, kind_of, uniform_placement
from nasbench.supernet import checkpoint
from nasbench.supernet.data import Corpus
from nasbench.supernet.estimate import time_steps
from nasbench.supernet.finalize import AVERAGE, average_final, finalize
from nasbench.supernet.loop import Progress, no_progress
from nasbench.supernet.self_corpus import BATCH, Writing, write_corpus
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.supernet import Supernet
from nasbench.supernet.train import Distiller, distill

STRATEGIES = ("beam", "kl-greedy")
SEARCHED = (*STRATEGIES, recall.METHOD)
CURVE = (0.25, 1.0)
"""Shares of a finalised hybrid's tokens after which it is measured: what more of them bring."""
SELF_TOKENS = {"cpu": 16 << 10, "cuda": 4 << 20}
"""Tokens that the model writes for the remedy of that name, by the kind of the device."""
MOST_EVALUATIONS = 1000
"""Of one search; a run that went on finds what it knows in no time, and would think the device that fast."""
Log = Callable[[str], None]


@dataclass
class Bench:
    """What all stages share: the run, its model and text, read once."""

    recipe: Recipe
    out: Path
    device: str
    dtype: torch.dtype
    log: Log
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        self.plan = Plan(self.out / "plan.json")
        self.loaded: LoadedModel = load_model(self.recipe.model, dtype=self.dtype, device=self.device)
        self.shape: ModelShape = self.loaded.shape
        recipe = self.recipe
        self.recipe.check(self.shape.num_layers)
        data = str(Path(recipe.data).resolve()) if recipe.data and Path(recipe.data).exists() else recipe.data
        spec = RunSpec(recipe.model, recipe.names, self.shape.num_layers, data, recipe.sequence, recipe.seed)
        self.run = Run.create(self.out, spec)
        self.speeds = Speeds(self.out / "speeds.csv", self.shape, recipe.contexts, recipe.batches)

    @cached_property
    def memo(self) -> dict[object, Any]:
        """What tasks make once for all placements: tokenised questions, texts that the teacher wrote."""
        return {}

    @cached_property
    def corpus(self) -> Corpus:
        return self.read(self.run.spec.data, self.recipe.sequence)

    def read(self, data: str, sequence: int) -> Corpus:
        """Text in rows; each row is read as one text where the settings say so."""
        corpus = Corpus.load(data, self.loaded.tokenizer, sequence)
        return corpus if self.recipe.training.documents else corpus.without_documents()

    def evaluator(self, net: Supernet) -> Evaluator:
        recipe = self.recipe
        return Evaluator(
            self.run,
            net,
            self.corpus,
            search_tokens=recipe.search_tokens,
            test_tokens=recipe.test_tokens,
            memo=self.memo,
        )

    def supernet(self) -> Supernet:
        """The trained one, read anew: finalising trains the mixers that it is given."""
        return Supernet.load(self.run, dtype=self.dtype, device=self.device, loaded=self.loaded)

    @cached_property
    def supernet_evaluator(self) -> Evaluator:
        """Of the supernet as it was trained; for after the training."""
        return self.evaluator(self.supernet())

    def forget(self) -> None:
        """Gives memory back that captured graphs and their tensors held."""
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def budget(bench: Bench, stage: str, seconds: float) -> dict[str, float]:
    """The plan of a training stage: the largest batch up to the settings' that fits, tokens/s, tokens. More seconds
    than planned before give more tokens at the speed measured then."""
    known = bench.plan[stage]
    if known is None:
        tokens, tok_s = _largest_step(bench, stage)
        known = {"batch_tokens": tokens, "tok_s": tok_s, "seconds": 0.0, "tokens": 0}
    if seconds > known["seconds"]:
        steps = max(1, int(seconds * known["tok_s"] / known["batch_tokens"])) if seconds else 0
        known = {**known, "seconds": seconds, "tokens": steps * known["batch_tokens"]}
    bench.plan[stage] = known
    bench.log(
        f"{stage}: {known['tokens']:,.0f} tokens in steps of {known['batch_tokens']:,} at {known['tok_s']:,.0f}/s"
    )
    return dict(known)


def _largest_step(bench: Bench, stage: str) -> tuple[int, float]:
    """(tokens of a step, tokens/s): batches are halved until one fits."""
    config = bench.recipe.training
    size = config.align_batch_tokens if stage == "align" else config.supernet_batch_tokens
    while True:
        changed = config.updated({"align_batch_tokens": size, "supernet_batch_tokens": size})
        fits = True
        try:
            distiller = Distiller(bench.run, bench.loaded, changed, threading.Event(), corpus=bench.corpus)
            distiller.prepare(0)
            tokens, seconds = time_steps(distiller, stage)
        except torch.OutOfMemoryError:
            fits = False
        # Outside of the handler: the exception holds the frames, and the frames hold the tensors.
        distiller = None  # type: ignore[assignment]
        bench.forget()
        if fits:
            return tokens, tokens / seconds
        if size <= bench.recipe.sequence:
            raise MachineError(f"not one row of {bench.recipe.sequence} tokens fits into a step of {stage}")
        size //= 2


def train(bench: Bench) -> None:
    """Alignment and supernet, each for about its seconds. Continues what was stopped."""
    recipe, config = bench.recipe, bench.recipe.training
    plans = {
        stage: budget(bench, stage, seconds)
        for stage, seconds in (("align", recipe.align_seconds), ("supernet", recipe.supernet_seconds))
    }
    changes = {f"{stage}_tokens": int(plan["tokens"]) for stage, plan in plans.items()}
    changes |= {f"{stage}_batch_tokens": int(plan["batch_tokens"]) for stage, plan in plans.items()}
    began = time.monotonic()
    distill(
        bench.run, config.updated(changes), device=bench.device, dtype=bench.dtype, progress=bench.progress,
        notice=bench.log, loaded=bench.loaded, corpus=bench.corpus,
    )  # fmt: skip
    bench.forget()
    bench.log(f"alignment and supernet: {time.monotonic() - began:.0f} s")


class MeasuredObjective:
    """A search's world: losses of the supernet, decode speed as `Speeds` measured the pure models."""

    def __init__(self, bench: Bench, evaluator: Evaluator) -> None:
        self.space = evaluator.supernet.space
        context = bench.recipe.contexts[0]
        self.target = Target(
            detect(bench.device).slug, context, bench.speeds.batches[context], DTYPE_NAMES[bench.dtype]
        )
        self.version = evaluator.supernet.version
        self.reference_loss = 0.0
        self._bench, self._evaluator = bench, evaluator

    def losses(self, placements: list[Placement]) -> list[Loss]:  # type: ignore[override]
        measured = self._evaluator.measure(placements, "search")
        return [Loss(scores["loss"].value, scores["loss"].stderr, scores["kl"].value) for scores in measured]

    def speed(self, placement: Placement) -> Speed:
        found = self._bench.speeds.of(placement, self.target.context)
        if found is None:
            raise MachineError(
                f"no decode speed of {format_placement(placement)} at {self.target.context} could be had"
            )
        return found

    def importance(self, names: tuple[str, ...]) -> dict[tuple[int, str], float]:  # type: ignore[override]
        rows = self._evaluator.importance(names, lambda done, total: self._bench.progress("importance", done, total))
        # A single layer hardly moves the loss, by less than its noise; the divergence tells fillers apart.
        return {(row.layer, row.name): row.kl for row in rows}


def search(bench: Bench) -> None:
    """Beam and KL-greedy search of every 0 < K < layers, and the placements that they are compared with; all of them
    become candidates of the table."""
    recipe, layers = bench.recipe, bench.shape.num_layers
    for name in recipe.names:
        bench.speeds.measure((name,) * layers, bench.device, bench.dtype, bench.log)
    evaluator = bench.supernet_evaluator
    objective = MeasuredObjective(bench, evaluator)
    if bench.plan["searched"] == objective.version:
        return
    inner = tuple(count for count in recipe.counts if 0 < count < layers)
    options = Options(full_attention=inner, evaluations=1, seed=recipe.seed)
    began = time.monotonic()
    state = Search(bench.run.path, objective, options, bench.progress)  # type: ignore[arg-type]
    singles = len(state.useful) * layers + 1
    assert state.importance
    rate = singles / max(1e-6, time.monotonic() - began)
    # A search that was stopped asks again for what it knows: for the same number of evaluations.
    afforded = max(8 * len(inner), int(recipe.search_seconds * rate / len(SEARCHED)))
    evaluations = bench.plan["evaluations"] or min(afforded, MOST_EVALUATIONS)
    bench.plan["evaluations"] = evaluations
    state.options = replace(options, evaluations=evaluations)
    baselines(state)
    for name in STRATEGIES:
        strategies.STRATEGIES[name](state)
        bench.log(f"{name}: {evaluations} evaluations at most, {time.monotonic() - began:.0f} s since the search began")
    bench.plan["base"] = format_placement(state.base)
    found: dict[int, Placement] = {}
    if (judge := _recall(bench, evaluator, state.base)) is not None:
        # A question costs more tokens than the text: the same time for fewer of them.
        allowed = int(evaluations * recipe.search_tokens / (recipe.search_tokens + judge.tokens))
        found = recall.recall_greedy(state, judge, inner, allowed)
        for count in recipe.finalized:
            if count in found:
                starts = [found[count], *(best_of(rows).layers for rows in _by_strategy(state, count))]
                found[count] = recall.exchange(state, judge, starts, allowed)
        bench.log(f"recall: done, {time.monotonic() - began:.0f} s since the search began")
    bench.plan["candidates"] = []
    bench.plan.add_candidates(candidates(state, recipe, found))
    bench.plan["searched"] = objective.version
    bench.forget()


def _recall(bench: Bench, evaluator: Evaluator, base: Placement) -> recall.Recall | None:
    """What judges placements by text and answers; None where the recipe asks no questions."""
    lengths = bench.recipe.quick_retrieval
    if not lengths:
        return None
    return recall.Recall(evaluator, min(lengths[0], bench.shape.max_context), base, bench.recipe.seed)


def _by_strategy(state: Search, count: int) -> list[list[Trial]]:
    """The trials of K layers that each of STRATEGIES made, where it made any."""
    trials = [trial for trial in state.trials() if trial.k == count]
    found = [[trial for trial in trials if trial.strategy == strategy] for strategy in STRATEGIES]
    return [rows for rows in found if rows]


def candidates(state: Search, recipe: Recipe, recalled: dict[int, Placement]) -> list[Candidate]:
    """Every placement of the table, those of one K together.

    Args:
        recalled: by K, what the search that minds retrieval found.
    """
    layers, found = state.space.num_layers, []
    names = [name for name in state.space.names if kind_of(name) != "A"]
    for count in recipe.counts:
        if count == layers:
            found.append(Candidate(count, TEACHER, state.space.original, weights=TEACHER))
            continue
        even = frozenset(i for i, name in enumerate(uniform_placement(layers, count, "W")) if name == "A")
        found.append(Candidate(count, UNIFORM, state.with_full(even)))
        for name in names:
            found.append(Candidate(count, UNIFORM, state.space.with_full_attention((name,) * layers, even), name))
        if count == 0:
            continue
        for seed in range(recipe.seeds):
            drawn = frozenset(random.Random(f"{recipe.seed}/{seed}/{count}").sample(range(layers), count))
            found.append(Candidate(count, f"random-{seed}", state.with_full(drawn)))
        for mine in _by_strategy(state, count):
            found.append(Candidate(count, mine[0].strategy, best_of(mine).layers))
        if count in recalled:
            found.append(Candidate(count, recall.METHOD, recalled[count]))
    return found


def chosen(bench: Bench, count: int) -> Candidate:
    """The searched placement of K layers that is finalised: the best on the search split, by the recipe's choice."""
    rows = [row for row in bench.plan.candidates if row.k == count and row.weights == "supernet"]
    if not rows:
        raise MachineError(f"no searched placement of {count} full-attention layers yet")
    found = [row for row in rows if row.method in SEARCHED] or rows
    evaluator, placements = bench.supernet_evaluator, [row.placement for row in found]
    judge = None
    if bench.recipe.choose == recall.METHOD:
        judge = _recall(bench, evaluator, bench.shape.parse(bench.plan["base"]))
    if judge is not None:
        shares = judge.shares(placements)
        # What it was chosen from, for whoever wonders.
        bench.plan[f"finalize-{count}-choices"] = [
            {"method": row.method, "placement": format_placement(row.placement), "text": round(text, 4),
             "answers": round(answers, 4)}
            for row in found for text, answers in [shares[row.placement]]
        ]  # fmt: skip
        return min(found, key=lambda row: sum(shares[row.placement]))
    scores = evaluator.divergences(placements)
    return found[min(range(len(found)), key=lambda i: (scores[i].value, i))]


def finalise(bench: Bench, count: int, after: Callable[[Candidate, int, Path], None]) -> None:
    """Distils the chosen placement of K layers further for about `finalize_seconds`.

    Args:
        after: called with the candidate, its tokens and its folder at each share of CURVE.
    """
    key = f"finalize-{count}"
    pick = bench.plan[f"{key}-placement"]
    if pick is None:
        row = chosen(bench, count)
        pick = {"placement": format_placement(row.placement), "method": row.method}
        bench.plan[f"{key}-placement"] = pick
    candidate = Candidate(count, pick["method"], bench.shape.parse(pick["placement"]), weights="final")
    config = replace(_settings(bench), supernet_lr=bench.recipe.finalize_lr)
    tok_s = float(bench.plan["supernet"]["tok_s"])
    spent = 0.0
    for share in CURVE:
        if _done(bench, f"{key}-{share}"):
            continue
        step = config.supernet_batch_tokens
        planned = bench.plan[f"{key}-{share}"]
        if planned is None:
            seconds = max(0.0, share * bench.recipe.finalize_seconds - spent)
            earlier = bench.plan[f"{key}-{CURVE[0]}"] or 0 if share != CURVE[0] else 0
            planned = earlier + max(int(share == CURVE[-1]), int(seconds * tok_s / step)) * step
            bench.plan[f"{key}-{share}"] = planned
        began = time.monotonic()
        folder = _finalise(bench, candidate, config, planned)
        seconds = time.monotonic() - began
        spent += seconds
        # The next share at the speed that this one had, where it was long enough to tell.
        if spent > 5 and planned:
            tok_s = planned / spent
            bench.plan[f"{key}-tok_s"] = tok_s
        bench.log(f"{format_placement(candidate.placement)}: {planned:,} tokens, {seconds:.0f} s")
        after(candidate, planned, folder)
        bench.plan[f"{key}-{share}-of"] = _supernet_version(bench)
    bench.plan.add_candidates([candidate])


def _supernet_version(bench: Bench) -> str:
    saved = checkpoint.latest(bench.run.supernet)
    return "" if saved is None else saved.version


def _done(bench: Bench, key: str) -> bool:
    """Whether a finalisation was done from the supernet that there is now. Asked for again with as many tokens it would
    begin anew, since it has gone on to more."""
    return bench.plan[f"{key}-of"] == _supernet_version(bench)


def _settings(bench: Bench) -> DistillConfig:
    return bench.recipe.training.updated({"supernet_batch_tokens": int(bench.plan["supernet"]["batch_tokens"])})


def _finalise(
    bench: Bench, candidate: Candidate, config: DistillConfig, tokens: int, name: str = "", corpus: Corpus | None = None
) -> Path:
    folder = finalize(
        bench.run, candidate.placement, config, tokens, device=bench.device, dtype=bench.dtype,
        progress=bench.progress, notice=bench.log, name=name, loaded=bench.loaded, corpus=corpus or bench.corpus,
    )  # fmt: skip
    bench.forget()
    return folder


def remedy(bench: Bench, name: str, after: Callable[[Candidate, int, Path], None]) -> None:
    """Distils the first finalised placement another way from the supernet's weights on, with as many tokens as the
    first point of its curve had: what is compared is the way, not the time. `average` trains nothing, and is made of
    every finalised placement."""
    if name == AVERAGE:
        for count in bench.recipe.finalized:
            _average(bench, count, after)
        return
    if _done(bench, f"remedy-{name}"):
        return
    count = bench.recipe.finalized[0]
    pick = bench.plan[f"finalize-{count}-placement"]
    if pick is None:
        raise MachineError(f"remedy {name} is for a finalised placement: finalise {count} layers first")
    candidate = Candidate(count, pick["method"], bench.shape.parse(pick["placement"]), weights=f"final:{name}")
    config = replace(_settings(bench), supernet_lr=bench.recipe.finalize_lr)
    corpus = bench.corpus
    if name == "mixers":
        config = config.updated({"whole": False})
    elif name == "hidden":
        config = config.updated({"hidden_weight": 1.0})
    elif name == "fast":
        config = config.updated({"supernet_lr": 3 * config.supernet_lr})
    elif name == "gentle":
        config = config.updated({"supernet_lr": config.supernet_lr / 3})
    elif name == "long":
        corpus = bench.read(bench.run.spec.data, min(4 * bench.recipe.sequence, bench.shape.max_context))
    elif name == "self":
        corpus = _own_words(bench)
    elif name == "plain":
        config = config.updated({"repeat_share": 0.0})
    step = max(config.supernet_batch_tokens, corpus.sequence)
    planned = bench.plan[f"remedy-{name}"]
    if planned is None:
        points = [bench.plan[f"finalize-{count}-{share}"] for share in CURVE]
        planned = max(1, next(filter(None, points), 0) // step) * step
        bench.plan[f"remedy-{name}"] = planned
    began = time.monotonic()
    folder = _finalise(bench, candidate, config, planned, name, corpus)
    bench.log(f"remedy {name}: {planned:,} tokens, {time.monotonic() - began:.0f} s")
    after(candidate, planned, folder)
    bench.plan.add_candidates([candidate])
    bench.plan[f"remedy-{name}-of"] = _supernet_version(bench)


def _average(bench: Bench, count: int, after: Callable[[Candidate, int, Path], None]) -> None:
    """The remedy that takes no training: of a finalised placement, weights half way from the supernet's."""
    key = f"remedy-average-{count}"
    pick, tokens = bench.plan[f"finalize-{count}-placement"], bench.plan[f"finalize-{count}-{CURVE[-1]}"]
    if _done(bench, key) or not tokens:
        return
    candidate = Candidate(count, pick["method"], bench.shape.parse(pick["placement"]), weights="final:average")
    folder = average_final(
        bench.run, candidate.placement, AVERAGE, dtype=bench.dtype, device=bench.device, loaded=bench.loaded
    )
    after(candidate, tokens, folder)
    bench.plan.add_candidates([candidate])
    bench.plan[f"{key}-of"] = _supernet_version(bench)


def _own_words(bench: Bench) -> Corpus:
    """Half of the rows the run's own text, half written by the model."""
    path = bench.run.path / "self.jsonl"
    if not path.is_file():
        kind = bench.device.split(":")[0]
        writing = Writing(bench.recipe.model, min(1024, bench.shape.max_context), BATCH[kind], seed=bench.recipe.seed)
        write_corpus(bench.loaded, writing, SELF_TOKENS[kind], path, bench.progress)
    own = bench.read(str(path), bench.recipe.sequence)
    rows = min(len(own.train), len(bench.corpus.train))
    train = torch.cat((own.train[:rows], bench.corpus.train[:rows]))
    return replace(own, train=train, ages={}, fingerprint=own.fingerprint[:16] + bench.corpus.fingerprint[:16])
