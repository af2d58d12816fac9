"""nasbench select-block: layer kinds trained and measured alike, in one table."""

from __future__ import annotations

import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.cli.common import AsJson, Blocks, Device, DryRun, Model
from nasbench.cli.training_options import TrainDtype
from nasbench.core.sizes import parse_size

if TYPE_CHECKING:
    from nasbench.model.shapes import ModelSpec


def command(
    blocks: Blocks = "J,G,M,H64",
    model: Model = "default",
    out: Annotated[Path, typer.Option(help="Folder of the runs, one for each kind, and of the table.")] = Path(
        "runs/blocks"
    ),
    full_attention: Annotated[
        int, typer.Option("--full-attention", "-k", help="Layers that keep full attention, evenly spread.")
    ] = 4,
    data: Annotated[str, typer.Option(help="Text, as of distill; default: Python's help.")] = "",
    sequence: Annotated[str, typer.Option(help="Tokens of a training sequence.")] = "1k",
    align_tokens: Annotated[str, typer.Option(help="Tokens of block-wise alignment, for each kind.")] = "16k",
    tokens: Annotated[str, typer.Option(help="Tokens of distilling the placement then, for each kind.")] = "16k",
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of the training, for all.")] = None,
    tasks: Annotated[str, typer.Option(help="Scored beside loss and KL, as retrieval@512:100,mc:FILE.jsonl.")] = "",
    suite: Annotated[str, typer.Option(help="Folder of benchmark files, .jsonl, scored too.")] = "",
    test_tokens: Annotated[str, typer.Option(help="Held-out tokens; default: all.")] = "",
    context: Annotated[str, typer.Option(help="Context of the speeds and the cache.")] = "4k",
    batch: Annotated[int, typer.Option(help="Sequences that decode at once.")] = 1,
    speeds: Annotated[bool, typer.Option(help="Profile the kinds; without, the table has no speeds.")] = True,
    row_seconds: Annotated[float, typer.Option(help="Seconds of timing for a profile row; 0: by the device.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "auto",
    dtype: TrainDtype = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Choose a linear block: every kind gets the same text, tokens and full-attention layers (PostNAS stage 2).

    Each kind is aligned with the attention it replaces, distilled at the evenly spread placement, scored, profiled.
    Stopped at any moment, the same command continues.
    """
    import sys

    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import log, parse_kinds, print_json, torch_device
    from nasbench.cli.main import parse, run
    from nasbench.devices.dtype import faster_dtype
    from nasbench.pipeline import State, Step, run_steps
    from nasbench.spaces.placement import format_placement
    from nasbench.spaces.space import Space

    shape, where = resolve_shape(model), torch_device(device)
    kinds = parse_kinds(blocks, shape)[1:]
    parse_size(context)
    dtype = dtype or faster_dtype(where)
    on, shared = ["--device", where, "--dtype", dtype], ["--config", str(config)] if config else []
    # Every kind is trained, also one that could keep the attention's weights.
    shared += ["--set", "frozen=[]", "--set", "solved=[]"]
    if not all(shape.mixer(kind).block_class().supports_packed_documents for kind in kinds):
        # Alike for all: where one kind cannot keep documents apart, none does.
        shared += ["--set", "documents=false"]
    steps: list[Step] = []
    if speeds:
        steps.append(Step("profile: decode steps and prompts of every kind", (
            "profile", "--model", model, "--blocks", " ".join(["A", *kinds]), "--contexts", context,
            "--batches", str(batch), "--budget", str(row_seconds), "--db", str(out / "profiles"),
            *(["--in-process"] if where == "cpu" else []), *on,
        )))  # fmt: skip
    for kind in kinds:
        space = Space.around(shape.placement, (kind,))
        placement = space.with_full_attention(space.homogeneous(kind), space.evenly(full_attention))
        words = {"model": model, "data": data, "sequence": sequence, "align-tokens": align_tokens, "seed": str(seed)}
        steps += [
            Step(f"distill: {kind} beside full attention in every layer", (
                "distill", "--out", str(out / kind), "--blocks", kind, "--supernet-tokens", "0",
                *(f"--{name}={text}" for name, text in words.items() if text), *shared, *on,
            )),
            Step(f"finalize: {kind}, {full_attention} layers of full attention", (
                "finalize", str(out / kind), "--placement", format_placement(placement), "--tokens", tokens,
                *shared, *on,
            )),
            Step(f"eval: {kind}", (
                "eval", str(out / kind), "--placements", "final", "--tasks", tasks, "--suite", suite,
                "--test-tokens", test_tokens, *on,
            )),
        ]  # fmt: skip
    for step in steps:
        parse(list(step.words))
    if dry_run:
        if as_json:
            print_json({"out": str(out), "steps": [{"title": s.title, "command": s.command} for s in steps]})
        else:
            print("\n\n".join(f"# {step.title}\n{step.command}" for step in steps))
        return
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        if code := run_steps(steps, State(out), run, log):
            raise typer.Exit(code)
        found = _tell(shape, kinds, out, full_attention, (parse_size(context), batch), dtype, where)
    log(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes.")
    if as_json:
        print_json(found)


def _tell(
    shape: ModelSpec,
    kinds: tuple[str, ...],
    out: Path,
    full_attention: int,
    target: tuple[int, int],
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Writes the table and its plot, prints it, and returns what --json prints."""
    from nasbench.cli.common import log, print_table
    from nasbench.core.sizes import format_size
    from nasbench.devices import detect
    from nasbench.report.blocks import block_table, markdown_cells, write_block_table
    from nasbench.runs import Run

    slug, (context, batch) = detect(device).slug, target
    runs = [Run.open(out / kind) for kind in kinds]
    table = block_table(runs, shape, full_attention, context, batch, dtype, slug, out / "profiles")
    title = (
        f"{shape.name}, {full_attention} of {shape.num_layers} layers with full attention, evenly spread; "
        f"{slug}, {format_size(context)} x {batch}, {dtype}"
    )
    files = write_block_table(table, out, title)
    columns, rows = markdown_cells(table.drop(columns=["placement"]))
    # A kind a column: there are more measures than a terminal is wide.
    print_table([columns[0], *(row[0] for row in rows)], list(zip(columns, *rows, strict=True))[1:], title)
    log("wrote " + ", ".join(map(str, files)))
    return {"out": str(out), "files": [str(file) for file in files], "kinds": table.to_dict("records")}
