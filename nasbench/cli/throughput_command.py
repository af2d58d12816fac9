"""nasbench throughput: a placement's speed, measured end to end."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from nasbench.cli.common import AsJson, Device, Dtype, chunk_help
from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_size


def command(
    placement: Annotated[str, typer.Argument(help="One letter per layer, as '14J A 4J A 2W 6J'.")],
    model: Annotated[str, typer.Option(help="Built-in shape, local folder, .gguf file, hub name or default.")],
    context: Annotated[str, typer.Option(help="Keys that a decode step attends to, as 4k.")],
    batch: Annotated[str, typer.Option(help="Sequences, or max for the most that fit.")] = "1",
    device: Device = "auto",
    dtype: Dtype = "",
    prefill: Annotated[bool, typer.Option(help="Measure prefill too.")] = True,
    prefill_context: Annotated[
        str | None, typer.Option(help="Prompt tokens of the prefill measurement; default: the context.")
    ] = None,
    chunk: Annotated[str | None, typer.Option(help=chunk_help())] = None,
    as_json: AsJson = False,
) -> None:
    """Measure decode and prefill of a whole model with random weights, and how near the memory's limit it is."""
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import choose_dtype, log, print_json, torch_device, torch_dtype

    shape = resolve_shape(model)
    layers = shape.parse(placement)
    tokens = parse_size(context)
    sequences = _batch(batch)
    prompt = None if not prefill else parse_size(prefill_context) if prefill_context else 0
    chunk_tokens = parse_size(chunk) if chunk else None

    from nasbench.runtime.throughput import measure

    where = torch_device(device)

    result = measure(
        shape,
        layers,
        context=tokens,
        batch=sequences,
        device=where,
        dtype=torch_dtype(choose_dtype(dtype, where)),
        prefill_context=prompt,
        chunk=chunk_tokens,
        log=log,
    )
    if as_json:
        print_json(result.as_dict())
        return
    print(f"{result.placement}  {result.model}  {result.device}  {result.dtype}  {result.measured_utc}")
    spread = f"p20 {result.step_p20_ms:.3f}, p80 {result.step_p80_ms:.3f}"
    print(
        f"decode   {result.decode_tok_s:.1f} tokens/s  (batch {result.batch}, context {result.context}: "
        f"{result.step_ms:.3f} ms a step, {spread})"
    )
    if result.prefill_s is not None:
        print(
            f"prefill  {result.prefill_tok_s:.1f} tokens/s  ({result.prefill_context} tokens a sequence, "
            f"{result.prefill_chunk} at a time: {result.prefill_s:.3f} s)"
        )
    print(f"memory   {result.peak_bytes / 2**20:.0f} MiB at most, {result.cache_bytes / 2**20:.2f} MiB of it cache")
    parts = ", ".join(f"{name} {ms:.3f}" for name, ms in result.floor_parts_ms.items())
    print(f"limit    {result.floor_ms:.3f} ms a step ({parts}): {result.floor_fraction:.0%} of it reached")
    print(
        f"         at {result.read_gb_s:.0f} GB/s read, {result.in_place_gb_s:.0f} in place, "
        f"{result.copy_gb_s:.0f} copied, {result.matmul_tflop_s:.2f} TFLOP/s of matrix products, all measured now"
    )
    if result.launches is not None:
        print(f"kernels  {result.launches} a step")
    if result.predicted_batch is not None:
        print(f"batch    {result.batch} confirmed, {result.predicted_batch} by the memory model")


def _batch(text: str) -> int | Literal["max"]:
    if text == "max":
        return "max"
    try:
        return parse_size(text)
    except UserError:
        raise UserError(f"bad batch {text!r}: write a positive whole number or max") from None
