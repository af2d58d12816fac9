"""nasbench finalize: distil one chosen placement further."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasbench.cli.training_options import Shard, TensorBoard, with_given
from nasbench.core.errors import UserError
from nasbench.core.sizes import parse_size


def command(
    run: Annotated[Path, typer.Argument(help="A run folder with a supernet.")],
    placement: Annotated[str, typer.Option(help="One letter per layer, as 14J A 4J A 2W 6J.")],
    tokens: Annotated[str, typer.Option(help="Tokens to distil, as 64k; 0 takes the supernet's weights.")] = "16k",
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of the training.")] = None,
    sequence: Annotated[str, typer.Option(help="Tokens of a training row, as 2k; default: the run's.")] = "",
    batch: Annotated[str, typer.Option(help="Tokens of a step; default: the settings'.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; master weights are fp32 either way.")] = "bf16",
    average: Annotated[
        float,
        typer.Option(
            help="Also write a mean with the weights before, this share of it finalised: keeps more of what they could "
            "do (0.5). 0: no mean."
        ),
    ] = 0.0,
    shard: Shard = None,
    tensorboard: TensorBoard = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Distil one placement from the supernet's weights on. Run again after a stop, or for more tokens, it continues."""
    from nasbench.checkpoints.load import resolve_shape
    from nasbench.cli.common import log, print_json, progress_bar, torch_device, torch_dtype
    from nasbench.parallel.context import workers_of
    from nasbench.runs import Run
    from nasbench.spaces.placement import format_placement
    from nasbench.supernet.finalize import AVERAGE, average_final, finalize
    from nasbench.supernet.settings import DistillConfig

    if dtype == "fp16":
        raise UserError("dtype fp16 cannot train (its range is too small): choose fp32 or bf16")
    if not 0 <= average <= 1:
        raise UserError(f"bad --average {average}: choose 0 to 1")
    opened = Run.open(run)
    chosen = opened.spec.space.check(resolve_shape(opened.spec.model).parse(placement))
    settings = DistillConfig.read(config) if config else DistillConfig()
    budget = 0 if tokens == "0" else parse_size(tokens)
    where = torch_device(device)
    if batch:
        settings = settings.updated({"supernet_batch_tokens": parse_size(batch)})
    settings = with_given(settings, shard=shard, tensorboard=tensorboard)
    with workers_of(where) as (workers, own), progress_bar() as progress:
        folder = finalize(
            opened,
            chosen,
            settings,
            budget,
            sequence=parse_size(sequence) if sequence else None,
            device=own,
            dtype=torch_dtype(dtype),
            workers=workers,
            progress=progress,
            notice=log,
        )
    if not workers.leads:
        return
    log(f"finalised {format_placement(chosen)} in {folder}")
    mean = None
    if average:
        # On the CPU: of a model that is shared out, no GPU holds the whole.
        mean = average_final(opened, chosen, AVERAGE, share=average, dtype=torch_dtype(dtype))
        log(f"mean with the weights before in {mean}")
    if as_json:
        found = {"run": str(run), "placement": format_placement(chosen), "folder": str(folder), "tokens": budget}
        print_json(found | ({} if mean is None else {"average": str(mean)}))
