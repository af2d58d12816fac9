"""CSV files whose header is a frozen dataclass: written atomically, read with the file, line and column of a bad cell.

A field's type says how its cell reads: `str`, `int`, `float`, `bool` (0 or 1), or one of these `| None`, which reads an
empty cell as None. An empty `float` cell is NaN. A field with a default may be absent from a file that an older version
wrote. A field with `metadata={"formerly": "old_name"}` also reads the column's old name.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from nasbench.core.errors import MachineError, UserError
from nasbench.core.files import atomic_path, machine_errors

R = TypeVar("R")
Check = Callable[[Any], str]
"""Says what is wrong with a row as "column: reason", or "" where nothing is."""


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError
    return text == "1"


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError
    return value


_PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {
    str: (str, "text"),
    int: (int, "write a whole number"),
    float: (lambda text: _number(text) if text else math.nan, "write a number"),
    bool: (_flag, "write 0 or 1"),
}


def _parser(kind: Any) -> Callable[[str], Any]:
    """Parses a cell of a type; raises ValueError saying what is expected."""
    options = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    optional = type(None) in options
    parse, expected = _PARSERS[next(option for option in options if option is not type(None))]

    def cell(text: str) -> Any:
        if optional and text == "":
            return None
        try:
            return parse(text)
        except ValueError:
            raise ValueError(expected + (" or nothing" if optional else "")) from None

    return cell


@cache
def _columns(row: type) -> dict[str, tuple[Field[Any], Callable[[str], Any]]]:
    hints = get_type_hints(row)
    return {field.name: (field, _parser(hints[field.name])) for field in fields(row)}


def columns(row: type) -> tuple[str, ...]:
    """The header of a table of this dataclass."""
    return tuple(_columns(row))


def _match_header(path: Path, header: Sequence[str], row: type, exact: bool) -> list[str | None]:
    """The field of each column, None for one to ignore. Raises UserError for a header that does not fit."""
    known = _columns(row)
    formerly = {field.metadata["formerly"]: name for name, (field, _) in known.items() if "formerly" in field.metadata}
    found = [name if name in known else formerly.get(name) for name in header]
    names = [name for name in found if name]
    needed = {n for n, (f, _) in known.items() if f.default is MISSING and f.default_factory is MISSING}
    missing = [name for name in known if name in needed - set(names)]
    extra = [name for name, ours in zip(header, found, strict=True) if ours is None]
    problems = [f"no column {', '.join(missing)}"] if missing else []
    problems += [f"unknown column {', '.join(extra)}"] if extra and exact else []
    in_order = names == [name for name in known if name in set(names)]
    if not problems and (len(set(names)) < len(names) or (exact and not in_order)):
        problems = ["the columns are in another order"]
    if problems or not names:
        raise UserError(f"{path} line 1: {'; '.join(problems) or 'no header'}: the columns are {', '.join(known)}")
    return found


def read_text(path: Path) -> str:
    """The text of a table. Raises UserError where it is not UTF-8, MachineError where it cannot be read."""
    try:
        with machine_errors(f"reading {path}"):
            return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a CSV file: it is not UTF-8 text") from None


def read_table(path: Path, row: type[R], *, exact: bool = True, check: Check | None = None) -> list[R]:
    """Reads a CSV of dataclass `row`; a file that does not exist has no rows.

    Args:
        exact: refuse unknown columns and another order; otherwise ignore them.
        check: refuses a row that is wrong between its cells.

    Raises:
        UserError: wrong header, a row of the wrong length, a bad cell, or a last line that was cut.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = read_text(path)
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        names = _match_header(path, next(reader, []), row, exact)
        if not text.endswith("\n"):
            raise UserError(f"{path} line {text.count(chr(10)) + 1}: the last line is cut: it has no end of line")
        return [_read_row(cells, names, row, f"{path} line {reader.line_num}", check) for cells in reader]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not CSV: {error}") from None


def _read_row(cells: list[str], names: list[str | None], row: Any, where: str, check: Check | None) -> Any:
    if len(cells) != len(names):
        raise UserError(f"{where}: {len(cells)} cells, the header has {len(names)}")
    known, values = _columns(row), {}
    for name, text in zip(names, cells, strict=True):
        if name:
            try:
                values[name] = known[name][1](text)
            except ValueError as error:
                raise UserError(f"{where} column {name}: bad value {text!r}: {error}") from None
    read = row(**values)
    wrong = check(read) if check else ""
    if wrong:
        column, _, reason = wrong.partition(": ")
        raise UserError(f"{where} column {column}: {reason}")
    return read


def format_cell(value: object, digits: int | None = None) -> str:
    """Text that reads back as the same value: "" for None and NaN.

    Args:
        digits: decimals of a float; None for the shortest text that reads back as the same float.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float):
        if math.isinf(value):
            raise MachineError("a number for a table is not finite: nothing is written")
        return repr(float(value)) if digits is None else f"{value:.{digits}f}"
    return str(value)


def write_table(path: Path, rows: Iterable[R], row: type[R] | None = None, *, digits: int | None = None) -> None:
    """Writes the header and the rows, atomically.

    Args:
        row: the dataclass; needed where `rows` may be empty.
        digits: decimals of floats; None for the shortest text that reads back as the same float.
    """
    found = list(rows)
    names = columns(row or type(found[0]))
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([format_cell(getattr(row, name), digits) for name in names] for row in found)
