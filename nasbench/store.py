"""The profile database: one CSV file per device, one row per measurement. Imports no torch.

`Row` is the schema: its fields, in order, are the header. profiles/README.md explains every column.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nasbench.core.errors import UserError, unknown
from nasbench.core.files import locked
from nasbench.core.noise import is_noisy
from nasbench.core.provenance import kernels_version
from nasbench.core.tables import columns, read_table, read_text, write_table
from nasbench.model.shapes import ModelSpec
from nasbench.model.spec import FFNS, BlockSpec, ffn_spec

SCHEMA = 6
"""Version of the columns below. Older files are read, and written as this version by the next change or by
`nasbench db migrate`; newer ones are refused, never guessed at."""
ADDED = {2: ("noisy", "throttle_reasons"), 3: ("host_us",), 5: ("kernels",), 6: ("numa_node",)}
"""Columns that a version brought, by version."""
RENAMED = {4: {"conv_state_bytes": "history_bytes"}}
"""New and old names of the columns that a version renamed."""

SHARED_BLOCKS = ("embedding", "norm", "mlp", "head")
"""The same in every placement of a model whose FFNs are gated: `mlp` is that FFN. The block of another FFN is
its kind, with its arguments in `args`; of a mixer, its letter; of the device's limits, "ceiling"."""
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
    conv_state_bytes: int | None = field(default=None, metadata={"formerly": "history_bytes"})
    gb_s: float | None = None
    tflop_s: float | None = None
    bandwidth_fraction: float | None = None
    compute_fraction: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    sm_clock_mhz: float | None = None
    mem_clock_mhz: float | None = None
    numa_node: int | None = None
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
    kernels: str = ""
    measured_utc: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What the row measures; unique in a database, and the order of its rows."""
        return tuple(getattr(self, name) for name in KEY)

    @property
    def stale(self) -> bool:
        """Whether other GPU kernels than the installed ones were measured. A CPU runs none of them."""
        on_gpu = bool(self.driver) and not self.driver.endswith("threads")
        return on_gpu and self.source == "measured" and self.kernels != kernels_version()


SIZE_COLUMNS = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size")
_PART_SIZES = {
    "embedding": ("hidden_size", "vocab_size"),
    "norm": ("hidden_size",),
    "head": ("hidden_size", "vocab_size"),
}
_MIXER_SIZES = ("hidden_size", "num_heads", "num_kv_heads", "head_dim")
GATED = "mlp"


def ffn_names(shape: ModelSpec) -> tuple[str, ...]:
    """The name of each layer's FFN among profiled blocks; layers without an FFN have none."""
    texts = shape.ffn or ("gated",) * shape.num_layers
    return tuple(GATED if text == "gated" else text for text in texts if text != "none")


def shared_blocks(shape: ModelSpec) -> tuple[str, ...]:
    """The blocks of a model that are the same in every placement, FFNs included."""
    return ("embedding", "norm", *dict.fromkeys(ffn_names(shape)), "head")


def is_shared(name: str) -> bool:
    """Whether a block is the same in every placement: no mixer."""
    return name in SHARED_BLOCKS or name.partition("@")[0] in FFNS


def block_spec(shape: ModelSpec, name: str) -> BlockSpec | None:
    """The mixer or FFN of a name; None for embedding, norm and head. Raises UserError."""
    if name in _PART_SIZES:
        return None
    if is_shared(name):
        text = "gated" if name == GATED else name
        return ffn_spec(text, shape.hidden_size, shape.intermediate_size, shape.activation)
    return shape.mixer(name)


def block_cells(shape: ModelSpec, block: str, args: str = "") -> dict[str, Any]:
    """The key cells that say which block of which sizes a row is about: the sizes that matter to it, 0 elsewhere.

    Args:
        block: a shared block, or a mixer's name; its letter alone with `args`.
    """
    name = f"{block}@{args}" if args else block
    spec, model = block_spec(shape, name), {name: getattr(shape, name) for name in SIZE_COLUMNS}
    relevant: tuple[str, ...] = _MIXER_SIZES
    cells = {"block": block, "args": "", "variant": ""}
    if spec is None:
        relevant = _PART_SIZES[name]
    elif not is_shared(name):
        cells = {"block": spec.kind, "args": spec.args, "variant": shape.layer().variant}
    elif spec.kind == "gated":
        relevant = ("hidden_size", "intermediate_size")
        model["intermediate_size"] = int(spec.args)
        cells |= {"block": GATED, "args": "" if shape.activation == "silu" else shape.activation}
    else:
        relevant, cells = ("hidden_size",), cells | {"block": spec.kind, "args": spec.args}
    return cells | {name: model[name] if name in relevant else 0 for name in SIZE_COLUMNS}


