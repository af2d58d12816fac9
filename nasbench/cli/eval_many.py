"""What `nasbench eval RUN --placements ...` does: many placements on many tasks, by one or several processes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nasbench.core.errors import UserError, unknown
from nasbench.core.sizes import is_count, parse_size


@dataclass(frozen=True)
class ManyOptions:
    """The options of `nasbench eval` that are for several placements, as they were typed."""

    placements: str
    tasks: str
    brief_tasks: str
    suite: str
    brief_items: int
    test_tokens: str
    seconds: float
    workers: str
    share: str
    dtype: str

    def words(self, path: Path, number: int, of: int, device: str, seconds: float) -> tuple[str, ...]:
        """The command line of the process that measures share `number` of `of`."""
        own = asdict(self) | {"seconds": f"{seconds:.0f}", "share": f"{number}/{of}", "workers": "", "device": device}
        return ("eval", str(path), *(f"--{name.replace('_', '-')}={value}" for name, value in own.items()))


def evaluate_many(path: Path, options: ManyOptions, device: str, dry_run: bool = False, as_json: bool = False) -> None:
    """Measures loss and KL of every placement, then the tasks. Raises UserError before any work for wrong options."""
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import log, print_json, print_plan, progress_bar
    from nasbench.core.dtypes import torch_dtype
    from nasbench.evaluation.evaluator import TEXT
    from nasbench.parallel.pool import Job, Pool, leave_with_parent
    from nasbench.runs import Run
    from nasbench.search.measuring import Measurer, choose, measure_all, measure_share, queue, share_of

    run = Run.open(path)
    shape = resolve_shape(run.spec.model)
    rows = choose(run, options.placements, lambda text: run.spec.space.check(shape.parse(text)))
    if not options.seconds >= 0:
        raise UserError(f"bad --seconds {options.seconds}: at least 0; 0 is no limit")
    tasks, brief = _tasks(run, options, shape.max_context, not dry_run)
    number, of = _share(options.share)
    helpers = helper_devices(options.workers, device)
    pairs = queue(rows, tasks, brief)
    if dry_run:
        texts = list(dict.fromkeys(row.text for row in rows))
        every = [*TEXT, *(task.label for task in tasks)]
        plan = {"run": str(path), "placements": texts, "tasks": every, "briefly": [task.label for task in brief]}
        print_plan({**plan, "devices": [device, *helpers], "seconds": options.seconds or None}, as_json)
        return
    ends = time.time() + (options.seconds or float("inf"))
    tokens = parse_size(options.test_tokens) if options.test_tokens else None
    leave_with_parent()
    measurer = Measurer(run, device=device, dtype=torch_dtype(options.dtype), test_tokens=tokens)
    if options.share:
        measure_share(measurer, share_of(pairs, number, of), ends, log)
        return
    measurer.held_out(rows)
    of = 1 + len(helpers)
    shares = [i for i in range(1, of) if any(measurer.missing(pair) for pair in share_of(pairs, i, of))]
    left = max(1.0, ends - time.time()) if options.seconds else 0.0
    jobs = [
        Job(helpers[i - 1], options.words(path, i, of, helpers[i - 1], left), run.path / f"eval-{i}.log")
        for i in shares
    ]
    with Pool(jobs) as pool, progress_bar() as bar:
        whole = measure_all(
            measurer, pairs, pool, shares, of, ends, log, lambda done, total: bar("measure", done, total)
        )
    if as_json:
        print_json({"run": str(path), "placements": len({(row.text, row.weights) for row in rows}), "done": whole})


def _tasks(run: Any, options: ManyOptions, longest: int, note: bool) -> tuple[list[Any], list[Any]]:
    """(all tasks, those that every placement gets first); lengths beyond the model's context are left out."""
    from nasbench.evaluation.tasks import parse_tasks
    from nasbench.search.measuring import suite_tasks

    tasks, brief = (
        [task for task in parse_tasks(text) if getattr(task, "length", 0) <= longest] if text else []
        for text in (options.tasks, options.brief_tasks)
    )
    if not options.suite:
        return tasks, brief
    whole, few = suite_tasks(run, Path(options.suite), options.brief_items, note)
    return [*tasks, *whole], [*brief, *(few if brief else [])]


def _share(text: str) -> tuple[int, int]:
    number, _, of = (text or "0/1").partition("/")
    if not is_count(number) or not is_count(of) or not int(number) < int(of):
        raise UserError(f"bad --share {text!r}: write N/OF with N from 0, as 1/2")
    return int(number), int(of)


def helper_devices(text: str, where: str) -> tuple[str, ...]:
    """Of `cuda:0,cuda:1`, the devices beside the process's own, `where`, which comes first; none of an empty text.

    Raises UserError for a device that is not there and for another one first.
    """
    if not text.strip():
        return ()
    import torch

    # Without a number: the one that torch takes then.
    names = {"cpu": "cpu"}
    if torch.cuda.is_available():
        names["cuda"] = f"cuda:{torch.cuda.current_device()}"
        names |= {f"cuda:{i}": f"cuda:{i}" for i in range(torch.cuda.device_count())}
    found = []
    for part in text.split(","):
        if part.strip() not in names:
            raise unknown("worker device", part.strip(), names)
        found.append(names[part.strip()])
    if found[0] != (own := names.get(where, where)):
        raise UserError(f"bad --workers {text!r}: the first must be the process's own device, {own}")
    return tuple(found[1:])
