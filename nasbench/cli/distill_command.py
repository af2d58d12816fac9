"""nasbench distill: train the once-for-all supernet of a run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.cli.common import AsJson, Blocks, Device, DryRun, Model
from nasbench.cli.training_options import Settings, Shard, TensorBoard, TrainDtype, read_inputs, training_settings
from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_budget, parse_size

if TYPE_CHECKING:
    from nasbench.runs import RunSpec


def command(
    out: Annotated[Path, typer.Option(help="The run's folder, as runs/NAME.")],
    model: Model = "",
    blocks: Blocks = "",
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of the training.")] = None,
    data: Annotated[
        str, typer.Option(help="Text: .txt, .jsonl, .parquet, a folder, hf:NAME[:SPLIT]; default: Python's help.")
    ] = "",
    align_tokens: Annotated[
        str | None, typer.Option(help="Tokens of block-wise alignment, as 16k; 0 for none.")
    ] = None,
    supernet_tokens: Annotated[str | None, typer.Option(help="Tokens of random sub-networks; 0 for none.")] = None,
    align_seconds: Annotated[float, typer.Option(help="Time of alignment; with tokens, the fewer of both.")] = 0.0,
    supernet_seconds: Annotated[float, typer.Option(help="Time of random sub-networks; with tokens, the fewer.")] = 0.0,
    changes: Settings = None,
    align_batch: Annotated[str | None, typer.Option(help="Tokens of an alignment step.")] = None,
    supernet_batch: Annotated[str | None, typer.Option(help="Tokens of a supernet step.")] = None,
    sequence: Annotated[str, typer.Option(help="Tokens of a training sequence; default: 256.")] = "",
    seed: Annotated[int | None, typer.Option(help="Of everything random; default: 0.")] = None,
    device: Device = "auto",
    dtype: TrainDtype = "",
    shard: Shard = None,
    tensorboard: TensorBoard = None,
    dry_run: DryRun = False,
    cards: Annotated[
        str, typer.Option(help="With --dry-run: on paper for so many cards, as 1,8,64; the step is each card's.")
    ] = "",
    card: Annotated[str, typer.Option(help="Of --cards: a device of `nasbench devices`; default: the one here.")] = "",
    as_json: AsJson = False,
) -> None:
    """Train every layer's alternatives against the frozen model. Run again, it continues where it stopped.

    Options that are not given are the run's own, in a new run the defaults (--model default --blocks "W J"). Asked for
    more tokens or seconds, a finished run goes on; for fewer tokens, a stopped one ends earlier. Seconds become tokens
    by a few timed steps. Under torchrun, every process takes its rows of each batch. --dry-run times a few steps and
    says tokens, memory and time; with --cards it computes them, for built-in shapes too.
    """
    from nasbench.cli.common import log, print_json, progress_bar, torch_device, torch_dtype
    from nasbench.core.files import sole_writer
    from nasbench.data.text import data_files
    from nasbench.parallel.context import dist_context
    from nasbench.parallel.fsdp import check, place_of
    from nasbench.runs import Run
    from nasbench.supernet.budget import Budget
    from nasbench.supernet.train import distill

    seconds = {"align": align_seconds, "supernet": supernet_seconds}
    for stage, value in seconds.items():
        if not value >= 0:
            raise UserError(f"bad --{stage}-seconds {value}: at least 0")
    sizes = {"align_tokens": align_tokens, "supernet_tokens": supernet_tokens}
    sizes |= {"align_batch_tokens": align_batch, "supernet_batch_tokens": supernet_batch}
    if (cards or card) and not (dry_run and cards):
        raise UserError("--cards and --card are for a training on paper: write --dry-run --cards 1,8")
    chosen = "cpu" if cards else torch_device(device)
    dtype = dtype or "bf16" if cards else dtype
    settings, dtype = training_settings(
        out, chosen, config, changes, dtype, sizes, shard=shard, tensorboard=tensorboard
    )
    spec, kind = _specification(out, model, blocks, data, sequence, seed), torch_dtype(dtype)
    if cards:
        _on_paper(spec, settings, card, cards, seconds, dtype, as_json)
        return
    data_files(spec.data)
    with dist_context(chosen) as (workers, own):
        check(settings.shard)
        if dry_run:
            _dry_run(out, spec, settings, own, kind, as_json, workers)
            return
        if any(seconds.values()) and workers.size > 1:
            raise UserError("seconds are measured by one process: under torchrun write tokens")
        with (
            sole_writer(out, "distills") if workers.is_main else nullcontext(),
            progress_bar("distill: reads model and text") as progress,
        ):
            read: dict[str, Any] = read_inputs(Run(out, spec), place_of(settings.shard, own, workers), kind)
            run = Run.create(out, spec)
            if any(seconds.values()):
                given = {"align": align_tokens, "supernet": supernet_tokens}
                most = {stage: parse_budget(text) for stage, text in given.items() if text is not None}
                settings = Budget(run, settings, read["loaded"], read["corpus"], own, log).settings(seconds, most)
            net = distill(run, settings, device=own, dtype=kind, progress=progress, notice=log, workers=workers, **read)
        source, version = net.source, net.version
        del net, read  # before the processes part
    if not workers.is_main:
        return
    log(f"{out}: supernet of {', '.join(run.spec.space.names)} over {source}")
    if as_json:
        print_json({"run": str(out), "names": list(run.spec.space.names), "version": version})


def _specification(out: Path, model: str, blocks: str, data: str, sequence: str, seed: int | None) -> RunSpec:
    """What the run is about, by what was given, and else by its run.json. Raises UserError."""
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import parse_kinds
    from nasbench.runs import Run, RunSpec
    from nasbench.spaces.space import original_of

    old = Run.open(out).spec if (out / "run.json").is_file() else None
    model = model or (old.model if old else "default")
    shape = resolve_shape(model)
    spec = RunSpec(
        model,
        parse_kinds(blocks or "W J", shape) if blocks or old is None else old.names,
        shape.num_layers,
        data or (old.data if old else ""),
        parse_size(sequence) if sequence else old.sequence if old else 256,
        seed if seed is not None else old.seed if old else 0,
        original_of(shape.placement),
    )
    if spec.sequence > shape.max_context:
        raise UserError(f"sequence {spec.sequence} is beyond the context of {shape.name}, {shape.max_context}")
    return spec


def _dry_run(  # type: ignore[no-untyped-def]
    out: Path, spec, settings, device: str, dtype, as_json: bool, workers
) -> None:
    import threading
    from dataclasses import asdict

    from nasbench.checkpoints.load import load_model
    from nasbench.cli.common import log, print_json, print_table
    from nasbench.parallel.fsdp import place_of
    from nasbench.runs import Run
    from nasbench.supernet.budget import estimate
    from nasbench.supernet.train import Distiller

    run = Run.create(out, spec) if (out / "run.json").exists() else Run(out, spec)
    loaded = load_model(spec.model, dtype=dtype, device=place_of(settings.shard, device, workers))
    found = estimate(Distiller(run, loaded, settings, threading.Event(), workers=workers))
    if not workers.is_main:
        return
    if as_json:
        print_json({"run": str(out), **asdict(found), "seconds": found.seconds})
        return
    columns = ("stage", "tokens", "steps", "tokens/step", "tokens/s", "minutes")
    rows = [(s.stage, s.tokens, s.steps, s.step_tokens, round(s.tok_s), round(s.seconds / 60, 1)) for s in found.stages]
    print_table(columns, rows, f"{out}: what is left to do")
    log(
        f"{found.seconds / 60:.1f} minutes; {found.corpus_tokens:,} tokens of text; {found.trained_parameters:,} "
        f"trained parameters; {found.model_bytes >> 20:,} MiB model + {found.training_bytes >> 20:,} MiB training "
        f"state, {found.peak_bytes >> 20:,} MiB at the peak of the timed steps"
        + (f", in each of {found.processes} processes" if found.processes > 1 else "")
    )


def _on_paper(
    spec: RunSpec, settings: Any, card: str, cards: str, seconds: dict[str, float], dtype: str, as_json: bool
) -> None:
    """Memory, speed and time of a training on cards that need not be here."""
    from dataclasses import asdict

    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import log, print_json, print_table
    from nasbench.core.dtypes import dtype_bytes
    from nasbench.core.sizes import is_count
    from nasbench.devices import detect
    from nasbench.supernet.on_paper import on_paper

    counts = [part.strip() for part in cards.split(",")]
    if not all(is_count(part) and int(part) > 0 for part in counts):
        raise UserError(f"bad --cards {cards!r}: write numbers from 1, as 1,8,64")
    shape = resolve_shape(spec.model)
    paper = on_paper(
        shape, spec.space, settings, spec.sequence, card or detect("auto").slug, list(map(int, counts)), seconds,
        dtype_bytes(dtype),
    )  # fmt: skip
    if as_json:
        stages = [asdict(stage) | {"hours": stage.hours} for stage in paper.stages]
        print_json({"model": shape.name, **asdict(paper), "stages": stages})
        return
    rows = [
        (s.cards, s.stage, s.tokens, s.step_tokens, round(s.memory_bytes / 2**30, 1),
         "yes" if s.memory_bytes < paper.card_bytes else "no", round(s.tok_s), round(s.hours, 2))
        for s in paper.stages
    ]  # fmt: skip
    columns = ("cards", "stage", "tokens", "tokens/step", "GiB/card", "fits", "tokens/s", "hours")
    print_table(columns, rows, f"{shape.name} on {paper.device}, {'sharded' if settings.shard else 'whole'}: on paper")
    for note in paper.notes:
        log(note)
