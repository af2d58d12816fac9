"""Options that distill and finalize share."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasbench.core.errors import UserError

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
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change one setting of the training, as whole=true; may repeat."),
]


def read_settings(config: Path | None, changes: list[str] | None) -> DistillConfig:
    """The settings of a TOML file, or the defaults, with the changes of --set. Raises UserError."""
    from nasbench.supernet.settings import DistillConfig

    settings = DistillConfig.read(config) if config else DistillConfig()
    try:
        return settings.updated(tomllib.loads("\n".join(changes or [])))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"bad --set {' '.join(changes or [])!r}: {error}") from None


def with_given(settings: DistillConfig, **options: object) -> DistillConfig:
    """The settings with those options that were given, not None. Raises UserError where TensorBoard is wanted and not
    installed."""
    from nasbench.supernet import tensorboard

    settings = settings.updated({name: value for name, value in options.items() if value is not None})
    tensorboard.check(settings.tensorboard)
    return settings
