"""The recipe from the first step to the report, every stage continued where it stopped."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nasbench.checkpoints.resolve import resolve_shape
from nasbench.core.errors import UserError
from nasbench.reproduce import measure, ranks, searching, stages, table
from nasbench.reproduce.bench import Bench, Log
from nasbench.reproduce.items import Items, difference, mean_and_error, subject_of
from nasbench.reproduce.measure import Measurer, suite_files
from nasbench.reproduce.page import write_page
from nasbench.reproduce.recipe import Candidate, Plan, Recipe
from nasbench.reproduce.speed import Speeds
from nasbench.reproduce.summary import sections, write_summary
from nasbench.search.trials import TEACHER
from nasbench.spaces.placement import format_placement
from nasbench.supernet.loop import Progress, no_progress

REPORT = "report"


def facts_of(out: Path, recipe: Recipe) -> table.Facts:
    """What the tables are computed from, of the files of a run alone."""
    speeds = Speeds(out / "speeds.csv", resolve_shape(recipe.model), recipe.contexts, recipe.batches)
    chances = table.suite_chances(suite_files(recipe.suite))
    return table.Facts(Plan(out / "plan.json"), Items(out / "items.jsonl"), speeds, chances, recipe.quick_items)


def write_tables(folder: Path, facts: table.Facts) -> None:
    """The CSVs of `nasbench.reproduce.table` and `nasbench.reproduce.ranks` into a folder."""
    for name, rows in (
        ("table", table.table_rows(facts)),
        ("suite", table.suite_rows(facts)),
        ("comparison", table.comparison_rows(facts)),
        ("ranks", ranks.rank_rows(facts)),
        ("curve", facts.plan["curve"] or []),
    ):
        table.write_cells(folder / f"{name}.csv", rows)


def write_report(out: Path, recipe: Recipe, command: str) -> Path:
    """Tables and page of what a run has so far, and the small files that they were computed from. They show the command
    that the run was made with; `command` where none was kept."""
    facts = facts_of(out, recipe)
    if facts.teacher is None:
        raise UserError(f"{out} has nothing to report yet: run nasbench reproduce --out {out}")
    folder = out / REPORT
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, facts)
    for name in ("plan.json", "speeds.csv", "importance.csv", "supernet/losses.csv", "supernet/progress.csv"):
        if (out / name).is_file():
            shutil.copyfile(out / name, folder / Path(name).name)
    command = facts.plan["command"] or command
    write_summary(folder, facts, words(facts), command)
    title = f"{resolve_shape(recipe.model).name}: placements compared"
    return write_page(folder, title, words(facts), command, sections(facts))


def words(facts: table.Facts) -> str:
    """What was done, in a paragraph."""
    plan = facts.plan
    trained = "; ".join(
        f"{stage} {plan[stage]['tokens'] / 1e6:,.3g} million tokens at {plan[stage]['tok_s']:,.0f} tokens/s"
        for stage in ("align", "supernet")
        if plan[stage]
    )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in (plan["seconds"] or {}).items())
    source = f"The model: {plan['source']}. " if plan["source"] else ""
    return (
        f"{source}Every layer's alternatives: {trained}. Seconds of the stages: {seconds}. Before finalising, all "
        f"have the supernet's weights. {asked_words(facts)} "
        "Errors are standard errors over items; gaps are item by item."
    )


def asked_words(facts: table.Facts) -> str:
    """How many placements were asked how much; a run that was short of seconds has not asked all."""
    subjects = dict.fromkeys(subject_of(row) for row in facts.plan.candidates)
    whole = sum(table.suite_score(facts, each) is not None for each in subjects)
    few = sum(table.best_suite_score(facts, each) is not None for each in subjects) - whole
    if whole == len(subjects):
        return f"All {whole} have held-out loss and KL and were asked every item of the benchmarks."
    parts = [f"All {len(subjects)} have held-out loss and KL"]
    if facts.chances:
        parts.append(f"{whole} were asked every item of the benchmarks")
    if few:
        parts.append(f"{few} others {facts.quick_items} items of each, beside the model's score on the same items")
    return "; ".join(parts) + "."


def reproduce(
    recipe: Recipe,
    out: Path,
    command: str,
    *,
    device: str,
    dtype: torch.dtype,
    log: Log,
    progress: Progress = no_progress,
    helpers: Sequence[str] = (),
) -> Path:
    """Runs every stage for about its seconds, and returns the report's page. Stopped, the same call continues.

    Args:
        helpers: torch devices that measure placements beside `device`, each in a process of its own.
    """
    began = time.monotonic()
    for path in suite_files(recipe.suite):
        table.suite_chances([path])
    if recipe.suite is not None and not suite_files(recipe.suite):
        raise UserError(f"bad suite {recipe.suite}: a folder of .jsonl files of benchmark items")
    bench = Bench(recipe, out, device, dtype, log, progress)
    bench.corpus.held_out("test", recipe.test_tokens)
    log(f"model and text read: {bench.corpus.train.numel():,} tokens to train on, {time.monotonic() - began:.0f} s")
    bench.plan["source"] = bench.loaded.source
    bench.plan["command"] = command
    items = Items(out / "items.jsonl")

    def timed(name: str, work: object) -> None:
        """Runs a stage and adds its time to the plan's."""
        assert callable(work)
        start = time.monotonic()
        try:
            work()
        finally:
            seconds = bench.plan["seconds"] or {}
            bench.plan["seconds"] = {**seconds, name: round(seconds.get(name, 0) + time.monotonic() - start, 1)}
        log(f"{time.monotonic() - began:.0f} s: {name} done")

    def after(candidate: Candidate, tokens: int, folder: Path) -> None:
        on_curve(bench, items, candidate, tokens)

    timed("train", lambda: stages.train(bench))
    timed("search", lambda: searching.search(bench))
    for count in recipe.finalized:
        timed(f"finalize-{count}", lambda count=count: stages.finalise(bench, count, after))
    for name in recipe.remedies:
        timed(f"remedy-{name}", lambda name=name: stages.remedy(bench, name, after))
    timed("speed", lambda: measure.measure_speeds(bench))

    def refresh() -> None:
        write_tables(out / REPORT, facts_of(out, recipe))

    try:
        timed("measure", lambda: measure.measure_all(bench, items, refresh, helpers))
    finally:
        # Measuring takes longest: what is there when it is stopped is worth a page.
        page = write_report(out, recipe, command)
    return page


