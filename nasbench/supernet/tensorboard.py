"""Losses and speed for TensorBoard: the numbers of losses.csv and progress.csv, as they come.

A stage has its own folder of events, runs/NAME/tensorboard/STAGE, beside the checkpoints' folder, in which all but the
newest is removed. The horizontal axis is tokens. A stage that goes on after a stop takes back what was written beyond
its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Add = Callable[[Mapping[str, float], int], None]
"""Takes values by name, e.g. `J/layer 03`, and the tokens at which they hold."""


def check(wanted: bool) -> None:
    """Raises UserError where TensorBoard is wanted and not installed."""
    if wanted:
        _writer_class()


def _writer_class() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"tensorboard cannot be imported ({error}): pip install 'nasbench[tensorboard]', or say --no-tensorboard"
        ) from None
    return SummaryWriter


@contextmanager
def opened(run: Path, stage: str, tokens: int) -> Iterator[Add]:
    """Where the scalars of a stage go that continues from `tokens`."""
    writer = _writer_class()(str(run / "tensorboard" / stage), purge_step=tokens + 1)

    def add(values: Mapping[str, float], tokens: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, tokens)
        writer.flush()

    try:
        yield add
    finally:
        writer.close()
