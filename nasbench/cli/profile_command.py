"""`nasbench profile`: measures every layer kind and shared block on this device, into its database."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasbench.config import parse_size, parse_sizes
from nasbench.errors import MachineError, UserError

if TYPE_CHECKING:
    from nasbench.profiling.sweep import SweepResult, Todo


def command(
    model: Annotated[str, typer.Option(help="Built-in shape, local folder, .gguf file, hub name or default.")],
    blocks: Annotated[str, typer.Option(help="Layer kinds, with arguments where wanted: AWJG, 'A W2048'.")] = "AWJG",
    contexts: Annotated[
        str, typer.Option(help="Contexts, e.g. 4k,64k; default: powers of two from 1k (CPU) or 4k.")
    ] = "",
    batches: Annotated[
        str, typer.Option(help="Batches, e.g. 1,8,max; auto: powers of 4 to the largest that fits.")
    ] = "",
    modes: Annotated[str, typer.Option(help="decode, prefill or both.")] = "decode,prefill",
    db: Annotated[Path | None, typer.Option(help="Folder of the database DEVICE.csv.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; default: fp32 on a CPU, bf16 on a GPU.")] = "",
    chunk: Annotated[str, typer.Option(help="Tokens of a prefill chunk; default: 512 on a CPU, 2k on a GPU.")] = "",
    budget: Annotated[float, typer.Option(help="Seconds of timing for a row; 0: by the device.")] = 0.0,
    force: Annotated[bool, typer.Option("--force", help="Measure again what the database has.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and how long it takes.")] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="No child process per group: a crash ends the sweep.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one row may take; 0: by the budget.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure decode and prefill of layer kinds, MLP, norm, embedding and head. Rows that exist are skipped."""
    from nasbench.cli.common import log, print_json, torch_device
    from nasbench.profiling.plan import parse_batches

    context_list = parse_sizes(contexts)
    if budget < 0:
        raise UserError(f"budget {budget}: write seconds, or 0 to leave it to the device")
    if timeout < 0:
        raise UserError(f"timeout {timeout}: write seconds, or 0 to derive it from the budget")
    batch_list = parse_batches(batches) if batches else []
    chunk_tokens = parse_size(chunk) if chunk else None
    mode_list = [mode.strip() for mode in modes.split(",") if mode.strip()]

    from nasbench.backbone.resolve import resolve_shape
    from nasbench.profiling.sweep import prepare

    shape = resolve_shape(model)
    name = torch_device(device)
    on_gpu = name.startswith("cuda")
    todo = prepare(
        shape,
        blocks,
        context_list or default_contexts(shape.max_context, on_gpu),
        batch_list or (["auto"] if on_gpu else [1, 4]),
        mode_list,
        device=name,
        db=db,
        dtype=dtype or ("bf16" if on_gpu else "fp32"),
        chunk=chunk_tokens,
        force=force,
        seconds_per_row=budget or None,
        isolate=not in_process,
        patience_s=timeout or None,
    )
    if dry_run:
        _print_plan(todo, as_json)
        return
    try:
        result = _run(todo)
    except KeyboardInterrupt:
        log(f"stopped; what is measured is in {todo.path}, and the same command continues from here")
        raise
    summary = {
        "device": todo.machine.info.slug,
        "path": str(result.path),
        "measured": result.count("ok"),
        "skipped": result.skipped,
        **{status: result.count(status) for status in ("oom", "unsupported", "failed")},
    }
    if as_json:
        print_json(summary)
    else:
        print(", ".join(f"{key} {value}" for key, value in summary.items() if value or key == "measured"))
    if result.count("failed"):
        reasons = "; ".join(f"{row.block} {row.mode}: {row.reason}" for row in result.rows if row.status == "failed")
        raise MachineError(f"{result.count('failed')} rows failed: {reasons[:300]}")


def default_contexts(max_context: int, on_gpu: bool) -> list[int]:
    """Powers of two from 1k on a CPU or 4k on a GPU, to 8k or 256k or the model's end."""
    first, last = (4096, 262144) if on_gpu else (1024, 8192)
    contexts = [1 << power for power in range(first.bit_length() - 1, last.bit_length()) if 1 << power <= max_context]
    return contexts or [max_context]


def _print_plan(todo: Todo, as_json: bool) -> None:
    from nasbench.cli.common import print_json

    points = [str(point) for point in todo.points]
    if as_json:
        plan = {"device": todo.machine.info.slug, "path": str(todo.path), "skipped": todo.skipped}
        print_json({**plan, "points": points, "seconds": round(todo.seconds, 1)})
        return
    for point in points:
        print(point)
    ceilings = " and 4 ceilings" if todo.ceilings else ""
    print(
        f"{len(points)} rows{ceilings} into {todo.path}, about {todo.seconds:.0f} s; {todo.skipped} are there already"
    )


def _run(todo: Todo) -> SweepResult:
    """Runs the sweep under a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from nasbench.cli.common import log
    from nasbench.profiling.sweep import run
    from nasbench.store import Row

    if todo.machine.telemetry.missing:
        log(todo.machine.telemetry.missing)
    cores = todo.machine.info.cores
    if todo.machine.info.kind == "cpu" and todo.points and os.getloadavg()[0] > cores / 2:
        log(f"this machine is busy (load {os.getloadavg()[0]:.1f} on {cores} cores): the times will be too long")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("profile", total=len(todo.points) + 4 * todo.ceilings)

        def advance(done: int, total: int, row: Row) -> None:
            name = f"{row.block} {row.args}".strip()
            bar.update(task, completed=done, total=total, description=f"profile {row.mode} {name}")

        return run(todo, advance)
