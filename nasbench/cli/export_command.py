"""`nasbench export`: a placement of a run as a checkpoint that other engines load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/NAME.")],
    placement: Annotated[str, typer.Option(help="One letter per layer, as 14J A 4J A 2W 6J.")],
    out: Annotated[Path, typer.Option(help="New folder; nothing is overwritten.")],
    format: Annotated[str, typer.Option(help="hf or jet-nemotron.")] = "hf",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of the weights.")] = "bf16",
) -> None:
    """Write a checkpoint: config.json, model.safetensors, tokenizer.json."""
    from nasbench.cli.common import torch_dtype
    from nasbench.runs import Run

    opened = Run.open(run)

    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.export import check_export, export

    check_export(format, out)
    layers = opened.spec.space.check(resolve_shape(opened.spec.model).parse(placement))
    print(export(opened, layers, out, format, dtype=torch_dtype(dtype)))