COLUMNS = columns(Row)
KEY = COLUMNS[COLUMNS.index("device") : COLUMNS.index("implementation") + 1]
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BAD_SLUG = "bad device name {!r}: write letters, digits, '.', '_' and '-', as nvidia-h200"
"""Files are named after devices: a name such as ../x would leave the folder."""
_NUMBERS = tuple(field.name for field in fields(Row) if str(field.type).startswith(("int", "float")))


def columns_of(version: int) -> tuple[str, ...]:
    """The header of a file of this version, SCHEMA or older."""
    later = {name for added, names in ADDED.items() if added > version for name in names}
    renamed = {new: old for added, names in RENAMED.items() if added > version for new, old in names.items()}
    return tuple(renamed.get(name, name) for name in COLUMNS if name not in later)


def _version_of(header: list[str]) -> int:
    """The version that a header belongs to, 0 for none."""
    return next((version for version in range(SCHEMA, 0, -1) if tuple(header) == columns_of(version)), 0)


def _problem(row: Row) -> str:
    """The first problem of a row as "column: reason", or ""."""
    for name in _NUMBERS:
        value = getattr(row, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            kind = "whole number" if isinstance(value, int) else "finite number"
            return f"{name}: bad value {value}: write a {kind} that is not negative"
    for name, legal in _LEGAL.items():
        if getattr(row, name) not in legal:
            return f"{name}: {unknown('value', getattr(row, name), legal)}"
    if not _SLUG.fullmatch(row.device):
        return f"device: {_BAD_SLUG.format(row.device)}"
    if not row.block:
        return "block: write a mixer's letter, the kind of an FFN, ceiling, or " + ", ".join(SHARED_BLOCKS)
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


def read_db(path: Path) -> list[Row]:
    """Reads and validates a database file; rows of an older schema become those of the present one.

    Raises:
        UserError: absent file, wrong header or schema version, a bad cell (file, line and column are named),
            a key that appears twice, a last line that was cut.
    """
    path = Path(path)
    header, first = _head(path)
    version = _version_of(header)
    if not version:
        raise UserError(f"{path} line 1: {_header_problem(header, first)}")

    def check(row: Row) -> str:
        if row.schema != version:
            return f"schema: bad value {row.schema}: the header is of schema {version}"
        return _problem(row)

    rows = read_table(path, Row, check=check)
    if version < SCHEMA:
        rows = [replace(row, schema=SCHEMA) for row in rows]
    if version < 2:
        rows = [replace(row, noisy=is_noisy(row.p20_us, row.p50_us, row.p80_us)) for row in rows]
    lines: dict[tuple[Any, ...], int] = {}
    for line, row in enumerate(rows, 2):
        if lines.setdefault(row.key, line) != line:
            raise UserError(f"{path} line {line}: the same key as line {lines[row.key]}")
    return rows


def _head(path: Path) -> tuple[list[str], list[str]]:
    """The header and the first row. Raises UserError where the file is absent or not text."""
    if not path.is_file():
        raise UserError(f"no such profile database: {path}")
    reader = csv.reader(io.StringIO(read_text(path)))
    return next(reader, []), next(reader, [])


def schema_of(path: Path) -> int:
    """The schema version that a file is written in. Raises UserError where it is no database."""
    return _version_of(_head(Path(path))[0]) or SCHEMA


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
        with locked(self.path):
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
            wrong = _problem(row)
            if wrong:
                raise UserError(f"bad row for {row.block}{row.args} in {self.path}: {wrong}")
        with locked(self.path):
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
        write_table(self.path, rows, Row, digits=4)


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
    """The database file of a device, in `folder` or the default one. Raises UserError for a name that cannot be one."""
    if not _SLUG.fullmatch(device):
        raise UserError(_BAD_SLUG.format(device))
    return (folder or default_db_dir()) / f"{device}.csv"
