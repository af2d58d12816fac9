"""`nasbench run`: a recipe from the first stage to the report, each stage the command that a person would type."""

from __future__ import annotations

import math
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasbench.cli.common import AsJson, Device, DryRun
from nasbench.core.errors import UserError

if TYPE_CHECKING:
    from nasbench.pipeline import Step


def command(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (quickstart, smollm2-135m) or a TOML file.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/ and the recipe's name.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    cards: Annotated[
        str, typer.Option(help="With --dry-run: the training on paper for so many cards, as 1,8,64.")
    ] = "",
    card: Annotated[str, typer.Option(help="Of --cards: a device of `nasbench devices`; default: the one here.")] = "",
    as_json: AsJson = False,
) -> None:
    """Run a recipe. Stopped at any moment, the same command continues; finished stages are skipped."""
    found = {}
    for text in changes or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"bad --set {text!r}: write NAME=VALUE, as scale=0.1")
        found[name.strip()] = value.strip()
    if cards or card:
        _on_paper(recipe, found, ["--cards", cards, "--card", card, *["--dry-run"] * dry_run, *["--json"] * as_json])
        return
    run_recipe(recipe, out, device, found, dry_run=dry_run, as_json=as_json)


def _on_paper(name: str, changes: dict[str, str], words: list[str]) -> None:
    """What the recipe's training takes on GPUs that need not be here: its command, with these words."""
    from tempfile import TemporaryDirectory

    from nasbench.cli.main import run
    from nasbench.pipeline import prepare, read_recipe

    with TemporaryDirectory() as folder:
        steps, state = prepare(read_recipe(name), Path(folder) / "run", "cuda", {"dtype": "bf16", **changes})
        state.write_training()
        training = [step.words for step in steps if step.words[0] == "distill"]
        if not training:
            raise UserError(f"recipe {name} has no stage `distill`: --cards says what training takes")
        for each in training:
            if code := run([*each, *words]):
                raise typer.Exit(code)


def run_recipe(
    name: str, out: Path | None, device: str, changes: dict[str, str], *, dry_run: bool = False, as_json: bool = False
) -> None:
    """What `nasbench run` and `nasbench quickstart` do. Raises typer.Exit with the code of a stage that failed."""
    from nasbench.cli.common import log, print_json, torch_device
    from nasbench.cli.main import parse, run
    from nasbench.pipeline import memory_words, prepare, read_recipe, run_steps

    recipe = read_recipe(name)
    out = out or Path("runs") / recipe.name
    steps, state = prepare(recipe, out, torch_device(device), changes)
    for step in steps:
        parse(list(step.words))
    if dry_run:
        _print_plan(recipe.title, steps, out, memory_words(state.settings), as_json)
        return
    began, page = time.monotonic(), out / "report" / "index.html"
    # What stages print belongs to standard output only where a person reads it.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        if code := run_steps(steps, state, run, log):
            raise typer.Exit(code)
        _summary(out)
    minutes = (time.monotonic() - began) / 60
    log(f"\nDone in {minutes:.1f} minutes. Open {page} in a browser.")
    if as_json:
        print_json({"out": str(out), "report": str(page) if page.is_file() else None, "minutes": minutes})


def _print_plan(title: str, steps: list[Step], out: Path, memory: str, as_json: bool) -> None:
    from nasbench.cli.common import print_json

    known = [step.seconds for step in steps if step.seconds is not None]
    if as_json:
        rows = [{"title": step.title, "command": step.command, "seconds": step.seconds} for step in steps]
        print_json({"out": str(out), "steps": rows, "seconds": sum(known), "memory": memory})
        return
    print(f"# {title}\n# {memory}" if memory else f"# {title}")
    for step in steps:
        told = "time not known" if step.seconds is None else f"about {step.seconds:.0f} s"
        print(f"\n# {step.title}, {told}\n{step.command}")
    more = "" if len(known) == len(steps) else f", and {len(steps) - len(known)} stages of unknown length"
    print(f"\n# in all about {sum(known) / 60:.0f} minutes{more}; measured on two CPU cores or one H200")


def _summary(out: Path) -> None:
    """The found placements in a table: the best of each K that was searched, below the model itself."""
    from nasbench.cli.common import log, print_table
    from nasbench.report.facts import collect
    from nasbench.report.sections import best_searched
    from nasbench.runs import Run
    from nasbench.search.run_target import run_db

    if not (out / "run.json").is_file():
        return
    facts = collect(Run.open(out), run_db(Run.open(out), None))
    found, speeds = facts.comparison, {row.placement: row.measured_tok_s for row in facts.validation}
    for target in facts.targets[:1]:
        trials = {trial.placement: trial for trial in target.trials}
        rows = []
        for best, even in best_searched(found):
            if (trial := trials.get(best.text)) is None:
                continue
            losses = [score.value if score else None for score in (found.scores(row, "loss") for row in (best, even))]
            full = target.full.decode_tok_s if target.full else math.nan
            gain = trial.decode_tok_s / full
            if target.full and best.text in speeds and target.full.placement in speeds:  # as the report says it
                gain = speeds[best.text] / speeds[target.full.placement]
            cells = [_known(value, form) for value, form in zip(losses, (".3f", ".3f"), strict=True)]
            cells += [f"{trial.decode_tok_s:,.1f}", _known(speeds.get(best.text), ",.1f"), _known(gain, ".2f")]
            rows.append((best.k, *cells, f"{trial.cache_bytes / 2**20:,.0f}", best.text))
        columns = ("K", "loss", "uniform", "tok/s", "measured", "×full", "cache MiB", "placement")
        print_table(columns, rows, f"{facts.shape.name} on {target.target}")
    log(
        "K layers keep full attention. Loss: nats a token on text that no search saw, beside evenly spread layers.\n"
        "Speed: predicted from the profile, and measured end to end. ×full: measured where both are, else predicted."
    )


def _known(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)
