"""`nasbench quickstart`: the whole loop on this machine, every stage the command that a person would type."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Annotated

import typer

from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_size


@dataclass(frozen=True)
class Preset:
    """What fits the time of a first look on a kind of device.

    Attributes:
        contexts, batches: of the profile; the target of the search lies among them.
        context, batch: the target.
        sequence: tokens of a training and evaluation sequence.
        align_tokens, supernet_tokens: budget of the distillation.
        align_batch, supernet_batch: tokens of a training step.
        evaluations: placements that the beam and the Optuna study may look at, each.
        search_tokens, test_tokens: held-out tokens that score a placement, while searching and at the end.
    """

    contexts: str
    batches: str
    context: str
    batch: str
    chunk: str
    sequence: str
    align_tokens: str
    align_batch: str
    supernet_tokens: str
    supernet_batch: str
    beam_evaluations: int
    optuna_evaluations: int
    search_tokens: str
    test_tokens: str


PRESETS = {
    "cpu": Preset("1k,2k,4k,8k", "1,4", "8k", "4", "512", "256", "16k", "256", "6k", "512", 40, 24, "1k", "2k"),
    "cuda": Preset("1k,2k,4k,8k", "1,32,256", "8k", "256", "2k", "1k", "2M", "8k", "512k", "16k", 100, 48, "4k", "16k"),
}
"""By the device's kind: a GPU does in the same minutes many times of what two CPU cores do."""

MIXERS = "AWJG"
FULL_ATTENTION = "1,2,4,8,15"


def command(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/quickstart"),
    model: Annotated[str, typer.Option(help="Model to search; see nasbench models.")] = "default",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    context: Annotated[str, typer.Option(help="Context to be fast at; default by device.")] = "",
    batch: Annotated[str, typer.Option(help="Batch to be fast at; default by device.")] = "",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; default: the faster one here.")] = "",
    full_attention: Annotated[str, typer.Option(help="Numbers of full-attention layers to search.")] = FULL_ATTENTION,
    scale: Annotated[
        float, typer.Option(help="Multiplies every budget: 0.1 for a smoke test, 4 for a better front.")
    ] = 1.0,
) -> None:
    """Profile, distil, search, validate and report; minutes on 2 CPU cores.

    Stopped at any moment, the same command continues.
    """
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import log, torch_device
    from nasbench.cli.main import run
    from nasbench.cost import check_context

    if not 0 < scale <= 1000:
        raise UserError(f"bad scale {scale}: choose a number above 0 and up to 1000")
    device = torch_device(device)
    shape = resolve_shape(model)
    preset = PRESETS[device.split(":")[0]]
    target = (context or preset.context, batch or preset.batch)
    check_context(shape, parse_size(target[0]))
    began = time.perf_counter()
    dtype = dtype or _dtype(out, device)
    stages = _stages(preset, out, model, device, target, dtype, full_attention, scale)
    for number, (title, arguments) in enumerate(stages, 1):
        log(f"\n[{number}/{len(stages)}] {title}\n      nasbench {' '.join(arguments)}")
        stage_began = time.perf_counter()
        code = run(arguments)
        if code:
            raise typer.Exit(code)
        log(f"      {title}: {time.perf_counter() - stage_began:.0f} s")
    _summary(out, out / "profiles", full_attention, time.perf_counter() - began)


def _dtype(out: Path, device: str) -> str:
    """The faster data type, as the first run of this folder found it: a second one goes on with its rows."""
    from nasbench.core.files import atomic_path, machine_errors
    from nasbench.devices.dtype import faster_dtype

    path = out / "dtype.txt"
    with machine_errors(f"writing {path}"):
        known = path.read_text(encoding="ascii").strip() if path.exists() else ""
        if known in ("fp32", "bf16"):
            return known
        found = faster_dtype(device)
        out.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(found + "\n", encoding="ascii")
    return found


