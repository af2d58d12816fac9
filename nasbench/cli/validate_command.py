"""`nasbench validate`: the found placements measured end to end, beside what the cost model said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasbench.cli.common import AsJson, DryRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nasbench.search.trials import Target
    from nasbench.search.validation import ValidationRow


def command(
    run: Annotated[Path, typer.Argument(help="Run folder that was searched, e.g. runs/NAME.")],
    context: Annotated[str, typer.Option(help="Context, e.g. 8k; default: as searched.")] = "",
    batch: Annotated[str, typer.Option(help="Batch; default: as searched.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; default: as searched.")] = "",
    device: Annotated[str, typer.Option(help="Where to measure: auto, cpu or cuda.")] = "auto",
    placements: Annotated[int, typer.Option(help="How many placements to measure at most.")] = 16,
    compared: Annotated[
        bool, typer.Option("--compared", help="Instead: one placement of every composition that a report compares.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Time for all; the same command measures the rest. 0: no limit.")
    ] = 0.0,
    db: Annotated[Path | None, typer.Option(help="Folder or file of profile databases.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Measure the front and the uniform placements end to end against the cost model's predictions.

    Writes runs/NAME/validation.csv; what was measured there before is not measured again. With --compared, the context
    may be beyond the model's own: speeds are then measured with a longer cache, and not predicted.
    """
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import log, print_json, print_plan, progress_bar, torch_device
    from nasbench.core.errors import UserError
    from nasbench.core.files import sole
    from nasbench.cost import load_cost_model
    from nasbench.devices import detect
    from nasbench.runs import Run
    from nasbench.search.compared import compositions
    from nasbench.search.run_target import run_db, run_target
    from nasbench.search.validation import SECONDS, START_S, choose, mean_error, missing, validate
    from nasbench.spaces.placement import format_placement

    opened = Run.open(run)
    if placements < 1:
        raise UserError(f"bad --placements {placements}: choose 1 or more")
    if not seconds >= 0:
        raise UserError(f"bad --seconds {seconds}: at least 0")
    where = torch_device(device)
    shape, db = resolve_shape(opened.spec.model), run_db(opened, db)
    # What is measured here is this device, whatever device a search was for.
    target = run_target(opened, shape, db, where, detect(where).slug, context, batch, dtype)
    chosen = compositions(opened) if compared else choose(opened, target, placements)
    beyond = target.context > shape.max_context
    costs = None if beyond else load_cost_model(target.device, shape, target.dtype, db)
    if dry_run:
        left = missing(opened, chosen, target, costs)
        todo = {"left": len(left), "seconds": seconds or len(left) * (SECONDS + START_S)}
        texts = list(map(format_placement, chosen))
        print_plan({"run": str(run), "target": str(target), "placements": texts, **todo}, as_json)
        return
    alone = sole(opened.path / ".validate.lock", f"another process measures placements of {run}: wait for its end")
    with alone, progress_bar("validate: measures the memory") as bar:
        found = validate(
            opened, chosen, target, costs, shape, where,
            limit_s=seconds or math.inf, progress=lambda done, total: bar("end to end", done, total), log=log,
        )  # fmt: skip
    if as_json:
        print_json({"mean_error": mean_error(found), "rows": [vars(row) for row in found]})
        return
    print_measured(found, target)


def print_measured(found: Sequence[ValidationRow], target: Target) -> None:
    """Predicted against measured tokens/s; a context beyond the model's has no predictions."""
    from nasbench.cli.common import print_table
    from nasbench.search.validation import mean_error

    beyond = math.isnan(mean_error(found))
    table = [
        (
            row.placement,
            "" if beyond else f"{row.predicted_tok_s:.1f}",
            f"{row.measured_tok_s:.1f}",
            "" if beyond else f"{row.error:+.1%}",
            f"{row.floor_fraction:.0%}",
        )
        for row in sorted(found, key=lambda row: row.measured_tok_s)
    ]
    columns = ("placement", "predicted tok/s", "measured tok/s", "error", "of the memory's limit")
    print_table(columns, table, f"Predicted against measured ({target})")
    if not beyond:
        print(f"\nmean error {mean_error(found):.1%} over {len(found)} placements")
