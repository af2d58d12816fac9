"""`nasbench cost`: what a placement costs, from profile rows and formulas."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasbench.config import parse_size
from nasbench.errors import UserError

if TYPE_CHECKING:
    from nasbench.backbone.shapes import ModelShape
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
    from nasbench.backbone.resolve import resolve_shape
    from nasbench.cli.common import log, print_json
    from nasbench.cost import CostModel, find_profiles, profiled_devices
    from nasbench.devices import detect

    shape = resolve_shape(model)
    layers = shape.parse(placement)
    tokens, sequences = parse_size(context), parse_size(batch)
    slug = device or detect("auto").slug
    rows = find_profiles(slug, db) if device or slug in profiled_devices(db) else []
    costs = CostModel(rows, shape, dtype or _profiled_dtype(rows, shape))
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
        print_json(asdict(cost) | {"device": slug, "dtype": costs.dtype})
        return
    print(f"{cost.placement}  {cost.model}  {slug}  {costs.dtype}  context {cost.context}  batch {cost.batch}")
    if cost.decode_tok_s is not None:
        print(f"decode   {cost.decode_tok_s:.1f} tokens/s ({cost.step_ms:.3f} ms a step), {cost.source}")
    if cost.prefill_tok_s is not None:
        print(f"prefill  {cost.prefill_tok_s:.1f} tokens/s, {cost.source}")
    print(
        f"cache    {cost.cache_bytes / 2**20:.2f} MiB, and {cost.history_bytes / 2**20:.2f} MiB of convolution inputs"
    )


def _profiles(rows: list[Row], shape: ModelShape) -> list[Row]:
    """The rows of this model's layers."""
    from nasbench.store import block_cells

    mlp = block_cells(shape, "mlp")
    return [row for row in rows if all(getattr(row, name) == value for name, value in mlp.items())]


def _profiled_dtype(rows: list[Row], shape: ModelShape) -> str:
    """The data type that this model was profiled in, bf16 where there are several or none."""
    found = {row.dtype for row in _profiles(rows, shape)}
    return found.pop() if len(found) == 1 else "bf16"
