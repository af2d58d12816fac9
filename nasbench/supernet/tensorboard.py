"""Losses and speed for TensorBoard, where it is asked for: the numbers of losses.csv and progress.csv, as they come.

A stage has its own folder of events, runs/NAME/tensorboard/STAGE (beside the checkpoints' folder, not in it, where
all but the newest goes); the horizontal axis is tokens. A stage that goes on after a stop takes back what was written
beyond its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.core.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


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


class Board:
    """Where scalars go; nowhere without a writer."""

    def __init__(self, writer: SummaryWriter | None = None) -> None:
        self._writer = writer

    def add(self, values: Mapping[str, float], tokens: int) -> None:
        """Values by name, e.g. `J/layer 03`, at a number of tokens."""
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, tokens)
        self._writer.flush()


@contextmanager
def opened(folder: Path, stage: str, wanted: bool, tokens: int) -> Iterator[Board]:
    """The board of a stage that goes on from `tokens`.

    Args:
        folder: in which tensorboard/STAGE is.
        wanted: false gives a board that keeps nothing.
    """
    if not wanted:
        yield Board()
        return
    writer = _writer_class()(str(folder / FOLDER / stage), purge_step=tokens + 1)
    try:
        yield Board(writer)
    finally:
        writer.close()


def loss_name(layer: str, kind: str) -> str:
    """What the loss of a layer's kind is called: `J/layer 03`; the whole network's has neither."""
    return f"{kind}/layer {int(layer):02d}" if layer else "loss"
