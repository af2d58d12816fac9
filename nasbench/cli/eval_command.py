"""nasbench eval: scores of a placement of a run, or of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasbench.cli.common import AsJson, Device, DryRun
from nasbench.core.errors import UserError, unknown
from nasbench.core.sizes import parse_size

if TYPE_CHECKING:
    import torch

    from nasbench.evaluation.scores import Scores
    from nasbench.evaluation.tasks import Task
    from nasbench.runs import Run
    from nasbench.spaces.placement import Placement


def command(
    target: Annotated[str, typer.Argument(help="A run folder, a finalised hybrid, a model folder or name.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="As loss,retrieval@2k,suite:FILE.jsonl; tasks of lm-evaluation-harness by name, as mmlu or "
            "arc_easy@200:5 (200 items, 5 examples), or NAME:FOLDER of YAML files."
        ),
    ] = "loss",
    placement: Annotated[str | None, typer.Option(help="Of a run: default full attention.")] = None,
    placements: Annotated[
        str,
        typer.Option(help="Several of a run: auto (all that a report compares), searched, final, or a file of them."),
    ] = "",
    suite: Annotated[str, typer.Option(help="With --placements: folder of benchmark files, .jsonl.")] = "",
    brief_tasks: Annotated[
        str, typer.Option(help="With --placements: tasks of random placements, before they get all.")
    ] = "",
    brief_items: Annotated[int, typer.Option(help="Items of each benchmark among the brief tasks.")] = 50,
    test_tokens: Annotated[str, typer.Option(help="With --placements: held-out tokens; default: all.")] = "",
    seconds: Annotated[
        float, typer.Option(help="With --placements: time; the same command continues. 0: no limit.")
    ] = 0.0,
    workers: Annotated[
        str,
        typer.Option(help="With --placements: devices that measure at once, cuda:0,cuda:1; the first is this one's."),
    ] = "",
    share: Annotated[
        str, typer.Option(help="With --placements: measure share N of OF, as 1/2, and nothing else.")
    ] = "",
    split: Annotated[str, typer.Option(help="Held-out text: test, or search (what searches see).")] = "test",
    data: Annotated[str, typer.Option(help="Text for a checkpoint's losses; a run has its own.")] = "",
    sequence: Annotated[str, typer.Option(help="Tokens of a held-out sequence for a checkpoint.")] = "256",
    scores: Annotated[Path | None, typer.Option(help="Folder that keeps a checkpoint's scores, item by item.")] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16; default: as the run was trained, else the faster.")
    ] = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Score a placement of a run, or a checkpoint, on tasks. Scores of a run are kept in its folder.

    With --placements, many placements are scored, finalised ones with their own weights: first loss and KL of all, then
    the tasks of the searched ones, then those of all others.
    """
    from nasbench.cli.common import print_json, print_plan, print_table, run_dtype, torch_device, torch_dtype
    from nasbench.evaluation.evaluator import IDENTICAL
    from nasbench.evaluation.tasks import parse_tasks
    from nasbench.spaces.placement import format_placement

    where = torch_device(device)
    dtype = run_dtype(Path(target), dtype, where)
    if placements:
        from nasbench.cli.eval_many import ManyOptions, evaluate_many

        options = ManyOptions(
            placements, tasks, brief_tasks, suite, brief_items, test_tokens, seconds, workers, share, dtype
        )
        evaluate_many(Path(target), options, where, dry_run, as_json)
        return
    parsed = parse_tasks(tasks)
    if split not in ("search", "test"):
        raise unknown("split", split, ("search", "test"))
    kind, is_run = torch_dtype(dtype), (Path(target) / "run.json").is_file()
    if is_run and (data or scores):
        option = "data" if data else "scores"
        raise UserError(f"--{option} is the run's own: leave it out, or evaluate a checkpoint")
    if dry_run:
        labels = [task.label for task in parsed]
        own_text = format_placement(_checked(Path(target), placement)[1]) if is_run else _known(target)
        plan = {"target": target, "placement": own_text, "tasks": labels, "split": split}
        print_plan({**plan, "dtype": dtype, "seconds": None}, as_json)
        return
    if is_run:
        scored, found = _score_run(Path(target), placement, parsed, split, where, kind)
    else:
        own = CheckpointOptions(placement, split, data, parse_size(sequence), scores)
        scored, found = _score_checkpoint(target, parsed, own, where, kind)
    if as_json:
        rows = {
            name: {"metric": s.metric, "value": s.value, "stderr": None if s.n < 2 else s.stderr, "n": s.n}
            | ({IDENTICAL: True} if s.about.get(IDENTICAL) else {})
            for name, s in found.items()
        }
        print_json({"target": target, "placement": scored, "split": split, "dtype": dtype, "scores": rows})
        return
    table = [(name, s.metric, f"{s.value:.4f}", f"{s.stderr:.4f}", s.n) for name, s in found.items()]
    print_table(("task", "metric", "value", "stderr", "n"), table, title=f"{target}: {scored}")


