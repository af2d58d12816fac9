"""The table of `nasbench select-block`: layer kinds that were trained alike, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas

from nasbench.core.files import atomic_path, write_text
from nasbench.cost.files import load_cost_model
from nasbench.cost.model import CostModel
from nasbench.evaluation.scores import ScoreStore
from nasbench.runs import Run
from nasbench.spaces.placement import Placement, format_placement
from nasbench.supernet.finalize import final_folder, final_version, is_final
from nasbench.supernet.loop import last_speed

if TYPE_CHECKING:
    from nasbench.model.shapes import ModelSpec

SPEED, LOSS = "decode tokens/s", "loss"


def placements_of(run: Run, full_attention: int) -> tuple[Placement, Placement]:
    """The model itself, and the run's one other kind with K evenly spread layers of full attention."""
    space = run.spec.space
    (kind,) = {name for names in space.choices for name in names} - {"A"}
    return space.homogeneous("A"), space.with_full_attention(space.homogeneous(kind), space.evenly(full_attention))


def block_table(
    runs: list[Run], shape: ModelSpec, full_attention: int, context: int, batch: int, dtype: str, device: str, db: Path
) -> pandas.DataFrame:
    """One row a kind, one of the model itself before them; scores with their standard errors in columns `... ±`.

    Args:
        runs: each of one kind beside full attention, finalised at the evenly spread placement.
        context, batch: of the speeds and the cache; prompts are read one by one.
        device: its profile rows in `db` give the speeds; without them these cells are empty.
    """
    costs = load_cost_model(device, shape, dtype, db) if db.exists() else CostModel((), shape, dtype, device=device)
    rows: list[dict[str, Any]] = []
    for run in runs:
        store, (whole, placement) = ScoreStore(run.scores), placements_of(run, full_attention)
        if not rows:
            rows.append(_row("A", whole, shape) | _costs(costs, whole, context, batch) | _scores(store, whole, None))
        kind = next(name for name in placement if name != "A")
        folder = final_folder(run, placement)
        weights = final_version(folder) if is_final(folder) else None
        row = _row(kind, placement, shape) | _costs(costs, placement, context, batch)
        rows.append(row | _scores(store, placement, weights) | _training(run))
    return pandas.DataFrame(rows)


def _row(kind: str, placement: Placement, shape: ModelSpec) -> dict[str, Any]:
    mixer = shape.mixer(kind)
    return {
        "kind": kind,
        "name": mixer.title,
        "placement": format_placement(placement),
        "parameters of a layer": mixer.parameters(),
    }


def _costs(costs: Any, placement: Placement, context: int, batch: int) -> dict[str, Any]:
    sized = costs.cache(placement, context, batch)
    row: dict[str, Any] = {"cache MiB": round(sized.cache_bytes / 2**20, 2)}
    if costs.chunks or costs.calibrated_by:
        found = costs.cost(placement, context, batch)
        row[SPEED] = found.decode_tok_s and round(found.decode_tok_s, 1)
        row["prompt tokens/s"] = found.prefill_tok_s and round(found.prefill_tok_s, 1)
        row["J/token"] = found.j_per_token
    return row


def _scores(store: ScoreStore, placement: Placement, weights: str | None) -> dict[str, Any]:
    """The newest score of every task on the test split; `weights` None takes those of the supernet."""
    fields = {"placement": format_placement(placement)} | ({} if weights is None else {"weights": weights})
    found: dict[str, Any] = {}
    for key, scores in store.find(**fields).items():
        if not key.settings.startswith("search/"):
            found[key.task], found[f"{key.task} ±"] = scores.value, scores.stderr
    return found


def _training(run: Run) -> dict[str, Any]:
    """Speed of alignment, from the last row of its progress."""
    speed = last_speed(run.supernet, "align")
    return {} if speed is None else {"training tokens/s": speed}


def write_block_table(
    table: pandas.DataFrame,
    folder: Path,
    title: str,
    stem: str = "blocks",
    axes: tuple[str, str] = (f"{SPEED}, predicted", "held-out loss, nats a token (95 % interval)"),
    y: str = LOSS,
    notes: str = "",
) -> list[Path]:
    """Writes the table as CSV and Markdown, and `y` against decode speed as PNG. Returns the files.

    Args:
        axes: what the plot calls speed and `y`.
        notes: under the table.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.{suffix}" for suffix in ("csv", "md", "png")]
    write_text(paths[0], table.to_csv(index=False, float_format="%.6g"))
    columns, rows = markdown_cells(table)
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    write_text(paths[1], f"# {title}\n\n" + "\n".join(lines) + "\n" + notes)
    x = SPEED if SPEED in table else "cache MiB"
    shown = table.dropna(subset=[column for column in (x, y) if column in table])
    if y not in table or shown.empty:
        return paths[:2]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    plot = figure.subplots()
    error = 1.96 * shown[f"{y} ±"] if f"{y} ±" in shown else None
    plot.errorbar(shown[x], shown[y], yerr=error, fmt="o", capsize=3, color="#0072b2")
    for _, row in shown.iterrows():
        plot.annotate(row["kind"], (row[x], row[y]), textcoords="offset points", xytext=(7, 5))
    plot.set_xlabel(axes[0] if x == SPEED else x)
    plot.set_ylabel(axes[1])
    plot.set_title(title, fontsize=10)
    with atomic_path(paths[2]) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return paths


def markdown_cells(table: pandas.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Column names and rows in which scores carry their standard errors: 3.021 ± 0.012."""
    columns = [str(name) for name in table if not str(name).endswith(" ±")]
    rows = []
    for _, row in table.iterrows():
        cells = []
        for name in columns:
            value, error = row[name], row.get(f"{name} ±")
            cell = "" if pandas.isna(value) else f"{value:,.4g}" if isinstance(value, float) else str(value)
            cells.append(f"{cell} ± {error:.2g}" if cell and error is not None and not pandas.isna(error) else cell)
        rows.append(cells)
    return columns, rows