def _stages(
    preset: Preset,
    out: Path,
    model: str,
    device: str,
    target: tuple[str, str],
    dtype: str,
    full_attention: str,
    scale: float,
) -> list[tuple[str, list[str]]]:
    """(title, command line) of every stage. Each finds what an earlier run of it has done, and goes on from there."""
    from nasbench.core.sizes import format_size

    def tokens(text: str, least: int = 1024) -> str:
        return format_size(max(least, int(parse_size(text) * scale)))

    def count(value: int) -> str:
        return str(max(8, int(value * scale)))

    folder, db = str(out), str(out / "profiles")
    contexts = ",".join(dict.fromkeys([*preset.contexts.split(","), target[0]]))
    batches = ",".join(dict.fromkeys([*preset.batches.split(","), target[1]]))
    goal = ["--context", target[0], "--batch", target[1], "--dtype", dtype, "--db", db, "--on", device]
    held_out = ["--search-tokens", tokens(preset.search_tokens), "--test-tokens", tokens(preset.test_tokens)]
    profile = ["profile", "--model", model, "--blocks", MIXERS, "--contexts", contexts, "--batches", batches]
    # A CPU's rows are its caches', too: measured in the process that measures the whole steps, both see the same.
    measuring = ["--calibrate", *([] if device.startswith("cuda") else ["--in-process"])]
    search = ["search", folder, "--full-attention", full_attention, *goal, "--eval-dtype", dtype, *held_out]
    distill = ["distill", "--model", model, "--names", "W,J", "--out", folder, "--device", device]
    distill += ["--dtype", dtype]
    budget = ["--sequence", preset.sequence]
    budget += ["--align-tokens", tokens(preset.align_tokens), "--align-batch", preset.align_batch]
    budget += ["--supernet-tokens", tokens(preset.supernet_tokens), "--supernet-batch", preset.supernet_batch]
    beam = ["--strategy", "beam", "--evaluations", count(preset.beam_evaluations)]
    optuna = ["--strategy", "optuna", "--evaluations", count(preset.optuna_evaluations)]
    return [
        (
            "profile: every layer kind on this device",
            [*profile, *measuring, "--chunk", preset.chunk, "--device", device, "--dtype", dtype, "--db", db],
        ),
        ("distill: the alternatives of every layer", [*distill, *budget]),
        ("search: beam over the full-attention layers", [*search, *beam]),
        ("search: Optuna over all layers and kinds", [*search, *optuna]),
        (
            "validate: the front end to end on this device",
            ["validate", folder, *goal[:8], "--device", device],
        ),
        ("report: one HTML file", ["report", folder, "--db", db]),
    ]


def _summary(out: Path, db: Path, full_attention: str, seconds: float) -> None:
    """The found placements in a table: the best of each K that was asked for, between the two ends."""
    from nasbench.cli.common import log, print_table
    from nasbench.cli.search_command import parse_counts
    from nasbench.report.facts import collect
    from nasbench.runs import Run

    facts = collect(Run.open(out), db)
    layers = facts.shape.num_layers
    asked = {*parse_counts(full_attention), 0}
    for target in facts.targets:
        speeds = {row.placement: f"{row.measured_tok_s:,.1f}" for row in facts.validation}
        full = target.full
        pairs = [pair for pair in reversed(target.comparisons) if pair.k in asked]
        losses = {pair.searched.placement: (pair.searched_test, pair.uniform_test) for pair in pairs}
        losses |= {point.row.placement: (point.row.loss_test, nan) for point in target.points if point.row.k == layers}
        trials = [*([full] if full else []), *(pair.searched for pair in pairs if pair.k != layers)]
        rows = [
            (
                trial.k,
                *(format(value, ".3f") if value == value else "" for value in losses.get(trial.placement, (nan, nan))),
                f"{trial.decode_tok_s:,.1f}",
                speeds.get(trial.placement, ""),
                f"{trial.decode_tok_s / full.decode_tok_s:.2f}" if full else "",
                f"{trial.cache_bytes / 2**20:,.0f}",
                trial.placement,
            )
            for trial in trials
        ]
        columns = ("K", "loss", "uniform", "tok/s", "measured", "×full", "cache MiB", "placement")
        print_table(columns, rows, f"{facts.shape.name} on {target.target}")
    log(
        "K layers keep full attention; loss on text that no search saw, in nats a token, beside that of evenly spread\n"
        "layers; tokens/s as the profile predicts and as measured end to end."
    )
    log(f"\nDone in {seconds / 60:.1f} minutes. Open {out / 'report' / 'index.html'} in a browser.")
