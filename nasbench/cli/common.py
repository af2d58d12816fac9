"""What several commands share: printing JSON and tables, choosing a device and a data type."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nasbench.core.by_device import PREFILL_CHUNK
from nasbench.core.dtypes import torch_dtype as torch_dtype
from nasbench.core.errors import MachineError, unknown
from nasbench.core.files import strict_json
from nasbench.core.sizes import format_size


def chunk_help() -> str:
    """What the help of `--chunk` says, by the one constant."""
    cpu, cuda = (format_size(PREFILL_CHUNK.of(kind)) for kind in ("cpu", "cuda"))
    return f"Prefill tokens of a sequence at a time; default: {cpu} on a CPU, {cuda} on a GPU."


def print_json(data: Any) -> None:
    """Prints one strict JSON object on standard output, and nothing else. Numbers that are not finite become null."""
    sys.stdout.write(strict_json(data) + "\n")


def mark_source(source: str) -> str:
    """How tables show the source of a number: nobody overlooks an estimate."""
    return "ESTIMATED" if source == "estimated" else source


def log(message: str) -> None:
    """One line for the person who waits, on standard error."""
    print(message, file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """A table on standard output; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) or row[index] == "" for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yields `progress(stage, done, total)`; each stage gets a bar on standard error, with the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def torch_device(name: str) -> str:
    """`auto` -> `cuda` where there is one, else `cpu`. Raises for names that are no device and devices not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise unknown("torch device", name, ("auto", "cpu", "cuda"))
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise MachineError(f"device {name!r} is not there: this machine has no CUDA GPU that torch can use")
    return name
