"""Finds profile databases and loads a device's cost model from them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nasbench.core.errors import UserError, unknown
from nasbench.core.provenance import kernels_version
from nasbench.core.sizes import profiles_dir
from nasbench.cost.calibration import find_calibration
from nasbench.cost.model import CostModel
from nasbench.devices import DEVICES
from nasbench.model.shapes import ModelSpec
from nasbench.store import Database, Row, default_db_dir, read_db, replaces


def _files(db: Path | None) -> dict[str, list[Path]]:
    """Database files by device; `db` is a folder or one file, None for the shipped ones and then the user's."""
    if db is not None and not Path(db).exists():
        raise UserError(f"no such profile folder or file: {db}")
    found: dict[str, list[Path]] = {}
    places = [Path(db)] if db is not None else list(dict.fromkeys((profiles_dir(), default_db_dir())))
    for place in places:
        for path in sorted(place.glob("*.csv")) if place.is_dir() else [place] if place.is_file() else []:
            found.setdefault(path.stem, []).append(path)
    return found


def profiled_devices(db: Path | None = None) -> list[str]:
    """Names of the devices that have a database."""
    return sorted(_files(db))


def find_profiles(device: str, db: Path | None = None) -> list[Row]:
    """The rows of a device. A file's rows of other devices do not count.

    Args:
        db: a folder of databases or one file; None for the shipped databases with the user's own rows over them.

    Raises:
        UserError: no rows of this device (names those that have some), or a bad file.
    """
    files = _files(db)
    if db is not None and Path(db).is_file():
        return [row for row in read_db(Path(db)) if row.device == device] or _no_rows(device, db)
    if device not in files:
        _no_rows(device, db)
    table: dict[tuple[Any, ...], Row] = {}
    for path in files[device]:
        for row in Database(path).read():
            if row.device == device and (row.key not in table or replaces(row, table[row.key])):
                table[row.key] = row
    return list(table.values())


def load_cost_model(device: str, shape: ModelSpec, dtype: str, db: Path | None = None) -> CostModel:
    """The cost model of a device with the calibration that lies beside its rows. Raises UserError as find_profiles."""
    files = _files(db)
    beside = [Path(db)] if db is not None and Path(db).is_file() else files.get(device, [])
    return CostModel(find_profiles(device, db), shape, dtype, find_calibration(beside))


def how_to_get_rows(device: str, model: str = "MODEL", db: Path | None = None) -> str:
    """What to do about a known device without rows: measure it, or estimate it from one that was measured."""
    profiled = profiled_devices(db)
    sources = [known for known in profiled if known in DEVICES] if device in DEVICES else []
    estimate = f", or estimate: `nasbench db estimate --from {sources[0]} --to {device}`" if sources else ""
    others = "" if profiled else ", nor of any other device"
    return f"no profile rows of {device}{others}: measure with `nasbench profile --model {model}` there{estimate}"


def stale_warning(blocks: Iterable[str], device: str, model: str = "MODEL") -> str:
    """Says which rows are of other kernels than the installed ones."""
    return (
        f"stale: the rows of {', '.join(blocks)} on {device} are of other kernels than the installed "
        f"{kernels_version()}; measure again with `nasbench profile --model {model} --force`"
    )


def _no_rows(device: str, db: Path | None) -> list[Row]:
    known = profiled_devices(db)
    if device in DEVICES or not known:
        raise UserError(how_to_get_rows(device, db=db))
    raise UserError(
        f"{unknown('device', device, known)}; or measure this machine with `nasbench profile --model MODEL`"
    )
