"""`python -m nasbench.reproduce.worker`: measures one share of the placements of a run on a device of its own.

Started by `nasbench.parallel.pool`, which says what it reads and writes. Of the run it writes items-N.jsonl alone:
plan, tables and report are the main process's.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path

import torch

from nasbench.parallel.pool import Job
from nasbench.reproduce.bench import Bench
from nasbench.reproduce.items import Items
from nasbench.reproduce.measure import Measurer, measure_share
from nasbench.reproduce.recipe import Recipe


def work(job: Job) -> None:
    """Measures the job's share until it is done or time is up."""
    if job.device.startswith("cuda"):
        # Triton launches on the current device, whatever device the tensors are on.
        torch.cuda.set_device(job.device)
    out, recipe = Path(job.out), Recipe.from_json(job.recipe)
    bench = Bench(recipe, out, job.device, getattr(torch, job.dtype), say)
    measurer = Measurer(bench, Items(out / "items.jsonl", job.number))
    measure_share(measurer, job.number, job.of, job.ends)


def say(line: str) -> None:
    """One line into the log."""
    print(line, flush=True)


def main() -> None:
    """Reads the job, does it, and ends with exit code 0, or 1 when it failed: the last line then says why."""
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        work(job)
    except Exception as error:
        traceback.print_exc()
        # Errors of CUDA end with advice; what happened stands in their first line.
        message = str(error).strip().split("\n")[0]
        say(f"{type(error).__name__}: {message}" if message else type(error).__name__)
        _leave(1)
    _leave(0)


def _leave_with_parent() -> None:
    sys.stdin.read()
    _leave(1)


def _leave(code: int) -> None:
    """Ends at once, without the interpreter's tidying up, which frees gigabytes piece by piece."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
