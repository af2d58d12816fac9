"""`nasbench cost`: what a placement costs, from profile rows and formulas."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_size

if TYPE_CHECKING:
    from nasbench.cost import Cost


def command(
    placement: Annotated[str, typer.Argument(help="One letter per layer, as '14J A 4J A 2W 6J'.")],
    model: Annotated[str, typer.Option(help="Built-in shape, local folder, .gguf file, hub name or default.")],
    context: Annotated[str, typer.Option(help="Tokens of a sequence, as 64k.")],
    batch: Annotated[str, typer.Option(help="Sequences.")] = "1",
    profile: Annotated[str, typer.Option(help="Profile database, by its device's name; default: this machine's.")] = "",
    device: Annotated[str, typer.Option(hidden=True)] = "",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; default: what was profiled, else bf16.")] = "",
    db: Annotated[Path | None, typer.Option(help="Folder or file of profile databases.")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Allow points outside of the measured ones.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="Also lay the caches out as a serving engine does that groups layers by kind: vllm.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict decode and prefill speed and cache size of a placement. The cache part needs no profile."""
    from nasbench.api import profiled_model
    from nasbench.cli.common import log, print_json
    from nasbench.cost import how_to_get_rows, stale_warning
    from nasbench.cost.engine import engine_cache

    costs, rows = profiled_model(model, profile or device, dtype, db)
    shape, slug = costs.shape, costs.device
    layers = shape.parse(placement)
    tokens, sequences = parse_size(context), parse_size(batch)
    cost, reason = costs.cache(layers, tokens, sequences), ""
    most = costs.largest_batch(layers, tokens)
    try:
        if cost.fits is False:
            largest = f"the largest batch is {most}" if most else "not even one sequence fits"
            raise UserError(f"batch {sequences} does not fit in the memory of {slug}: {largest}")
        if not rows:
            raise UserError(how_to_get_rows(slug, shape.name, db))
        cost = costs.cost(layers, tokens, sequences, extrapolate)
    except UserError as error:
        reason = str(error)
        log(f"cache only, no speed: {reason}")
    else:
        if cost.prefill_tok_s is None:
            log("no prefill rows for this: prefill_tok_s is left out")
    if cost.stale:
        log(stale_warning(cost.stale, slug, shape.name))
    served = engine_cache(engine, shape, layers, tokens, sequences, costs.dtype_bytes) if engine else None
    if as_json:
        extra: dict[str, Any] = {"device": slug, "dtype": costs.dtype, "largest_batch": most}
        extra |= {"step_interval_ms": cost.step_interval_ms}
        extra |= {"reason": reason} if reason else {}
        extra |= {"engine": asdict(served)} if served else {}
        print_json(asdict(cost) | extra)
        return
    print(f"{cost.placement}  {cost.model}  {slug}  {costs.dtype}  context {cost.context}  batch {cost.batch}")
    _print_speed(cost)
    cache, conv_state = (size / 2**20 for size in (cost.cache_bytes, cost.conv_state_bytes))
    print(f"cache    {cache:.2f} MiB, and {conv_state:.2f} MiB of convolution inputs")
    limit = "" if cost.fits is None else f", {'fits' if cost.fits else 'DOES NOT FIT'} in the memory of {slug}"
    print(f"memory   {cost.needed_bytes / 1e9:.2f} GB of weights, caches and activations{limit}")
    if most is not None:
        print(f"batch    {most} at most")
    if served:
        size, page = served.cache_bytes / 2**20, served.page_bytes / 2**10
        groups = f"{served.groups} groups of {served.group_layers} layers, {served.padding_layers} of them padding"
        print(f"{engine:<8} {size:.2f} MiB in pages of {page:.0f} KiB: {groups}")
        low, high = served.step_factor
        if high > 1:
            print(f"         by published figures its groups make a step {low:.2f} to {high:.2f} times as long")


def _print_speed(cost: Cost) -> None:
    from nasbench.cli.common import mark_source
    from nasbench.cost.calibration import LEVEL_SD

    if cost.decode_tok_s is not None:
        low, high = cost.step_interval_ms or (cost.step_ms, cost.step_ms)
        print(
            f"decode   {cost.decode_tok_s:.1f} tokens/s ({cost.step_ms:.3f} ms a step, 90 % within {low:.3f} to "
            f"{high:.3f}), {mark_source(cost.source)}, {_calibrated(cost.calibration_rows)}"
        )
    if cost.prefill_tok_s is not None:
        half = LEVEL_SD * (cost.prefill_stderr_tok_s or 0.0)
        print(f"prefill  {cost.prefill_tok_s:.1f} tokens/s (90 % within {half:.1f} of it), {mark_source(cost.source)}")
    if cost.j_per_token is not None:
        print(f"energy   {cost.j_per_token * 1e3:.3f} mJ a token")


def _calibrated(rows: int) -> str:
    return f"calibrated by {rows} whole steps" if rows else "not calibrated"
