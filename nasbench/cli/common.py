"""What several commands share: options, printing JSON and tables, progress, choosing a device and a data type."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.core.by_device import PREFILL_CHUNK
from nasbench.core.dtypes import torch_dtype as torch_dtype
from nasbench.core.errors import MachineError, UserError, unknown
from nasbench.core.files import strict_json
from nasbench.core.sizes import format_size, is_count
from nasbench.supernet.trained import choose_dtype as choose_dtype
from nasbench.supernet.trained import run_dtype as run_dtype
from nasbench.supernet.trained import trained_with as trained_with

if TYPE_CHECKING:
    from nasbench.model.shapes import ModelSpec

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and how long it takes; do nothing.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16; default: the faster one of fp32 and bf16 there.")]
Blocks = Annotated[
    str, typer.Option(help="Layer kinds beside full attention, as in placements: 'W256 J', W256,J or WJ.")
]
Model = Annotated[str, typer.Option(help="`default`, a Hugging Face folder, a GGUF file or a hub name.")]

LINE_S = 20.0
"""Without a terminal, progress is a line this often."""


class Output:
    """How much this process tells."""

    quiet = False


def chunk_help() -> str:
    """What the help of `--chunk` says, by the one constant."""
    cpu, cuda = (format_size(PREFILL_CHUNK.of(kind)) for kind in ("cpu", "cuda"))
    return f"Prefill tokens of a sequence at a time; default: {cpu} on a CPU, {cuda} on a GPU."


def print_json(data: Any) -> None:
    """Prints one strict JSON object on standard output, and nothing else. Numbers that are not finite become null."""
    sys.stdout.write(strict_json(data) + "\n")


def print_plan(plan: dict[str, Any], as_json: bool) -> None:
    """What --dry-run prints: a line for each entry, or one JSON object. None is what nobody knows before."""
    if as_json:
        print_json(plan)
        return
    for name, value in plan.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        text = f"{value:.0f}" if name == "seconds" and value is not None else text
        print(f"{name.replace('_', ' ')}: {'not known' if value is None else text or 'none'}")


def mark_source(source: str) -> str:
    """How tables show the source of a number: nobody overlooks an estimate."""
    return "ESTIMATED" if source == "estimated" else source


def log(message: str) -> None:
    """One line for the person who waits, on standard error; none with --quiet."""
    if not Output.quiet:
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


Progress = Callable[[str, int, int], None]
"""Called with a stage, what is done of it, and its whole."""


@contextmanager
def progress_bar(doing: str = "") -> Iterator[Progress]:
    """Yields a `Progress` on standard error: bars with the time left on a terminal, elsewhere a plain line every 20 s.

    Args:
        doing: said while no stage has begun, as "distill: reads the model".
    """
    from rich.console import Console

    console = Console(stderr=True)
    if Output.quiet:
        yield lambda stage, done, total: None
    elif console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn())
        with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
            tasks: dict[str, Any] = {}

            def progress(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield progress
    else:
        with _Lines(doing) as lines:
            yield lines.progress


class _Lines:
    """A thread that prints the state of the work every LINE_S seconds, also while the work tells nothing."""

    def __init__(self, doing: str) -> None:
        self.began = time.monotonic()
        self.doing = doing or "works"
        self.stage: tuple[str, int, int, int, float] | None = None  # name, done, whole, done at its beginning, then
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Lines:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.thread.join()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Notes where the work stands."""
        if self.stage is None or self.stage[0] != stage:
            self.stage = (stage, done, total, done, time.monotonic())
        self.stage = (stage, done, total, *self.stage[3:])

    def _run(self) -> None:
        while not self.end.wait(LINE_S):
            log(self.line(time.monotonic()))

    def line(self, now: float) -> str:
        """The state of the work in one line."""
        if self.stage is None:
            return f"{self.doing} since {now - self.began:.0f} s"
        stage, done, total, first, began = self.stage
        left = "" if done <= first else f", about {(now - began) * (total - done) / (done - first):.0f} s left"
        return f"{stage}: {done:,} of {total:,} ({done / max(1, total):.0%}) after {now - began:.0f} s{left}"


def torch_device(name: str) -> str:
    """`auto` -> `cuda` where there is one, else `cpu`; a GPU with a number becomes the current one. Raises for names
    that are no device and devices not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not is_count(index)):
        raise unknown("torch device", name, ("auto", "cpu", "cuda"))
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise MachineError(f"device {name!r} is not there: torch finds {torch.cuda.device_count()} CUDA GPUs")
    if index:
        # Triton launches on the current device, whatever device the tensors are on.
        torch.cuda.set_device(name)
    return name


def parse_kinds(text: str, shape: ModelSpec) -> tuple[str, ...]:
    """`W256 J`, `W256,J` or `WJ` -> ("A", "W256", "J"): layer kinds as in placements, each checked against the model.

    Raises UserError, also for nothing beside full attention.
    """
    from nasbench.spaces.placement import parse_placement

    names = tuple(dict.fromkeys(("A", *parse_placement(text))))
    for name in names:
        shape.mixer(name)
    if len(names) < 2:
        raise UserError(f"no layer kind beside full attention in {text!r}: name at least one, as 'W256 J'")
    return names
