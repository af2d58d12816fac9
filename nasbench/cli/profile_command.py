"""`nasbench profile`: measures every layer kind and shared block on this device, into its database."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.cli.common import Blocks, Dtype, chunk_help
from nasbench.core.by_device import ByDevice
from nasbench.core.dtypes import dtype_name
from nasbench.core.errors import MachineError, UserError
from nasbench.core.sizes import parse_size, parse_sizes

if TYPE_CHECKING:
    from nasbench.cost.holdout import WholePoint
    from nasbench.profiling.plan import Point
    from nasbench.profiling.sweep import SweepPlan, SweepResult

LIMIT_S = ByDevice(cpu=600, cuda=0)
"""Seconds of a command that does not say: every kind and size on a CPU would take hours."""
SWEEP = 0.5
"""Share of them that rows may take where whole steps follow."""
WHOLE_RUNS = 5
"""About how many times a whole step or prompt runs, warm-up included."""


def command(
    model: Annotated[str, typer.Option(help="Built-in shape, local folder, .gguf file, hub name or default.")],
    blocks: Blocks = "",
    contexts: Annotated[
        str, typer.Option(help="Contexts, e.g. 4k,64k; default: powers of two from 1k (CPU) or 4k.")
    ] = "",
    batches: Annotated[
        str, typer.Option(help="Batches, e.g. 1,8,max; auto: powers of 2 to the largest that fits.")
    ] = "",
    modes: Annotated[str, typer.Option(help="decode, prefill or both.")] = "decode,prefill",
    db: Annotated[Path | None, typer.Option(help="Folder of the database DEVICE.csv.")] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; equal cards with commas share the rows, as cuda:0,cuda:1.")
    ] = "auto",
    dtype: Dtype = "",
    chunk: Annotated[str, typer.Option(help=chunk_help())] = "",
    budget: Annotated[float, typer.Option(help="Seconds of timing for a row; 0: by the device.")] = 0.0,
    force: Annotated[bool, typer.Option("--force", help="Measure again what the database has.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and how long it takes.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Then measure a few whole steps and prompts, for the cost model.")
    ] = False,
    holdout: Annotated[
        int, typer.Option(help="Then measure so many random whole models and print the cost model's errors.")
    ] = 0,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="No child process per group: a crash ends the sweep.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one row may take; 0: by the budget.")] = 0.0,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds that all of it may take; what does not fit is named, and the same command continues. "
            "0: no limit; default: 600 on a CPU, none on a GPU."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure decode and prefill of mixers, FFNs, norm, embedding and head. Rows that exist are skipped.

    Without --blocks every layer kind is measured.
    """
    from nasbench.cli.common import choose_dtype, log, torch_device
    from nasbench.profiling.plan import parse_batches

    for option, seconds in (("budget", budget), ("timeout", timeout), ("limit", limit)):
        if seconds is not None and seconds < 0:
            raise UserError(f"{option} {seconds}: write seconds, or 0 for the default")
    asked_contexts = parse_sizes(contexts)
    asked_batches = parse_batches(batches) if batches else []
    tokens = parse_size(chunk) if chunk else None
    mode_list = [mode.strip() for mode in modes.split(",") if mode.strip()]

    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.profiling.sweep import prepare

    shape, names = resolve_shape(model), _names(blocks)
    names_of_devices = [torch_device(part.strip()) for part in device.split(",")]
    name, all_devices = names_of_devices[0], ",".join(names_of_devices)
    on_gpu = name.startswith("cuda")
    context_list = asked_contexts or default_contexts(shape.max_context, on_gpu)
    batch_list = asked_batches or (["auto"] if on_gpu else [1, 4])
    limit_s = LIMIT_S.of(name) if limit is None else limit
    whole = calibrate or holdout > 0
    todo = prepare(
        shape, names, context_list, batch_list, mode_list, device=all_devices, db=db,
        dtype=choose_dtype(dtype, name), chunk=tokens, force=force, seconds_per_row=budget or None,
        isolate=not in_process, timeout_s=timeout or None, limit_s=(SWEEP if whole else 1.0) * limit_s or None,
    )  # fmt: skip
    if dry_run:
        _print_plan(todo, as_json)
        return
    began = time.monotonic()
    try:
        result = _run(todo)
    except KeyboardInterrupt:
        log(f"stopped; what is measured is in {todo.path}, and the same command continues from here")
        raise
    summary = {
        "device": todo.machine.info.slug,
        "path": str(result.path),
        "measured": result.count("ok"),
        "noisy": len(result.noisy),
        "skipped": result.skipped,
        "left": len(result.left),
        **{status: result.count(status) for status in ("oom", "unsupported", "failed")},
        "seconds": round(time.monotonic() - began, 1),
    }
    if result.left:
        log(f"left out for lack of time, the same command continues: {_named(result.left)}")
    if result.noisy:
        log(f"{len(result.noisy)} of {len(result.rows)} rows are noisy: something else used the machine")
    if whole:
        end = began + limit_s if limit_s else None
        asked = max((batch for batch in batch_list if isinstance(batch, int)), default=1)
        summary |= _whole_models(todo, names, context_list, tokens, mode_list, calibrate, holdout, asked, end)
    _print_summary(summary, as_json)
    if result.count("failed"):
        reasons = "; ".join(f"{row.block} {row.mode}: {row.reason}" for row in result.rows if row.status == "failed")
        raise MachineError(f"{result.count('failed')} rows failed: {reasons[:300]}")


