"""`nasbench cost`: what a placement costs, from profile rows and formulas."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_size

if TYPE_CHECKING:
    from nasbench.model.shapes import ModelSpec
    from nasbench.store import Row


def command(
    placement: Annotated[str, typer.Argument(help="One letter per layer, as '14J A 4J A 2W 6J'.")],
    model: Annotated[str, typer.Option(help="Built-in shape, local folder, .gguf file, hub name or default.")],
    context: Annotated[str, typer.Option(help="Tokens of a sequence, as 64k.")],
    batch: Annotated[str, typer.Option(help="Sequences.")] = "1",
    device: Annotated[str, typer.Option(help="Device with profile rows; default: the one found here.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; default: what was profiled, else bf16.")] = "",
    db: Annotated[Path | None, typer.Option(help="Folder or file of profile databases.")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Allow points outside of the measured ones.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict decode and prefill speed and cache size of a placement. The cache part needs no profile."""
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import log, print_json
    from nasbench.cost import CostModel, find_profiles, load_cost_model, profiled_devices
    from nasbench.cost.model import INTERVAL_SD
    from nasbench.devices import detect

    shape = resolve_shape(model)
    layers = shape.parse(placement)
    tokens, sequences = parse_size(context), parse_size(batch)
    slug = device or detect("auto").slug
    rows = find_profiles(slug, db) if device or slug in profiled_devices(db) else []
    width = dtype or _profiled_dtype(rows, shape)
    costs = load_cost_model(slug, shape, width, db) if rows else CostModel([], shape, width)
    cost = costs.cache(layers, tokens, sequences)
    try:
        cost = costs.cost(layers, tokens, sequences, extrapolate)
    except UserError as error:
        # Who names a device wants a speed, and not half an answer.
        if device:
            raise
        log(f"cache only, no speed: {error}")
    else:
        if cost.prefill_tok_s is None:
            log("no prefill rows for this: prefill_tok_s is left out")
    if as_json:
        extra = {"device": slug, "dtype": costs.dtype, "step_interval_ms": cost.step_interval_ms}
        print_json(asdict(cost) | extra)
        return
    print(f"{cost.placement}  {cost.model}  {slug}  {costs.dtype}  context {cost.context}  batch {cost.batch}")
    if cost.decode_tok_s is not None:
        low, high = cost.step_interval_ms or (cost.step_ms, cost.step_ms)
        print(
            f"decode   {cost.decode_tok_s:.1f} tokens/s ({cost.step_ms:.3f} ms a step, 90 % within {low:.3f} to "
            f"{high:.3f}), {_mark(cost.source)}, {_calibrated(cost.calibration_rows)}"
        )
    if cost.prefill_tok_s is not None:
        half = INTERVAL_SD * (cost.prefill_stderr_tok_s or 0.0)
        print(f"prefill  {cost.prefill_tok_s:.1f} tokens/s (90 % within {half:.1f} of it), {_mark(cost.source)}")
    if cost.j_per_token is not None:
        print(f"energy   {cost.j_per_token * 1e3:.3f} mJ a token")
    print(
        f"cache    {cost.cache_bytes / 2**20:.2f} MiB, and {cost.history_bytes / 2**20:.2f} MiB of convolution inputs"
    )


def _mark(source: str) -> str:
    return "ESTIMATED" if source == "estimated" else source


def _calibrated(rows: int) -> str:
    return f"calibrated by {rows} whole steps" if rows else "not calibrated"


def _profiles(rows: list[Row], shape: ModelSpec) -> list[Row]:
    """The rows of this model's layers."""
    from nasbench.store import block_cells

    mlp = block_cells(shape, "mlp")
    return [row for row in rows if all(getattr(row, name) == value for name, value in mlp.items())]


def _profiled_dtype(rows: list[Row], shape: ModelSpec) -> str:
    """The data type that this model was profiled in, bf16 where there are several or none."""
    found = {row.dtype for row in _profiles(rows, shape)}
    return found.pop() if len(found) == 1 else "bf16"
