"""`nasbench search`: placements ranked by the supernet's accuracy and the profiled speed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.cli.common import AsJson, DryRun
from nasbench.core.errors import UserError
from nasbench.core.sizes import is_count

if TYPE_CHECKING:
    from nasbench.search.run_folder import Outcome
    from nasbench.search.trials import FrontRow, Target


def command(
    run: Annotated[Path, typer.Argument(help="Run folder with a distilled supernet, e.g. runs/NAME.")],
    strategy: Annotated[str, typer.Option(help="How placements are found; `list` names all ways.")] = "beam",
    objective: Annotated[
        str,
        typer.Option(
            help="Task or weighted mix of tasks to be good at, as for --tasks of nasbench eval; or a cost, e.g. "
            "decode_tok_s@h200,64k,max."
        ),
    ] = "kl",
    full_attention: Annotated[
        str, typer.Option("--full-attention", "-k", help="Layers with full attention, e.g. 4 or 4,8,15.")
    ] = "",
    most: Annotated[
        list[str] | None,
        typer.Option("--max", help="Most of a cost or task: NAME=VALUE[@DEVICE,CONTEXT,BATCH], e.g. cache=64MiB@64k."),
    ] = None,
    least: Annotated[
        list[str] | None,
        typer.Option("--min", help="Least of a cost or task, e.g. decode_tok_s=8000@h200,64k,max."),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Profile database of the device to be fast on; default: this one's.")
    ] = "",
    context: Annotated[str, typer.Option(help="Context of a decoding sequence, e.g. 4k.")] = "",
    batch: Annotated[str, typer.Option(help="Sequences decoded at once.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of the speeds; default: what was profiled.")] = "",
    eval_dtype: Annotated[
        str, typer.Option(help="fp32 or bf16, in which the supernet is scored; default: as it was trained.")
    ] = "",
    replacement: Annotated[
        str, typer.Option(help="Kind of all other layers, e.g. J; default: each layer's best of the faster ones.")
    ] = "",
    evaluations: Annotated[
        int | None, typer.Option(help="Placements that the strategy may look at; default: 120, or what --seconds hold.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="About the time that the strategy takes.")] = 0.0,
    random: Annotated[int, typer.Option(help="Random placements of every K to compare with.")] = 1,
    beam_width: Annotated[int, typer.Option(help="Sets of layers that the beam keeps.")] = 4,
    candidates: Annotated[int, typer.Option(help="Layers that the beam tries to add to each.")] = 8,
    storage: Annotated[
        str,
        typer.Option(
            help="Where optuna keeps its study: a journal file, sqlite:///FILE or postgresql://USER@HOST/NAME; "
            "default: a journal file in the run."
        ),
    ] = "",
    worker: Annotated[
        bool, typer.Option("--worker", help="One of several such processes that share the storage and the run.")
    ] = False,
    search_tokens: Annotated[str, typer.Option(help="Held-out tokens that score a placement.")] = "2k",
    test_tokens: Annotated[str, typer.Option(help="Other held-out tokens for what was found; 0: none.")] = "4k",
    measure_finalists: Annotated[
        int, typer.Option(help="Measure so many of the best placements end to end, beside the predicted tokens/s.")
    ] = 0,
    device: Annotated[
        str, typer.Option("--device", "--on", help="Where scores are measured: auto, cpu or cuda.")
    ] = "auto",
    db: Annotated[Path | None, typer.Option(help="Folder or file of profile databases.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Rank placements by accuracy (supernet) and tokens/s (profiles); writes trials.csv and front.csv.

    The same command again continues where it stopped; what was evaluated once costs nothing. Device, context, batch,
    dtype and databases are by default those of the run's last search, in the first one the largest that were profiled.
    """
    from nasbench import api
    from nasbench.cli.common import print_json, print_plan, progress_bar, torch_device
    from nasbench.runs import Run
    from nasbench.search.inputs import SearchInputs
    from nasbench.search.session import MOST, USUAL

    given: dict[str, Any] = {
        "objective": objective, "most": most or (), "least": least or (), "profile": profile, "context": context,
        "batch": batch, "dtype": dtype, "search_tokens": search_tokens, "test_tokens": test_tokens,
        "device": torch_device(device), "db": db, "full_attention": parse_counts(full_attention),
        "evaluations": (MOST if seconds else USUAL) if evaluations is None else evaluations, "seconds": seconds,
        "random": random, "beam_width": beam_width, "candidates": candidates, "replacement": replacement,
        "seed": seed, "storage": storage, "worker": worker,
    }  # fmt: skip
    if dry_run:
        print_plan(SearchInputs.of(run, strategy, **given).plan(), json)
        return
    with progress_bar("search: reads model and text") as progress:
        outcome = api.search(
            run, strategy, eval_dtype=eval_dtype, measure_finalists=measure_finalists, progress=progress, **given
        )
    target = outcome.target
    if json:
        print_json(as_json(outcome, target, objective, Run.open(run).front))
    else:
        print_outcome(outcome, target)


