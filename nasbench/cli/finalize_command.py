"""nasbench finalize: distil one chosen placement further."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.cli.common import AsJson, Device, DryRun
from nasbench.cli.training_options import Settings, Shard, TensorBoard, TrainDtype, read_inputs, training_settings
from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_budget, parse_size

if TYPE_CHECKING:
    from nasbench.runs import Run
    from nasbench.spaces.placement import Placement


def command(
    run: Annotated[Path, typer.Argument(help="A run folder with a supernet.")],
    placement: Annotated[str, typer.Option(help="One letter per layer, as 14J A 4J A 2W 6J.")] = "",
    full_attention: Annotated[
        int | None, typer.Option("--full-attention", "-k", help="Instead: the best searched placement of K layers.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Tokens to distil, as 64k; 0 takes the supernet's weights.")] = "16k",
    seconds: Annotated[float, typer.Option(help="Instead of tokens: time in all, also of earlier calls.")] = 0.0,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of the training.")] = None,
    changes: Settings = None,
    sequence: Annotated[str, typer.Option(help="Tokens of a training row, as 2k; default: the run's.")] = "",
    batch: Annotated[str, typer.Option(help="Tokens of a step; default: the settings'.")] = "",
    data: Annotated[str, typer.Option(help="Other text than the run's, e.g. of nasbench corpus.")] = "",
    variant: Annotated[str, typer.Option(help="Name of this training, where a placement gets several.")] = "",
    device: Device = "auto",
    dtype: TrainDtype = "",
    average: Annotated[
        str,
        typer.Option(
            help="Also write a mean with the weights before, this share of it finalised: keeps more of what they could "
            "do (0.5). auto: the share with the lowest held-out loss. 0: no mean."
        ),
    ] = "0",
    shard: Shard = None,
    tensorboard: TensorBoard = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Distil one placement from the supernet's weights on. Run again after a stop, or for more tokens, it continues."""
    from nasbench.cli.common import log, print_json, progress_bar, torch_device, torch_dtype
    from nasbench.core.files import sole_writer
    from nasbench.data.text import data_files
    from nasbench.parallel.context import dist_context
    from nasbench.parallel.fsdp import check, place_of
    from nasbench.runs import Run
    from nasbench.spaces.placement import format_placement
    from nasbench.supernet.budget import note_final
    from nasbench.supernet.finalize import AVERAGE, average_final, final_folder, finalize

    share = _share_of(average)
    if not seconds >= 0:
        raise UserError(f"bad --seconds {seconds}: at least 0")
    if not re.fullmatch(r"[\w-]*", variant):
        raise UserError(f"bad --variant {variant!r}: write letters, digits, _ and -")
    opened = Run.open(run)
    chosen = _chosen(opened, placement, full_attention)
    sizes = {"supernet_batch_tokens": batch or None}
    budget, where = parse_budget(tokens), torch_device(device)
    settings, dtype = training_settings(run, where, config, changes, dtype, sizes, shard=shard, tensorboard=tensorboard)
    kind, rows = torch_dtype(dtype), parse_size(sequence) if sequence else None
    folder = final_folder(opened, chosen, variant)
    data_files(data or opened.spec.data)
    if dry_run:
        _dry_run(opened, chosen, folder, settings, rows or opened.spec.sequence, budget, seconds, as_json)
        return
    with (
        dist_context(where) as (workers, own),
        sole_writer(folder, "finalises") if workers.is_main else nullcontext(),
        progress_bar("finalize: reads model and text") as progress,
    ):
        check(settings.shard)
        if seconds and workers.size > 1:
            raise UserError("--seconds is measured by one process: under torchrun write --tokens")
        read = read_inputs(opened, place_of(settings.shard, own, workers), kind, data, rows)
        known = _budget(opened, settings, folder, read, own) if seconds else None
        if known is not None:
            settings, budget = known[0], known[1].tokens(seconds)
            log(f"{format_placement(chosen)}: {budget:,} tokens in all")

        def train() -> Path:
            return finalize(
                opened, chosen, settings, budget, sequence=rows, device=own, dtype=kind, workers=workers,
                progress=progress, notice=log, name=variant, **read,
            )  # fmt: skip

        if known is not None:
            known[1].timed(budget, train)
        else:
            train()
    if not workers.is_main:
        return
    note_final(folder, budget)
    log(f"finalised {format_placement(chosen)} in {folder}")
    mean: dict[str, Any] = {}
    if share is None:
        from nasbench.evaluation.averaging import losses_by_share

        losses = losses_by_share(opened, chosen, of=variant, device=where, dtype=kind)
        share = min(losses, key=losses.__getitem__)
        log("held-out loss by share: " + ", ".join(f"{key:g} {loss:.4f}" for key, loss in losses.items()))
        mean = {"losses_by_share": losses}
    if share or mean:
        # On the CPU: of a model that is sharded, no GPU holds the whole.
        name = f"{variant}-{AVERAGE}" if variant else AVERAGE
        path = average_final(opened, chosen, name, of=variant, share=share, dtype=kind)
        note_final(path, budget)
        log(f"mean with the weights before, {share:g} finalised, in {path}")
        mean |= {"average": str(path), "share": share}
    if as_json:
        found = {"run": str(run), "placement": format_placement(chosen), "folder": str(folder), "tokens": budget}
        print_json(found | mean)


def _share_of(text: str) -> float | None:
    """--average as a number; None for auto. Raises UserError."""
    if text == "auto":
        return None
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"bad --average {text!r}: choose auto or 0 to 1")
    return share


def _dry_run(
    run: Run, chosen: Placement, folder: Path, settings: Any, row: int, tokens: int, seconds: float, as_json: bool
) -> None:
    """Says what would be trained, and how long it takes at the speed of the supernet's random sub-networks."""
    from nasbench.cli.common import print_plan
    from nasbench.spaces.placement import format_placement
    from nasbench.supernet.loop import last_speed

    speed = last_speed(run.supernet, "supernet")
    step = max(1, settings.supernet_batch_tokens // row) * row
    took = seconds or (tokens / speed if speed else None)
    plan = {"placement": format_placement(chosen), "folder": str(folder), "tokens_of_a_step": step, "seconds": took}
    print_plan(plan | ({} if seconds else {"tokens": tokens}), as_json)


def _chosen(run: Run, placement: str, count: int | None) -> Placement:
    """The placement that was named, or the best that the latest search found with so many full-attention layers."""
    from nasbench.checkpoints.load import resolve_shape
    from nasbench.search.compared import best_searched

    if bool(placement) == (count is not None):
        raise UserError("write either --placement or --full-attention K")
    if count is not None:
        return best_searched(run, count)
    return run.spec.space.check(resolve_shape(run.spec.model).parse(placement))


def _budget(run: Run, settings: Any, folder: Path, read: dict[str, Any], device: str) -> tuple[Any, Any]:
    """The settings with the supernet's step, and the budget of the placement."""
    from nasbench.cli.common import log
    from nasbench.supernet import checkpoint
    from nasbench.supernet.budget import Budget, FinalBudget

    saved = checkpoint.latest(run.supernet)
    if saved is None:
        raise UserError(f"{run.path} has no supernet: make one with `nasbench distill --out {run.path}`")
    known = Budget(run, settings, read["loaded"], read["corpus"], device, log).stage("supernet", 0.0)
    step = max(int(known["batch_tokens"]), read["corpus"].sequence)
    settings = settings.updated({"supernet_batch_tokens": step, "graphs": bool(known["graphs"])})
    return settings, FinalBudget(folder, saved.version, float(known["tok_s"]), step)