def _score_run(
    path: Path, placement: str | None, tasks: list[Task], split: str, device: str, dtype: torch.dtype
) -> tuple[str, dict[str, Scores]]:
    from nasbench.evaluation.evaluator import Evaluator
    from nasbench.spaces.placement import format_placement

    run, chosen = _checked(path, placement)
    evaluator = Evaluator.open(run, device=device, dtype=dtype)
    return format_placement(chosen), evaluator.scores(chosen, tasks, split)


def _checked(path: Path, placement: str | None) -> tuple[Run, Placement]:
    """A run, and the placement of it that was asked for or else its model's own. Raises UserError."""
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.runs import Run

    run = Run.open(path)
    shape = resolve_shape(run.spec.model)
    return run, run.spec.space.check(shape.parse(placement) if placement else run.spec.space.original)


def _known(target: str) -> str:
    """The placement of a checkpoint. Raises UserError where it is none."""
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.core.files import read_json
    from nasbench.spaces.placement import format_placement
    from nasbench.supernet.finalize import CONFIG, is_final

    if is_final(Path(target)):
        return str(read_json(Path(target) / CONFIG).get("placement"))
    return format_placement(resolve_shape(target).placement)


@dataclass(frozen=True)
class CheckpointOptions:
    """The options of `nasbench eval` that are for a checkpoint."""

    placement: str | None
    split: str
    data: str
    sequence: int
    scores: Path | None


def _score_checkpoint(
    target: str, tasks: list[Task], options: CheckpointOptions, device: str, dtype: torch.dtype
) -> tuple[str, dict[str, Scores]]:
    from nasbench.checkpoints.load import load_model
    from nasbench.data.packing import Corpus
    from nasbench.evaluation.evaluator import score_checkpoint
    from nasbench.evaluation.tasks import Context
    from nasbench.spaces.placement import format_placement
    from nasbench.supernet.finalize import is_final, load_final, teacher_name

    teacher = None
    if is_final(Path(target)):
        loaded = load_final(Path(target), dtype=dtype, device=device)
        if any(task.needs_teacher for task in tasks):
            teacher = load_model(teacher_name(Path(target)), dtype=dtype, device=device).decoder
    else:
        loaded = load_model(target, dtype=dtype, device=device)
    own, longest = loaded.decoder.placement, loaded.shape.max_context
    if options.placement and loaded.shape.parse(options.placement) != own:
        raise UserError(f"{target} has the placement {format_placement(own)}: others need a run folder")
    if options.sequence > longest:
        raise UserError(f"sequence {options.sequence} is beyond the context of {loaded.shape.name}, {longest}")
    corpus = Corpus.load(options.data, loaded.tokenizer, options.sequence)
    context = Context(loaded.tokenizer, corpus, teacher, options.split)
    return format_placement(own), score_checkpoint(loaded.decoder, tasks, context, options.scores)
