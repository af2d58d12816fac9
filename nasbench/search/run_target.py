"""What a search or a validation of a run is to be fast on: as it was given, or as the run remembers it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nasbench.model.shapes import ModelSpec
    from nasbench.runs import Run
    from nasbench.search.trials import Target
    from nasbench.store import Row


def run_db(run: Run, db: Path | None) -> Path | None:
    """The profile databases of a run: those given, else those of its last search, else its own folder `profiles`."""
    known = run.recall(db=str(db or ""))["db"]
    own = run.path / "profiles"
    return Path(known) if known else own if own.is_dir() else None


def run_target(
    run: Run, shape: ModelSpec, db: Path | None, device: str, profile: str, context: str, batch: str, dtype: str
) -> Target:
    """The target of a search or a validation: what was given, else that of the run's last search, else the profiled
    device here at the largest context, and its largest batch, that were profiled.

    Args:
        db: of `run_db`.
        device: torch device.

    Raises UserError where nothing was profiled.
    """
    from nasbench.cost import find_profiles
    from nasbench.devices import detect
    from nasbench.search.run_folder import choose_dtype
    from nasbench.search.trials import Target

    known = run.recall(profile=profile, context=context, batch=batch, dtype=dtype)
    name = known["profile"] or detect(device).slug
    rows = find_profiles(name, db)
    width = choose_dtype(rows, known["dtype"], name)
    points = sorted(_profiled(rows, shape, width))
    if known["context"]:
        points = [point for point in points if point[0] == parse_size(known["context"])]
    tokens, sequences = points[-1] if points else (4096, 1)
    return Target(
        name,
        parse_size(known["context"]) if known["context"] else tokens,
        parse_size(known["batch"]) if known["batch"] else sequences,
        width,
    )


def remember_target(run: Run, target: Target, db: Path | None) -> None:
    """Keeps the target of a search for later commands."""
    place = "" if db is None else str(db)
    run.remember(
        profile=target.device,
        context=format_size(target.context),
        batch=str(target.batch),
        dtype=target.dtype,
        db=place,
    )


def _profiled(rows: Sequence[Row], shape: ModelSpec, dtype: str) -> set[tuple[int, int]]:
    """(context, batch) at which decoding with full attention was measured for this model."""
    from nasbench.store import block_cells, select

    cells = block_cells(shape, "A") | {"mode": "decode", "status": "ok", "dtype": dtype}
    found = select(rows, **cells)
    return {(row.context, row.batch) for row in found if row.context and row.context <= shape.max_context}
