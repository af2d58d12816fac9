"""`nasbench db`: profile databases as files, estimates of other devices, and how far to trust both."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.cli.common import AsJson
from nasbench.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from nasbench.store import Row

command = typer.Typer(help="Validate, list, merge, estimate and judge profile databases.", no_args_is_help=True)


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"no profile databases (*.csv) in {path}")
    return files


@command.command("check")
def check(
    path: Annotated[Path, typer.Argument(help="A database, or a folder of them.")], as_json: AsJson = False
) -> None:
    """Validate databases: header, every cell, keys, and that a file has only rows of the device it is named after."""
    from nasbench.cli.common import print_json
    from nasbench.store import SCHEMA, read_db, schema_of

    found = []
    for file in _files(path):
        rows = read_db(file)
        strangers = sorted({row.device for row in rows} - {file.stem})
        if strangers:
            raise UserError(
                f"{file} holds rows of {', '.join(strangers)}: a file has the rows of the device it is named after; "
                f"`nasbench db merge {file} --db DIR` sorts them"
            )
        counts = Counter(row.status for row in rows)
        estimated = sum(row.source == "estimated" for row in rows)
        states = ", ".join(f"{counts[status]} {status}" for status in sorted(counts))
        version = schema_of(file)
        old = "" if version == SCHEMA else f"; schema {version}: `nasbench db migrate {file}` brings it to {SCHEMA}"
        found.append({"path": str(file), "rows": len(rows), **counts, "estimated": estimated, "schema": version})
        if not as_json:
            print(f"{file}: {len(rows)} rows ({states}), {estimated} estimated{old}")
    if as_json:
        print_json({"files": found})


@command.command("migrate")
def migrate(
    path: Annotated[Path, typer.Argument(help="A database, or a folder of them.")], as_json: AsJson = False
) -> None:
    """Rewrite databases of an older schema in the present one. Any change to a file does the same."""
    from nasbench.cli.common import print_json
    from nasbench.store import SCHEMA, Database, read_db, schema_of

    found = []
    for file in _files(path):
        before = schema_of(file)
        read_db(file)
        done = Database(file).migrate()
        found.append({"path": str(file), "before": before, "schema": SCHEMA})
        if not as_json:
            print(f"{file}: " + (f"schema {before} became {SCHEMA}" if done else f"schema {SCHEMA} already"))
    if as_json:
        print_json({"files": found})


@command.command("show")
def show(
    path: Annotated[Path, typer.Argument(help="A database, or a folder of them.")],
    as_json: AsJson = False,
) -> None:
    """List the rows of databases."""
    from dataclasses import asdict
    from itertools import groupby

    from nasbench.cli.common import mark_source, print_json, print_table
    from nasbench.core.sizes import format_size
    from nasbench.store import read_db

    rows = [row for file in _files(path) for row in read_db(file)]
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
        return
    rows.sort(key=lambda row: (row.device, row.hidden_size, row.dtype))
    columns = ["block", "mode", "batch", "context", "chunk", "p50_us", ""]
    for (device, dtype, size), group in groupby(rows, lambda row: (row.device, row.dtype, row.hidden_size)):
        cells: list[list[Any]] = []
        for row in group:
            marks = [row.status] if row.status != "ok" else []
            marks += [mark_source(row.source)] if row.source == "estimated" else []
            marks += [name for name in ("noisy", "stale") if getattr(row, name)]
            where = [row.batch, *(format_size(tokens) if tokens else "" for tokens in (row.context, row.chunk))]
            us = "" if row.p50_us is None else round(row.p50_us, 2)
            cells.append([f"{row.block} {row.args}".strip(), row.mode, *where, us, " ".join(marks)])
        print_table(columns, cells, f"{device}, {dtype}" + (f", hidden size {size}" if size else ", ceilings"))
        print()


@command.command("merge")
def merge(
    paths: Annotated[list[Path], typer.Argument(help="Databases, or folders of them, to add.")],
    db: Annotated[Path | None, typer.Option(help="Folder to merge into; default: the user's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Add the rows of databases to a folder, each to its device's file. The later measurement of a key wins."""
    from nasbench.cli.common import print_json
    from nasbench.store import Database, db_path, read_db

    found = []
    by_device: dict[str, list[Row]] = {}
    for row in (row for path in paths for file in _files(path) for row in read_db(file)):
        by_device.setdefault(row.device, []).append(row)
    for device, rows in sorted(by_device.items()):
        target = db_path(device, db)
        changed = Database(target).merge(rows)
        found.append({"path": str(target), "rows": len(rows), "changed": changed})
        if not as_json:
            print(f"{target}: {changed} of {len(rows)} rows added or replaced")
    if as_json:
        print_json({"files": found})