def parse_counts(text: str) -> tuple[int, ...]:
    """`"4,8,15"` -> (4, 8, 15), ascending. Raises UserError for anything but whole numbers."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(is_count(part) for part in parts):
        raise UserError(f"bad --full-attention {text!r}: write whole numbers of layers, as 4 or 4,8,15")
    return tuple(sorted({int(part) for part in parts}))


def print_outcome(outcome: Outcome, target: Target) -> None:
    """Searched against evenly spread for every K, then the front."""
    from nasbench.cli.common import print_table
    from nasbench.cli.validate_command import print_measured

    for note in outcome.notes:
        print(note)
    if not outcome.front or outcome.best is None:
        print("no placement that was tried keeps to all limits: try more --evaluations, or loosen those on tasks")
        return
    first = outcome.front[0]
    what = "Loss" if first.objective in ("loss", "kl") else f"Score of {first.objective}"
    if outcome.comparisons:
        columns = ("K", "uniform", "searched", "gain", "tok/s", "searched placement")
        rows = [_comparison(pair) for pair in outcome.comparisons]
        print_table(columns, rows, f"{what}, searched against uniform ({target})")
        print()
    if text := str(outcome.trust):
        print(f"{text}\n")
    if outcome.limits:
        print(f"within the limits: {outcome.best.placement}, K {outcome.best.k}, score {outcome.best.score:.4f}")
        print_table(("limit", "predicted"), [(kept.limit, f"{kept.value:g}") for kept in outcome.limits])
        print()
    head = ("#", "K", what.lower().partition(" ")[0], "test loss", "tok/s", "×full", "MiB", "placement")
    full = next((row for row in outcome.front if row.strategy == "teacher"), first)
    print_table(head, [_front(row, full.decode_tok_s) for row in outcome.front], f"Pareto front ({target})")
    bounds = f"(reference: {what.lower().partition(' ')[0]} {first.reference_loss:.2f}, 0 tokens/s)"
    unit = "nats" if what == "Loss" else "score"
    print(f"\nhypervolume {first.hypervolume:.4g} {unit} x tokens/s {bounds}")
    if outcome.measured:
        print_measured(outcome.measured, target)
    if any(row.source == "estimated" for row in outcome.front):
        print("speeds marked ~ rest on estimated, not on measured rows")


def _comparison(pair: Any) -> tuple[object, ...]:
    searched, uniform = pair.searched, pair.uniform
    ours, theirs = searched.front_score, uniform.front_score
    return pair.k, f"{theirs:.4f}", f"{ours:.4f}", f"{theirs - ours:.4f}", _speed(searched), searched.placement


def _front(row: FrontRow, full_tok_s: float) -> tuple[object, ...]:
    gain, cache = f"{row.decode_tok_s / full_tok_s:.2f}", f"{row.cache_bytes / 2**20:.1f}"
    loss = "" if math.isnan(row.loss_test) else f"{row.loss_test:.4f}"
    return row.rank, row.k, f"{row.front_score:.4f}", loss, _speed(row), gain, cache, row.placement


def _speed(row: Any) -> str:
    return f"{'~' if row.source == 'estimated' else ''}{row.decode_tok_s:,.1f}"


def as_json(outcome: Outcome, target: Target, objective: str, path: Path) -> dict[str, Any]:
    """The outcome as plain data."""
    from dataclasses import asdict

    return {
        "target": asdict(target),
        "objective": objective,
        "front_csv": str(path),
        **asdict(outcome),
    }
