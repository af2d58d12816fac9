"""Options that distill and finalize share."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_budget

if TYPE_CHECKING:
    from nasbench.runs import Run
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
TrainDtype = Annotated[
    str,
    typer.Option(
        help="fp32 or bf16; master weights are fp32 either way. Default: the run's own, in a new one the faster."
    ),
]


def training_settings(
    run: Path,
    device: str,
    config: Path | None,
    changes: list[str] | None,
    dtype: str,
    sizes: dict[str, str | None],
    **options: bool | None,
) -> tuple[DistillConfig, str]:
    """(settings, data type) of a training. Settings are those that the run was distilled with, else the defaults; then
    a TOML file, --set, sizes and options change them. What is None was not given.

    Raises UserError, also for a data type that cannot train, and where TensorBoard is wanted and not installed.
    """
    from nasbench.cli.common import run_dtype, trained_with
    from nasbench.supernet import tensorboard
    from nasbench.supernet.settings import DistillConfig

    if dtype == "fp16":
        raise UserError("dtype fp16 cannot train (its range is too small): choose fp32 or bf16")
    trained = trained_with(run)
    names = DistillConfig.__dataclass_fields__
    settings = DistillConfig().updated({name: value for name, value in trained.items() if name in names})
    settings = DistillConfig.read(config, settings) if config else settings
    try:
        settings = settings.updated(tomllib.loads("\n".join(changes or [])))
    except (ValueError, RecursionError) as error:
        raise UserError(f"bad --set {' '.join(changes or [])!r}: {error}") from None
    given: dict[str, Any] = {name: parse_budget(text) for name, text in sizes.items() if text is not None}
    settings = settings.updated(given | {name: value for name, value in options.items() if value is not None})
    tensorboard.check(settings.tensorboard)
    return settings, run_dtype(run, dtype, device)


def read_inputs(run: Run, device: str, dtype: Any, data: str = "", sequence: int | None = None) -> dict[str, Any]:
    """`loaded` and `corpus`: the run's model, and its text, or other text, in rows."""
    from nasbench.checkpoints.load import load_model
    from nasbench.data.packing import Corpus

    loaded = load_model(run.spec.model, dtype=dtype, device=device)
    corpus = Corpus.load(data or run.spec.data, loaded.tokenizer, sequence or run.spec.sequence)
    return {"loaded": loaded, "corpus": corpus}