def _names(blocks: str) -> list[str]:
    """Full attention and the mixers of `--blocks`, without repeats; every registered kind for none."""
    from nasbench.model import MIXERS
    from nasbench.spaces.placement import parse_placement

    return list(dict.fromkeys(("A", *parse_placement(blocks)))) if blocks else list(MIXERS)


def _print_summary(summary: dict[str, Any], as_json: bool) -> None:
    from nasbench.cli.common import print_json

    if as_json:
        print_json(summary)
    else:
        print(", ".join(f"{key} {value}" for key, value in summary.items() if value or key == "measured"))


def _whole_models(
    todo: SweepPlan,
    names: Sequence[str],
    contexts: list[int],
    chunk: int | None,
    modes: Sequence[str],
    calibrate: bool,
    holdout: int,
    batch: int,
    end: float | None,
) -> dict[str, Any]:
    """Measures whole prompts and steps that have not been measured yet; returns what the command prints of them.

    Args:
        batch: the largest of the command line.
        end: of the limit, by time.monotonic.
    """
    from nasbench.cli.common import log
    from nasbench.cost import load_cost_model
    from nasbench.cost.calibration import calibration_path, read_calibration
    from nasbench.cost.end_to_end import PROMPT_TOKENS, EndToEnd, calibration_points, measure_missing
    from nasbench.cost.holdout import evaluate, holdout_path, holdout_points, with_between
    from nasbench.model import MIXERS
    from nasbench.store import read_db, select

    shape, info, dtype = todo.bench.shape, todo.machine.info, todo.bench.dtype
    whole = EndToEnd(shape, todo.bench.device, dtype)
    whole.decoders.of(tuple(names[i % len(names)] for i in range(shape.num_layers)))  # what takes long, at once
    clock = _Clock(todo, end)
    path = calibration_path(todo.path)
    told: dict[str, Any] = {}
    mine = {"hidden_size": shape.hidden_size, "dtype": dtype_name(dtype), "mode": "decode"}
    rows = select(read_db(todo.path), status="ok", source="measured", **mine) if todo.path.exists() else []
    profiled = {row.batch for row in rows if row.block in MIXERS}
    if calibrate:
        points = calibration_points(shape, names, contexts, info, dtype.itemsize, profiled, batch)
        told["calibration"] = sum(
            measure_missing(
                whole, [point for point in points if point.mode == mode], path, log, chunk,
                allows=clock.share(share),
            )
            for mode, share in (("prefill", 0.4), ("decode", 0.6 if holdout else 1.0))
            if mode in modes
        )  # fmt: skip
    if holdout:
        asked = {"memory_bytes": info.memory_bytes, "dtype_bytes": dtype.itemsize}
        asked |= {"prompt_tokens": PROMPT_TOKENS.of(info.kind) // 2, "largest": max(profiled, default=1)}
        places = with_between(contexts)
        points = [point for mode in modes for point in holdout_points(shape, names, mode, places, holdout, **asked)]
        known = read_calibration(path)
        measure_missing(whole, points, holdout_path(todo.path), log, chunk, known, clock.share(1.0))
        costs = load_cost_model(info.slug, shape, dtype_name(dtype), todo.path)
        found, uncovered = evaluate(costs, read_calibration(holdout_path(todo.path)))
        told["holdout"] = {mode: errors.cells() for mode, errors in found.items()} | {"not_covered": uncovered}
    return told


class _Clock:
    """Says whether a whole step or prompt, repeated a few times, ends within a share of the time that is left."""

    def __init__(self, todo: SweepPlan, end: float | None) -> None:
        self.todo, self.end = todo, end
        self.runs_s: list[float] = []
        self.began = time.monotonic()

    def share(self, share: float) -> Callable[[WholePoint], bool]:
        """The question, for points that may take this share of the rest, with the cost model of the rows so far."""
        from nasbench.cost import load_cost_model
        from nasbench.cost.holdout import compare_point

        todo, end = self.todo, self.end
        if end is None or not todo.path.exists():
            return lambda point: True
        costs = load_cost_model(todo.machine.info.slug, todo.bench.shape, dtype_name(todo.bench.dtype), todo.path)
        stop = time.monotonic() + share * (end - time.monotonic())

        def allows(point: WholePoint) -> bool:
            try:
                tok_s = compare_point(costs, point, 1.0, extrapolate=True).predicted_tok_s
            except UserError:  # of a kind without rows
                tok_s = float("inf")
            runs_s = WHOLE_RUNS * point.tokens / tok_s
            # What stands around the runs, decoders, caches and graphs, takes what it took so far.
            around_s = max(0.0, time.monotonic() - self.began - sum(self.runs_s)) / max(1, len(self.runs_s))
            fits = time.monotonic() + around_s + runs_s < stop
            self.runs_s += [runs_s] * fits
            return fits

        return allows


def _named(points: Sequence[Point]) -> str:
    """How many points of which mode and block: `3 prefill A, 1 decode mlp`."""
    counts = Counter(f"{point.mode} {point.block}" for point in points)
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def default_contexts(max_context: int, on_gpu: bool) -> list[int]:
    """Powers of two from 1k on a CPU or 4k on a GPU, to 8k or 256k or the model's end."""
    first, last = (4096, 262144) if on_gpu else (1024, 8192)
    contexts = [1 << power for power in range(first.bit_length() - 1, last.bit_length()) if 1 << power <= max_context]
    return contexts or [max_context]


def _print_plan(todo: SweepPlan, as_json: bool) -> None:
    from nasbench.cli.common import print_json

    points = [str(point) for point in todo.points]
    if as_json:
        plan = {"device": todo.machine.info.slug, "path": str(todo.path), "skipped": todo.skipped}
        print_json({**plan, "points": points, "seconds": round(todo.seconds, 1), "limit": todo.limit_s})
        return
    for point in points:
        print(point)
    ceilings = " and 4 ceilings" if todo.ceilings else ""
    limit = f" of which the limit leaves {todo.limit_s:.0f}" if todo.limit_s and todo.seconds > todo.limit_s else ""
    seconds = f"about {todo.seconds:.0f} s{limit}"
    print(f"{len(points)} rows{ceilings} into {todo.path}, {seconds}; {todo.skipped} are there already")


def _run(todo: SweepPlan) -> SweepResult:
    """Runs the sweep under a progress bar on standard error."""
    from nasbench.cli.common import log, progress_bar
    from nasbench.profiling.sweep import run

    if todo.machine.telemetry.missing:
        log(todo.machine.telemetry.missing)
    cores = todo.machine.info.cores
    if todo.machine.info.kind == "cpu" and todo.points and os.getloadavg()[0] > cores / 2:
        log(f"this machine is busy (load {os.getloadavg()[0]:.1f} on {cores} cores): the times will be too long")
    with progress_bar() as bar:
        return run(todo, lambda done, total, row: bar("profile", done, total))