def on_curve(bench: Bench, items: Items, candidate: Candidate, tokens: int) -> None:
    """Held-out loss, KL and retrieval after so many tokens of finalising, beside those of the supernet's weights: a row
    of the plan's curve. Measured anew: the weights are gone once training goes on."""
    curve = list(bench.plan["curve"] or [])
    known = {(row["placement"], row["weights"], row["tokens"]) for row in curve}
    measurer = Measurer(bench, items)
    teacher = next(row for row in bench.plan.candidates if row.method == TEACHER)
    measurer.held_out([teacher])
    reference = items.get(subject_of(teacher), "loss")
    for row, count in ((Candidate(candidate.k, candidate.method, candidate.placement), 0), (candidate, tokens)):
        name = format_placement(row.placement)
        if (name, candidate.weights, count) in known:
            continue
        found = measurer.evaluator(row).held_out([row.placement], "test")[row.placement]
        loss, kl = (values.double().numpy() for values in found)
        gap, gap_error = difference(loss, reference)
        mean, error = mean_and_error(kl)
        asked = measurer.recalled(row)
        curve.append(
            {"k": row.k, "placement": name, "weights": candidate.weights, "tokens": count, "loss_above_teacher": gap,
             "loss_above_teacher_se": gap_error, "kl": mean, "kl_se": error,
             "retrieval": None if math.isnan(asked[0]) else asked[0],
             "retrieval_se": None if math.isnan(asked[1]) else asked[1]}
        )  # fmt: skip
    bench.plan["curve"] = curve
    bench.forget()
