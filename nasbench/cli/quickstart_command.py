"""`nasbench quickstart`: the recipe `quickstart` on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasbench.cli.common import AsJson, Device, DryRun


def command(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/quickstart"),
    model: Annotated[str, typer.Option(help="Model to search; see nasbench models.")] = "",
    device: Device = "auto",
    context: Annotated[str, typer.Option(help="Context to be fast at; default by device.")] = "",
    batch: Annotated[str, typer.Option(help="Batch to be fast at; default by device.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; default: the faster one here.")] = "",
    full_attention: Annotated[str, typer.Option(help="Numbers of full-attention layers to search.")] = "",
    scale: Annotated[str, typer.Option(help="Multiplies every budget: 0.1 for a smoke test.")] = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Profile, distil, search, validate and report; minutes on 2 CPU cores.

    The recipe `quickstart` of `nasbench run`. Stopped at any moment, the same command continues.
    """
    from nasbench.cli.run_command import run_recipe

    asked = {"model": model, "context": context, "batch": batch, "dtype": dtype}
    asked |= {"full_attention": full_attention, "scale": scale}
    changes = {name: text for name, text in asked.items() if text}
    run_recipe("quickstart", out, device, changes, dry_run=dry_run, as_json=as_json)
