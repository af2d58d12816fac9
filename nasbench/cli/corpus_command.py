"""nasbench corpus: text to distil on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasbench.cli.common import AsJson, Device, Dtype, Model
from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_size

command = typer.Typer(help="Text to distil on, written by the model itself.", no_args_is_help=True)


@command.callback()
def root() -> None:
    """Text to distil on, written by the model itself."""


@command.command("generate")
def generate(
    out: Annotated[Path, typer.Option(help="A .jsonl, for --data of nasbench distill.")],
    model: Model = "default",
    tokens: Annotated[str, typer.Option(help="Tokens to write, as 4M.")] = "1M",
    length: Annotated[str, typer.Option(help="Most tokens of a document.")] = "512",
    batch: Annotated[str, typer.Option(help="Documents written at once; default by device.")] = "",
    temperature: Annotated[float, typer.Option(help="Of the sampling; 1 is the model's own distribution.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "",
    as_json: AsJson = False,
) -> None:
    """The model writes its own corpus: distillation without other data. Stopped, the same command continues."""
    import time

    from nasbench.checkpoints.load import load_model
    from nasbench.cli.common import choose_dtype, log, print_json, progress_bar, torch_device, torch_dtype
    from nasbench.data.self_corpus import BATCH, Writing, write_corpus, writing_alone

    if temperature <= 0:
        raise UserError(f"bad temperature {temperature}: above 0, or every document of a beginning would be the same")
    where = torch_device(device)
    size = parse_size(batch) if batch else BATCH.of(where)
    writing = Writing(model, parse_size(length), size, temperature, top_p, seed)
    budget = parse_size(tokens)
    if out.suffix != ".jsonl":
        raise UserError(f"bad name {out}: a corpus is a .jsonl")
    kind, began = torch_dtype(choose_dtype(dtype, where)), time.perf_counter()
    with writing_alone(out), progress_bar("corpus: reads the model") as progress:
        loaded = load_model(model, dtype=kind, device=where)
        written = write_corpus(loaded, writing, budget, out, progress)
    seconds = time.perf_counter() - began
    log(f"{out}: {written:,} tokens written by {loaded.source} in {seconds:.0f} s")
    if as_json:
        print_json({"out": str(out), "tokens": written, "model": model, "seconds": seconds})
