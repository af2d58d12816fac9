"""CSV files whose header is a dataclass: written atomically, and read with the file, line and column of a bad cell."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from nasbench.core.errors import UserError
from nasbench.core.files import atomic_path

Row = TypeVar("Row")
_LEGAL = {int: "a whole number", float: "a number", str: "text"}


def _parse(text: str, kind: type, where: str) -> Any:
    """One cell. An empty number is NaN: not known."""
    if kind is str:
        return text
    if kind is float and text == "":
        return math.nan
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is not {_LEGAL[kind]}") from None


def format_cell(value: object) -> str:
    """A float as the shortest text that reads back as the same float; NaN as an empty cell."""
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(float(value))
    return str(value)


def read_columns(
    path: Path, types: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> list[dict[str, Any]]:
    """Reads the named columns of a CSV; other columns are ignored.

    Args:
        types: column -> int, float or str. All must be there.
        optional: columns that may be absent; rows of a file without one lack its key.

    Raises:
        UserError: no such file, a column missing, a row of the wrong length, or a bad cell, as `file:line:column`.
    """
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            lines = csv.reader(handle, strict=True)
            header = next(lines, None)
            if not header:
                raise UserError(f"{path}:1: empty, its first line names the columns {', '.join(types)}")
            missing = [name for name in types if name not in header]
            if missing:
                raise UserError(f"{path}:1: no column {missing[0]!r} among {', '.join(header)}")
            wanted = {**types, **{name: kind for name, kind in (optional or {}).items() if name in header}}
            places = {name: header.index(name) for name in wanted}
            rows = []
            for cells in lines:
                if len(cells) != len(header):
                    raise UserError(f"{path}:{lines.line_num}: {len(cells)} cells, the header has {len(header)}")
                rows.append(
                    {
                        name: _parse(cells[place], wanted[name], f"{path}:{lines.line_num}:{name}")
                        for name, place in places.items()
                    }
                )
            return rows
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None


def read_rows(path: Path, row: type[Row]) -> list[Row]:
    """Reads a CSV of dataclass `row`; a file that is not there has no rows. Raises UserError as read_columns."""
    if not path.exists():
        return []
    hints = get_type_hints(row)
    types = {field.name: hints[field.name] for field in fields(row)}  # type: ignore[arg-type]
    return [row(**cells) for cells in read_columns(path, types)]


def write_rows(path: Path, row: type[Row], rows: Sequence[Row]) -> None:
    """Writes the header of dataclass `row` and the rows, atomically."""
    names = [field.name for field in fields(row)]  # type: ignore[arg-type]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(names)
        for item in rows:
            writer.writerow(format_cell(value) for value in asdict(item).values())  # type: ignore[call-overload]
