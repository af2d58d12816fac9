"""The stages of a reproduction that make weights: alignment and supernet, finalising, remedies.

Every stage is the one that its own command runs; here each gets a budget in tokens or evaluations that fills the
seconds asked for, from a few timed steps on this device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nasbench.core.errors import MachineError
from nasbench.data.packing import Corpus
from nasbench.data.self_corpus import BATCH, Writing, write_corpus
from nasbench.reproduce.bench import Bench
from nasbench.reproduce.recipe import Candidate
from nasbench.reproduce.searching import chosen
from nasbench.runtime.memory import free_bytes, ran_out
from nasbench.spaces.placement import format_placement
from nasbench.supernet import checkpoint
from nasbench.supernet.estimate import time_steps
from nasbench.supernet.finalize import AVERAGE, average_final, finalize
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.train import Distiller, distill

CURVE = (0.25, 1.0)
"""Shares of a finalised hybrid's tokens after which it is measured: what more of them bring."""
WORTH_GRAPHS = 1.05
"""Sub-networks' layers are replayed from CUDA graphs where that is so many times as fast: it takes their memory."""
SELF_TOKENS = {"cpu": 16 << 10, "cuda": 4 << 20}
"""Tokens that the model writes for the remedy of that name, by the kind of the device."""


def budget(bench: Bench, stage: str, seconds: float) -> dict[str, Any]:
    """The plan of a training stage: the largest batch up to the settings' that fits, whether its layers are replayed
    from graphs, tokens/s, tokens. More seconds than planned before give more tokens at the speed measured then."""
    known = bench.plan[stage]
    if known is None:
        known = {**_largest_step(bench, stage), "seconds": 0.0, "tokens": 0}
    if seconds > known["seconds"]:
        steps = max(1, int(seconds * known["tok_s"] / known["batch_tokens"])) if seconds else 0
        known = {**known, "seconds": seconds, "tokens": steps * known["batch_tokens"]}
    bench.plan[stage] = known
    bench.log(
        f"{stage}: {known['tokens']:,.0f} tokens in steps of {known['batch_tokens']:,} at {known['tok_s']:,.0f}/s"
    )
    return dict(known)


def _largest_step(bench: Bench, stage: str) -> dict[str, Any]:
    """How a step is made: its tokens, batches being halved until one fits, its tokens/s and the most memory that it
    takes; of sub-networks on a GPU also whether graphs are faster, as they are where the host launches more slowly than
    the GPU computes."""
    config = bench.recipe.training
    size = config.align_batch_tokens if stage == "align" else config.supernet_batch_tokens
    while (found := _timed_step(bench, stage, {f"{stage}_batch_tokens": size})) is None:
        if size <= bench.recipe.sequence:
            raise MachineError(f"not one row of {bench.recipe.sequence} tokens fits into a step of {stage}")
        size //= 2
    if stage == "supernet" and bench.device.startswith("cuda") and not (config.graphs or config.recompute):
        # A step keeps the activations of one kind in each layer, graphs those of all of them; finalising whole layers
        # later takes up to one more. What does not fit must not be tried: memory that runs out within a capture leaves
        # torch's allocator as it is there.
        needed = found["peak_bytes"] * (1 + len(bench.run.spec.names))
        if needed > free_bytes(bench.device):
            bench.log(f"{stage}: graphs would take {needed / 2**30:,.0f} GiB")
            return found
        replayed = _timed_step(bench, stage, {f"{stage}_batch_tokens": size, "graphs": True})
        told = "do not fit" if replayed is None else f"{replayed['tok_s']:,.0f}"
        bench.log(f"{stage}: {found['tok_s']:,.0f} tokens/s; from graphs: {told}")
        if replayed is not None and replayed["tok_s"] > WORTH_GRAPHS * found["tok_s"]:
            return replayed
    return found


def _timed_step(bench: Bench, stage: str, changes: dict[str, Any]) -> dict[str, Any] | None:
    """Tokens, tokens/s and memory of a stage's steps with changed settings; None where they do not fit."""
    config = bench.recipe.training.updated(changes)
    found: dict[str, Any] | None = None
    cuda = bench.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    try:
        distiller = Distiller(bench.run, bench.loaded, config, threading.Event(), corpus=bench.corpus)
        distiller.prepare(0)
        tokens, seconds = time_steps(distiller, stage)
        peak = torch.cuda.max_memory_allocated(bench.device) if cuda else 0
        found = {"batch_tokens": tokens, "tok_s": tokens / seconds, "graphs": config.graphs, "peak_bytes": peak}
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    # Outside of the handler: the exception holds the frames, and the frames hold the tensors.
    distiller = None  # type: ignore[assignment]
    bench.forget()
    return found


def train(bench: Bench) -> None:
    """Alignment and supernet, each for about its seconds. Continues what was stopped."""
    recipe, config = bench.recipe, bench.recipe.training
    plans = {
        stage: budget(bench, stage, seconds)
        for stage, seconds in (("align", recipe.align_seconds), ("supernet", recipe.supernet_seconds))
    }
    changes = {f"{stage}_tokens": int(plan["tokens"]) for stage, plan in plans.items()}
    changes |= {f"{stage}_batch_tokens": int(plan["batch_tokens"]) for stage, plan in plans.items()}
    changes |= {"graphs": plans["supernet"].get("graphs", config.graphs)}
    began = time.monotonic()
    distill(
        bench.run, config.updated(changes), device=bench.device, dtype=bench.dtype, progress=bench.progress,
        notice=bench.log, loaded=bench.loaded, corpus=bench.corpus,
    )  # fmt: skip
    bench.forget()
    bench.log(f"alignment and supernet: {time.monotonic() - began:.0f} s")


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
    for share in CURVE:
        if _done(bench, f"{key}-{share}"):
            continue
        step = config.supernet_batch_tokens
        planned = bench.plan[f"{key}-{share}"]
        if planned is None:
            tok_s = float(bench.plan[f"{key}-tok_s"] or bench.plan["supernet"]["tok_s"])
            seconds = max(0.0, share * bench.recipe.finalize_seconds - (bench.plan[f"{key}-spent"] or 0.0))
            earlier = bench.plan[f"{key}-{CURVE[0]}"] or 0 if share != CURVE[0] else 0
            planned = earlier + max(int(share == CURVE[-1]), int(seconds * tok_s / step)) * step
            bench.plan[f"{key}-{share}"] = planned
        began = time.monotonic()
        try:
            folder = _finalise(bench, candidate, config, planned)
        finally:
            # Also what a run that is stopped here has used: without it the device would seem faster than it is.
            spent = round((bench.plan[f"{key}-spent"] or 0.0) + time.monotonic() - began, 1)
            bench.plan[f"{key}-spent"] = spent
        # The next share at the speed that this one had, where it was long enough to tell.
        if spent > 5 and planned:
            bench.plan[f"{key}-tok_s"] = planned / spent
        bench.log(f"{format_placement(candidate.placement)}: {planned:,} tokens, {spent:.0f} s")
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
    plan, config = bench.plan["supernet"], bench.recipe.training
    return config.updated(
        {"supernet_batch_tokens": int(plan["batch_tokens"]), "graphs": plan.get("graphs", config.graphs)}
    )


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
