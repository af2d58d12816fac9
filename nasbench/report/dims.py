"""The table of `nasbench search-dims`: dimensions of a layer kind that cost alike, measured, beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pandas

from nasbench.cost.calibration import CalibrationRow
from nasbench.evaluation.ranks import kendall
from nasbench.report.blocks import LOSS, SPEED
from nasbench.runtime.roofline import decode_bytes
from nasbench.search.dims import placement_of
from nasbench.spaces.placement import format_placement

if TYPE_CHECKING:
    from nasbench.model.shapes import ModelSpec

DIMS = ("heads", "key dim", "value dim", "convolution")
PARAMETERS, LEAST, PROMPT = "parameters (M)", "least GB a step", "prompt tokens/s"
PAPER = ("paper: parameters (M)", "paper: tokens/s", "paper: retrieval (%)", "paper: maths (%)")
TABLE_2 = {
    "J@4x256x288": (1620, 2969, 67.6, 31.3),
    "J@4x192x384": (1640, 2961, 69.3, 32.3),
    "J@4x128x576": (1700, 2979, 69.5, 32.5),
    "J@8x256x144": (1660, 2986, 68.3, 32.1),
    "J@8x192x192": (1700, 2970, 70.6, 32.8),
    "J@8x128x288": (1740, 2971, 69.6, 33.2),
    "J@12x128x192": (1780, 2959, 68.8, 32.9),
    "J@12x96x256": (1840, 2955, 69.6, 34.8),
    "J@12x64x384": (1980, 2952, 70.1, 34.2),
}
"""Table 2 of arXiv 2508.15884: the 2B shape on an H100 at 64K x 128, the cache constant. PAPER has the columns."""


def dims_table(
    names: Sequence[str],
    shape: ModelSpec,
    full_attention: int,
    target: tuple[int, int],
    dtype_bytes: int,
    speeds: Sequence[CalibrationRow],
    scores: Path | None,
) -> pandas.DataFrame:
    """One row a name: dimensions, costs by formula, measured speeds, scores, and the paper's figures.

    Args:
        target: context and batch of cache and decode steps.
        speeds: measured ones; what is not among them stays empty.
        scores: blocks.csv of `nasbench select-block`, where there is one.
    """
    context, batch = target
    took = {(row.mode, row.placement): row for row in speeds if row.mode == "prefill" or row.context == context}
    rows: list[dict[str, Any]] = []
    for name in names:
        spec, placement = shape.mixer(name), placement_of(shape, name, full_attention)
        assert spec.dims is not None
        row: dict[str, Any] = {
            "kind": name,
            **dict(zip(DIMS, spec.dims, strict=True)),
            PARAMETERS: shape.parameters(placement) / 1e6,
            "cache MiB": round(shape.cache_bytes(placement, 1, context, dtype_bytes) / 2**20, 2),
        }
        row[LEAST] = decode_bytes(shape, placement, batch, context, dtype_bytes) / 1e9
        text = format_placement(placement)
        if step := took.get(("decode", text)):
            row |= {"step ms": round(step.time_ms, 4), SPEED: round(batch / step.time_ms * 1e3, 1)}
        if prompt := took.get(("prefill", text)):
            row[PROMPT] = round(prompt.batch * prompt.context / prompt.time_ms * 1e3, 1)
        rows.append(row | dict(zip(PAPER, TABLE_2.get(name, ()), strict=False)))
    table = pandas.DataFrame(rows)
    if scores and scores.is_file():
        more = pandas.read_csv(scores)
        told = ["name", "placement", "parameters of a layer", "cache MiB"]
        table = table.merge(more.drop(columns=told).dropna(axis="columns", how="all"), on="kind", how="left")
    return table


def spreads(table: pandas.DataFrame) -> list[str]:
    """Sentences: how far apart the dimensions lie, and what goes with their parameters."""
    told = []
    for column, paper in ((SPEED, PAPER[1]), (PROMPT, ""), (LEAST, ""), (PARAMETERS, PAPER[0])):
        if column in table and table[column].notna().sum() > 1:
            theirs = f" (the paper's: {_spread(table[paper]):.1%})" if paper in table else ""
            told.append(f"{column}: {_spread(table[column]):.1%} from the least to the most{theirs}.")
    for column in (SPEED, *PAPER[2:], LOSS, "kl"):
        known = table.dropna(subset=[column]) if column in table else table[:0]
        if len(known) > 3:
            size, score = (known[name].to_numpy(float) for name in (PARAMETERS, column))
            tau, low, high = kendall(size, score, numpy.zeros(len(known)))
            told.append(f"Kendall's tau of parameters and {column}: {tau:.2f} ({low:.2f} to {high:.2f}).")
    return told


def _spread(values: pandas.Series) -> float:
    return float(values.max() / values.min() - 1)
