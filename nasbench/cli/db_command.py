"""`nasbench db check|migrate|show|merge`: profile databases as files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from nasbench.core.errors import UserError

command = typer.Typer(help="Validate, list and merge profile databases.", no_args_is_help=True)


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"no profile databases (*.csv) in {path}")
    return files


@command.command("check")
def check(path: Annotated[Path, typer.Argument(help="A database, or a folder of them.")]) -> None:
    """Validate databases: header, every cell, keys, and that a file has only rows of the device it is named after."""
    from nasbench.store import SCHEMA, read_db, schema_of

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
        print(f"{file}: {len(rows)} rows ({states}), {estimated} estimated{old}")


@command.command("migrate")
def migrate(path: Annotated[Path, typer.Argument(help="A database, or a folder of them.")]) -> None:
    """Rewrite databases of an older schema in the present one. Any change to a file does the same."""
    from nasbench.store import SCHEMA, Database, read_db, schema_of

    for file in _files(path):
        before = schema_of(file)
        read_db(file)
        done = Database(file).migrate()
        print(f"{file}: " + (f"schema {before} became {SCHEMA}" if done else f"schema {SCHEMA} already"))


@command.command("show")
def show(
    path: Annotated[Path, typer.Argument(help="A database, or a folder of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the rows of databases."""
    from dataclasses import asdict

    from nasbench.cli.common import mark_source, print_json, print_table
    from nasbench.store import read_db

    rows = [row for file in _files(path) for row in read_db(file)]
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
        return
    columns = (
        "device",
        "block",
        "args",
        "hidden_size",
        "mode",
        "dtype",
        "batch",
        "context",
        "chunk",
        "p50_us",
        "noisy",
        "source",
    )
    cells: list[list[Any]] = []
    for row in rows:
        values = [getattr(row, name) for name in columns]
        values[columns.index("noisy")] = "noisy" if row.noisy else ""
        values[columns.index("source")] = mark_source(row.source)
        cells.append([*("" if value is None else value for value in values), row.status])
    print_table([*columns, "status"], cells)


@command.command("merge")
def merge(
    paths: Annotated[list[Path], typer.Argument(help="Databases, or folders of them, to add.")],
    db: Annotated[Path | None, typer.Option(help="Folder to merge into; default: the user's own.")] = None,
) -> None:
    """Add the rows of databases to a folder, each to its device's file. The later measurement of a key wins."""
    from nasbench.store import Database, Row, db_path, read_db

    by_device: dict[str, list[Row]] = {}
    for row in (row for path in paths for file in _files(path) for row in read_db(file)):
        by_device.setdefault(row.device, []).append(row)
    for device, rows in sorted(by_device.items()):
        target = db_path(device, db)
        changed = Database(target).merge(rows)
        print(f"{target}: {changed} of {len(rows)} rows added or replaced")
