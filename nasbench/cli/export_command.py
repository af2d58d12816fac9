"""`nasbench export`: a placement of a run as a checkpoint that other engines load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasbench.cli.common import AsJson
from nasbench.core.files import read_json


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, e.g. runs/NAME.")],
    placement: Annotated[str, typer.Option(help="One letter per layer, as 14J A 4J A 2W 6J.")],
    out: Annotated[Path, typer.Option(help="New folder; nothing is overwritten.")],
    format: Annotated[str, typer.Option(help="hf or jet-nemotron.")] = "hf",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of the weights.")] = "bf16",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint: config.json, model.safetensors, tokenizer.json."""
    from nasbench.cli.common import print_json, torch_dtype
    from nasbench.runs import Run

    opened = Run.open(run)

    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.export import check_export, export

    check_export(format, out)
    layers = opened.spec.space.check(resolve_shape(opened.spec.model).parse(placement))
    path = export(opened, layers, out, format, dtype=torch_dtype(dtype))
    if as_json:
        print_json({"out": str(path), "format": format, **read_json(path / "nasbench.json")})
    else:
        print(path)