@command.command("estimate")
def estimate(
    source: Annotated[str, typer.Option("--from", help="A GPU that was measured, as nvidia-h200.")],
    target: Annotated[str, typer.Option("--to", help="A GPU of `nasbench devices`; it need not be here.")],
    db: Annotated[Path | None, typer.Option(help="Folder of the databases; default: the user's own.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Write no rows: compare with those measured on --to, tables into this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate the rows of a GPU from those of another one, by data sheet. They are marked estimated everywhere."""
    from nasbench.cli.common import log, print_json
    from nasbench.cost import find_profiles, profiled_devices
    from nasbench.devices import DEVICES
    from nasbench.profiling.estimate import estimate as estimate_rows
    from nasbench.store import Database, db_path

    specs = DEVICES[source], DEVICES[target]

    def rows_of(device: str) -> list[Row]:
        """Measured ones: those of --db, or else those that ship and the user's."""
        for place in (db, None) if db is not None and db.exists() else (None,):
            rows = find_profiles(device, place) if device in profiled_devices(place) else []
            if measured := [row for row in rows if row.source == "measured"]:
                return measured
        return []

    known = rows_of(source)
    found = estimate_rows(known, *specs)
    if any(row.stale for row in known):
        log(f"the rows of {source} are of other kernels than the installed ones, and so are estimates from them")
    if check:
        measured = rows_of(target)
        if {row.kernels for row in known} != {row.kernels for row in measured}:
            log(f"the rows of {source} and {target} are of different kernels: the errors hold that difference too")
        _print_check(check, source, target, found, measured, as_json)
        return
    path = db_path(target, db)
    measured_keys = {row.key for row in Database(path).read() if row.source == "measured"}
    new = [row for row in found if row.key not in measured_keys]
    Database(path).merge(new)
    summary: dict[str, Any] = {"device": target, "from": source, "path": str(path), "source": "estimated"}
    summary |= {"estimated": len(new), "measured": len(found) - len(new)}
    if as_json:
        print_json(summary)
    else:
        print(f"{path}: {len(new)} rows ESTIMATED from {source}; {len(found) - len(new)} are measured and stay")


def _print_check(folder: Path, source: str, target: str, found: list[Row], measured: list[Row], as_json: bool) -> None:
    """Prints errors by mode and block, and writes them and every comparison beside each other."""
    import pandas as pd

    from nasbench.cli.common import print_json, print_table
    from nasbench.core.files import write_text
    from nasbench.core.provenance import command_line
    from nasbench.core.tables import write_table
    from nasbench.profiling.estimate import Checked, check

    points = check(found, measured)
    if not points:
        raise UserError(f"nothing to compare: {target} has no measured rows of the blocks of {source}")
    table = pd.DataFrame(points).assign(size=lambda t: t["error"].abs())
    parts = [(names, part) for names, part in table.groupby(["mode", "block"])]
    lines: list[list[Any]] = []
    for names, part in [*parts, (("all", ""), table)]:
        shares = (part["size"].mean(), part["size"].max(), part["inside"].mean())
        lines.append([*names, len(part), *(round(100 * float(share), 1) for share in shares)])
    columns = ["mode", "block", "rows", "mean error %", "worst %", "in 90 % interval, %"]
    name = f"{source}-to-{target}"
    write_table(folder / f"{name}.csv", points, Checked, digits=4)
    text = [f"Rows of {target} estimated from {source}, against those measured on {target}.", ""]
    text += [f"    {command_line()}", ""]
    text += [f"| {' | '.join(map(str, cells))} |" for cells in (columns, ["---"] * len(columns), *lines)]
    write_text(folder / f"{name}.md", "\n".join(text) + "\n")
    if as_json:
        print_json({"from": source, "to": target, "errors": [dict(zip(columns, line, strict=True)) for line in lines]})
    else:
        print_table(columns, lines, f"{target} estimated from {source}")


@command.command("judge")
def judge(
    files: Annotated[list[Path], typer.Argument(help="CSV files of measured whole steps and prompts.")],
    db: Annotated[Path | None, typer.Option(help="Folder or file of profile databases.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every comparison into this CSV file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the cost model on whole steps and prompts that it was not fitted to. `nasbench profile --holdout N`
    measures some."""
    from nasbench.cli.common import print_json, print_table
    from nasbench.core.tables import write_table
    from nasbench.cost.calibration import read_calibration
    from nasbench.cost.holdout import Comparison, judge

    for file in files:
        if not file.is_file():
            raise UserError(f"no such file: {file}")
    lines, points = judge((row for file in files for row in read_calibration(file)), db)
    if out:
        write_table(out, points, Comparison, digits=4)
    if as_json:
        print_json({"judged": lines})
        return
    columns = ["device", "model", "mode", "points", "mean %", "worst %", "in 90 %"]
    shares = ("mean_error", "worst_error", "in_90_percent_interval")
    cells = []
    for line in lines:
        percent = ["" if line.get(name) is None else round(100 * line[name], 1) for name in shares]
        mode = line["mode"] + (" ESTIMATED" if line.get("source") == "estimated" else "")
        cells.append([line["device"], line["model"], mode, line["points"], *percent])
    print_table(columns, cells)
    for what, said in (
        ("not_covered", "measurements are outside of the profiled points"),
        ("calibrating", "measurements calibrate: each was judged by a fit without it"),
    ):
        if count := sum(line[what] for line in lines):
            print(f"{count} {said}")


@command.command("compare")
def compare(
    trials: Annotated[Path, typer.Argument(help="The trials.csv of a run: placements with scores.")],
    devices: Annotated[str, typer.Option(help="Measured or estimated ones: nvidia-h200,nvidia-b200.")],
    model: Annotated[str, typer.Option(help="Built-in shape, local folder, .gguf file, hub name or default.")],
    context: Annotated[str, typer.Option(help="Tokens of a sequence, as 8k.")],
    batch: Annotated[str, typer.Option(help="Sequences.")] = "1",
    speed_up: Annotated[float, typer.Option(help="Least decode speed, as a multiple of the whole model's.")] = 1.5,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    db: Annotated[Path | None, typer.Option(help="Folder of profile databases.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which placement of a run each device would choose, and what it loses by another device's choice."""
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import mark_source, print_json, print_table
    from nasbench.core.sizes import parse_size
    from nasbench.cost import load_cost_model
    from nasbench.search.on_devices import choices
    from nasbench.search.trials import read_trials

    if not trials.is_file():
        raise UserError(f"no such file: {trials}")
    shape = resolve_shape(model)
    names = [name.strip() for name in devices.split(",") if name.strip()]
    costs = [load_cost_model(name, shape, dtype, db) for name in names]
    found = choices(read_trials(trials), costs, shape.placement, parse_size(context), parse_size(batch), speed_up)
    if as_json:
        tables = {"chosen": found.chosen.to_dict("records")}
        print_json(tables | {"ranks": found.ranks.to_dict(), "regret": found.regret.to_dict()})
        return
    chosen = found.chosen.to_dict("records")
    for row in chosen:
        print(f"{row['device']}: {row['placement']}")
    cells = [
        [row["device"], round(row["score"], 4), round(row["decode_tok_s"]), round(row["speed_up"], 2),
         mark_source(row["source"])]
        for row in chosen
    ]  # fmt: skip
    print_table(["device", "score", "tokens/s", "speed-up", "source"], cells, "\nchosen")
    print_table(["device", *names], _cells(found.ranks), "\nrank correlation of the speeds")
    print_table(["device", *names], _cells(found.regret), "\nscore lost by the choice of (inf: too slow)")


def _cells(table: pd.DataFrame) -> list[list[Any]]:
    return [[name, *(round(float(value), 4) for value in table.loc[name])] for name in table.index]
