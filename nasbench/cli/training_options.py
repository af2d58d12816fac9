"""Options that distill and finalize share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nasbench.supernet.settings import DistillConfig

Shard = Annotated[
    bool | None,
    typer.Option("--shard/--no-shard", help="Under torchrun: each process holds its share of all weights."),
]
TensorBoard = Annotated[
    bool | None,
    typer.Option("--tensorboard/--no-tensorboard", help="Losses and speed for TensorBoard, beside the CSVs."),
]


def with_given(settings: DistillConfig, **options: object) -> DistillConfig:
    """The settings with those options that were given, not None. Raises UserError where TensorBoard is wanted and not
    installed."""
    from nasbench.supernet import board

    settings = settings.updated({name: value for name, value in options.items() if value is not None})
    board.check(settings.tensorboard)
    return settings
