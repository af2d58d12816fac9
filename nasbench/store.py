"""The profile database: one CSV file per device, one row per measurement. Imports no torch.

`Row` is the schema: its fields, in order, are the header. profiles/README.md explains every column.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from nasbench.core.errors import UserError
from nasbench.core.files import atomic_path, machine_errors

SCHEMA = 3
"""Version of the columns below. Older files are read, and written as this version by the next change or by
`nasbench db migrate`; newer ones are refused, never guessed at."""
ADDED = {2: ("noisy", "throttle_reasons"), 3: ("host_us",)}
"""Columns that a version brought, by version."""
SPREAD = 0.03
"""A row whose p80 - p20 exceeds this share of its p50 is noisy."""

SHARED_BLOCKS = ("embedding", "norm", "mlp", "head")
"""Blocks that are the same in every placement; all others are layer-kind letters, or "ceiling"."""
CEILING = "ceiling"
"""Block of the device's own limits; `args` says which: copy, read, matmul or launch."""
CEILINGS = ("copy", "read", "matmul", "launch")

_LEGAL = {
    "mode": ("decode", "prefill"),
    "status": ("ok", "oom", "unsupported", "failed"),
    "source": ("measured", "estimated"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement of one block. None (a blank cell) is a number that the device does not tell.

    A decode row is one new token per sequence that looks at `context` keys, itself included. A prefill row is one
    chunk of `chunk` tokens that ends at `context` tokens. Shared blocks do not depend on the context: theirs is 0.
    Sizes that do not concern a block are 0. `host_us` is what the host needs to launch the kernels of a block that does
    not run from a captured graph: whichever of the two takes longer sets the pace.
    """

    schema: int = SCHEMA
    device: str
    block: str
    args: str = ""
    hidden_size: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    vocab_size: int = 0
    variant: str = ""
    mode: str = "decode"
    dtype: str = "fp32"
    batch: int = 1
    context: int = 0
    chunk: int = 0
    implementation: str = ""
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    host_us: float | None = None
    repeats: int | None = None
    noisy: bool | None = None
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    cache_formula_bytes: int | None = None
    history_bytes: int | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    bandwidth_fraction: float | None = None
    compute_fraction: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    sm_clock_mhz: float | None = None
    mem_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None
    throttle_reasons: str = ""
    status: str = "ok"
    reason: str = ""
    source: str = "measured"
    torch: str = ""
    triton: str = ""
    driver: str = ""
    project: str = ""
    measured_utc: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What the row measures; unique in a database, and the order of its rows."""
        return tuple(getattr(self, name) for name in KEY)


class Sizes(Protocol):
    """What block_cells reads of a model's shape."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def layer(self) -> Any: ...


SIZE_COLUMNS = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size")
_SHARED_SIZES = {
    "embedding": ("hidden_size", "vocab_size"),
    "norm": ("hidden_size",),
    "mlp": ("hidden_size", "intermediate_size"),
    "head": ("hidden_size", "vocab_size"),
}


def block_cells(shape: Sizes, block: str, args: str = "") -> dict[str, Any]:
    """The key cells that say which block of which sizes a row is about: the sizes that matter to it, 0 elsewhere.

    Args:
        shape: the model's (nasbench.model.shapes.ModelSpec).
        block: a shared block, or a layer kind's letter with its complete `args`.
    """
    relevant = _SHARED_SIZES.get(block, ("hidden_size", "num_heads", "num_kv_heads", "head_dim"))
    sizes = {name: getattr(shape, name) if name in relevant else 0 for name in SIZE_COLUMNS}
    variant = "" if block in _SHARED_SIZES else shape.layer().variant
    return {"block": block, "args": args, **sizes, "variant": variant}


def is_noisy(p20_us: float | None, p50_us: float | None, p80_us: float | None) -> bool | None:
    """Whether the percentiles lie further apart than SPREAD allows; None without them."""
    if p20_us is None or p50_us is None or p80_us is None:
        return None
    return p80_us - p20_us > SPREAD * p50_us


COLUMNS = tuple(field.name for field in fields(Row))
KEY = COLUMNS[COLUMNS.index("device") : COLUMNS.index("implementation") + 1]


def _integer(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("write a whole number that is not negative")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError("write a finite number that is not negative")
    return value


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("write 0, 1 or nothing")
    return text == "1"


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "" else parse(text)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": _integer,
    "int | None": _optional(_integer),
    "float | None": _optional(_number),
    "bool | None": _optional(_flag),
}
_PARSE = {field.name: _PARSERS[str(field.type)] for field in fields(Row)}


def _format(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float):
        return f"{value:.4f}"
    return " ".join(str(value).split())


def _cell(column: str, text: str) -> Any:
    """The value of a cell. Raises ValueError saying what is expected."""
    try:
        value = _PARSE[column](text)
    except ValueError as error:
        raise ValueError(str(error) if "write" in str(error) else "write a number") from None
    legal = _LEGAL.get(column)
    if legal and value not in legal:
        raise ValueError(f"choose from {', '.join(legal)}")
    return value


def columns_of(version: int) -> tuple[str, ...]:
    """The header of a file of this version, SCHEMA or older."""
    later = {name for added, names in ADDED.items() if added > version for name in names}
    return tuple(name for name in COLUMNS if name not in later)


def _version_of(header: list[str]) -> int:
    """The version that a header belongs to, 0 for none."""
    return next((version for version in range(SCHEMA, 0, -1) if tuple(header) == columns_of(version)), 0)


def _inconsistent(row: Row) -> str:
    """What is wrong between the cells of a row as "column: reason", or ""."""
    if not row.device:
        return "device: write the device's name"
    if not row.block:
        return "block: write a layer kind's letter, ceiling, or " + ", ".join(SHARED_BLOCKS)
    if row.status == "ok":
        if row.p20_us is None or row.p50_us is None or row.p80_us is None:
            return "p50_us: a row with status ok needs its times"
        fused = row.block == "norm" and row.p80_us == 0.0  # a part of other blocks' kernels
        if not (row.p20_us > 0 or fused) or not row.p20_us <= row.p50_us <= row.p80_us:
            return f"p50_us: {row.p50_us} is not between p20_us {row.p20_us} and p80_us {row.p80_us}, or one is zero"
    if row.batch < 1:
        return "batch: write at least 1"
    if (row.chunk > 0) != (row.mode == "prefill"):
        return "chunk: a prefill row needs one, a decode row has 0"
    return ""


def _read_row(path: Path, line: int, cells: list[str], version: int) -> Row:
    columns = columns_of(version)
    if len(cells) != len(columns):
        raise UserError(f"{path} line {line}: {len(cells)} cells, the header has {len(columns)}")
    values: dict[str, Any] = {}
    for column, text in zip(columns, cells, strict=True):
        try:
            values[column] = _cell(column, text)
        except ValueError as error:
            raise UserError(f"{path} line {line} column {column}: bad value {text!r}: {error}") from None
    if values["schema"] != version:
        raise UserError(
            f"{path} line {line} column schema: bad value {values['schema']!r}: the header is of schema {version}"
        )
    if version < 2:
        values["noisy"] = is_noisy(values["p20_us"], values["p50_us"], values["p80_us"])
    row = Row(**(values | {"schema": SCHEMA}))
    wrong = _inconsistent(row)
    if wrong:
        column, _, reason = wrong.partition(": ")
        raise UserError(f"{path} line {line} column {column}: {reason}")
    return row


def read_db(path: Path) -> list[Row]:
    """Reads and validates a database file; rows of an older schema come as those of the present one.

    Raises:
        UserError: absent file, wrong header or schema version, a bad cell (file, line and column are named),
            a key that appears twice, a last line that was cut.
    """
    path = Path(path)
    text = _text(path)
    reader = csv.reader(io.StringIO(text), strict=True)
    rows: list[Row] = []
    lines: dict[tuple[Any, ...], int] = {}
    try:
        header = next(reader, [])
        version = _version_of(header)
        if not version:
            raise UserError(f"{path} line 1: {_header_problem(header, next(reader, []))}")
        if not text.endswith("\n"):
            raise UserError(f"{path} line {text.count(chr(10)) + 1}: the last line is cut: it has no end of line")
        for cells in reader:
            row = _read_row(path, reader.line_num, cells, version)
            if row.key in lines:
                raise UserError(f"{path} line {reader.line_num}: the same key as line {lines[row.key]}")
            lines[row.key] = reader.line_num
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not CSV: {error}") from None
    return rows


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no such profile database: {path}")
    try:
        with machine_errors(f"reading {path}"):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a profile database: it is not UTF-8 text") from None


def schema_of(path: Path) -> int:
    """The schema version that a file is written in. Raises UserError where it is no database."""
    header = next(csv.reader(io.StringIO(_text(Path(path)))), [])
    return _version_of(header) or SCHEMA


def _header_problem(header: list[str], first: list[str]) -> str:
    version = dict(zip(header, first, strict=False)).get("schema", "")
    if version.isdecimal() and int(version) > SCHEMA:
        return f"schema {version} is of a newer nasbench, this one reads up to {SCHEMA}: `pip install -U nasbench`"
    if not header or "schema" not in header:
        return f"not the header of a profile database: it begins with {','.join(COLUMNS[:4])}"
    missing = [name for name in COLUMNS if name not in header]
    extra = [name for name in header if name not in COLUMNS]
    what = "columns are in another order"
    if missing or extra:
        what = "; ".join(
            f"{word} column {', '.join(names)}" for word, names in (("no", missing), ("unknown", extra)) if names
        )
    return f"{what}: this nasbench reads schema {SCHEMA}; measure again with `nasbench profile`"


def replaces(new: Row, old: Row) -> bool:
    """Whether `new` takes the place of `old` of the same key.

    The later measurement wins; an estimate never replaces a measurement, nor a failure one that went well.
    """
    if (new.source == "measured") != (old.source == "measured"):
        return new.source == "measured"
    if (new.status == "ok") != (old.status == "ok"):
        return new.status == "ok"
    return new.measured_utc >= old.measured_utc


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_format(getattr(row, name)) for name in COLUMNS] for row in rows)


class Database:
    """A database file that several processes may write: each change is one whole file, under a lock.

    Args:
        path: the CSV file; it and its folder are made by the first merge.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def read(self) -> list[Row]:
        """The rows, sorted by key; [] when there is no file yet. Raises UserError for a bad file."""
        return read_db(self.path) if self.path.exists() else []

    def migrate(self) -> bool:
        """Rewrites a file of an older schema in the present one; False where it is that already."""
        with self._locked():
            rows = self.read()
            if not self.path.exists() or schema_of(self.path) == SCHEMA:
                return False
            self._write(rows)
            return True

    def merge(self, rows: Iterable[Row]) -> int:
        """Adds rows, by the rule of `replaces` where the key exists. Returns how many were added or replaced.

        Raises:
            UserError: the present file, or a row to add, is not valid; nothing is written then.
            MachineError: the disk is full or the folder cannot be written; the old file stays whole.
        """
        new = list(rows)
        for row in new:
            wrong = _inconsistent(row)
            if wrong:
                raise UserError(f"bad row for {row.block}{row.args} in {self.path}: {wrong}")
        with self._locked():
            table = {row.key: row for row in self.read()}
            changed = 0
            for row in new:
                old = table.get(row.key)
                if old is None or (row != old and replaces(row, old)):
                    table[row.key] = row
                    changed += 1
            if changed:
                self._write(table[key] for key in sorted(table))
            return changed

    def _write(self, rows: Iterable[Row]) -> None:
        with atomic_path(self.path) as temporary:
            _write_rows(temporary, rows)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other process changes the file inside of the block. The system frees the lock of a process that dies."""
        with machine_errors(f"writing {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def select(rows: Iterable[Row], **cells: Any) -> list[Row]:
    """The rows whose cells equal the given ones: `select(rows, mode="decode", status="ok")`."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in cells.items())]


def default_db_dir() -> Path:
    """Where this user's measurements go: ./profiles in a checkout of nasbench, else the user's data folder."""
    here = Path.cwd()
    if (here / "nasbench" / "__init__.py").is_file() and (here / "pyproject.toml").is_file():
        return here / "profiles"
    from platformdirs import user_data_path

    return user_data_path("nasbench") / "profiles"


def db_path(device: str, folder: Path | None = None) -> Path:
    """The database file of a device, in `folder` or the default one."""
    return (folder or default_db_dir()) / f"{device}.csv"
