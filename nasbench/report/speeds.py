"""Speed, memory and energy over the context, and what limits each block, from profile rows. Needs no measurement."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nasbench.core.dtypes import dtype_bytes
from nasbench.core.errors import UserError
from nasbench.cost import CostModel, find_profiles, load_cost_model
from nasbench.model.shapes import ModelSpec
from nasbench.profiling.plan import same_work
from nasbench.report.targets import TargetFacts, recommended
from nasbench.search.trials import Target
from nasbench.spaces.placement import Placement
from nasbench.store import Row, block_cells, is_shared, select

WHOLE = ("decode_tok_s", "prefill_tok_s", "needed_bytes", "j_per_token")
"""The measures of whole models, one chart each."""


def kind_title(shape: ModelSpec, name: str) -> str:
    """What a layer name is called in this model: the kind's title and its arguments."""
    config = shape.mixer(name)
    return f"{config.title} {config.args.replace('x', '×')}".strip()


def profile_rows(target: Target, shape: ModelSpec, db: Path | None) -> list[Row]:
    """The rows of the model on the target's device, none where nobody measured it."""
    try:
        rows = find_profiles(target.device, db)
    except UserError:
        if db is not None:
            raise
        return []
    return [row for row in rows if row.hidden_size in (0, shape.hidden_size) and row.dtype == target.dtype]


def layer_curves(names: Sequence[str], rows: Sequence[Row], shape: ModelSpec, target: Target) -> pd.DataFrame:
    """One decode step of one mixer at the target's batch (or the nearest), a row for each kind and context.

    Columns: name, title, batch, context, us (p50, microseconds), low_us, high_us (p20, p80), cache_bytes (of the layer,
    by formula), estimated.
    """
    return pd.DataFrame([point for name in names for point in _curve(name, rows, shape, target)])


def _curve(name: str, rows: Sequence[Row], shape: ModelSpec, target: Target) -> list[dict[str, Any]]:
    config = shape.mixer(name)
    own = select(rows, **block_cells(shape, config.kind, config.args), mode="decode", status="ok")
    if not own:
        return []
    batch = min({row.batch for row in own}, key=lambda size: (abs(size - target.batch), size))
    fastest: dict[int, Row] = {}
    for row in sorted((row for row in own if row.batch == batch), key=lambda row: row.p50_us or math.inf):
        fastest.setdefault(row.context, row)
    # A kind that does the same at every context is measured at one.
    for context in {row.context for row in rows if row.context and row.mode == "decode"} - fastest.keys():
        same = [at for at in sorted(fastest) if same_work(config, at, context)]
        fastest |= {context: fastest[same[0]]} if same else {}
    return [
        {"name": name, "title": kind_title(shape, name), "batch": batch, "context": context, "us": row.p50_us,
         "low_us": row.p20_us, "high_us": row.p80_us, "estimated": row.source == "estimated",
         "cache_bytes": config.cache_bytes(batch, context, dtype_bytes(target.dtype))}
        for context, row in sorted(fastest.items())
    ]  # fmt: skip


def whole_models(found: TargetFacts, shape: ModelSpec, db: Path | None) -> tuple[pd.DataFrame, CostModel]:
    """(predictions for the full-attention model and the recommended placement, the cost model behind them).

    Columns: label, placement, context, batch, decode_tok_s, prefill_tok_s, j_per_token (NaN where rows are missing),
    needed_bytes (weights, caches, activations), cache_bytes, estimated, fits. Contexts: the profiled ones, and powers
    of two up to the model's own, where only memory is known.
    """
    target, best = found.target, recommended(found)
    rows = profile_rows(target, shape, db)
    cost = load_cost_model(target.device, shape, target.dtype, db) if rows else None
    cost = cost or CostModel([], shape, target.dtype, device=target.device)
    contexts = {row.context for row in rows if row.context} | {target.context, shape.max_context}
    contexts |= {2**power for power in range(10, 24) if 2**power <= shape.max_context}
    named = {"full attention": found.full.layers} if found.full else {}
    named |= {"recommended": best.row.layers} if best else {}
    points = [
        {"label": label, **_whole(cost, placement, context, target.batch)}
        for label, placement in named.items()
        for context in sorted(context for context in contexts if context <= shape.max_context)
    ]
    return pd.DataFrame(points), cost


def _whole(cost: CostModel, placement: Placement, context: int, batch: int) -> dict[str, Any]:
    found = cost.cache(placement, context, batch)
    with contextlib.suppress(UserError):  # beyond the profiled contexts only memory is known
        found = cost.cost(placement, context, batch)
    cells = {name: getattr(found, name) for name in ("placement", "context", "batch", *WHOLE, "cache_bytes", "fits")}
    numbers = {name: math.nan if cells[name] is None else float(cells[name]) for name in WHOLE}
    return {**cells, **numbers, "estimated": found.source == "estimated"}


def roofline_points(rows: Sequence[Row], batch: int) -> pd.DataFrame:
    """What each block reached, at the profiled batch nearest to the target's.

    Columns: name (letter of the kind, or the shared block), mode, batch, context, flops_per_byte, gb_s, tflop_s,
    bandwidth_gb_s, peak_tflop_s (the device's own measured ceilings), estimated, shared (the same in every placement).
    """
    known = [
        row for row in rows
        if row.status == "ok" and row.gb_s and row.tflop_s and row.bandwidth_fraction and row.compute_fraction
    ]  # fmt: skip
    if not known:
        return pd.DataFrame()
    nearest = min({row.batch for row in known}, key=lambda size: (abs(size - batch), size))
    table = pd.DataFrame(
        [
            {"name": row.block, "shared": is_shared(row.block), "mode": row.mode, "batch": row.batch,
             "context": row.context, "gb_s": row.gb_s, "tflop_s": row.tflop_s,
             "bandwidth_gb_s": (row.gb_s or 0) / (row.bandwidth_fraction or 1),
             "peak_tflop_s": (row.tflop_s or 0) / (row.compute_fraction or 1),
             "estimated": row.source == "estimated"}
            for row in known if row.batch == nearest
        ]
    )  # fmt: skip
    table["flops_per_byte"] = 1e3 * table["tflop_s"] / table["gb_s"]
    # A fraction has four digits: the rows with the largest one tell the ceiling best.
    for rate, ceiling in (("gb_s", "bandwidth_gb_s"), ("tflop_s", "peak_tflop_s")):
        table[ceiling] = table[ceiling].iloc[int(table[rate].argmax())]
    return table
