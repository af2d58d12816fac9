"""nasbench reproduce: the whole recipe on one device, measured on several if asked, and the table of what it gives."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from nasbench.core.errors import UserError, unknown
from nasbench.core.sizes import parse_size

CPU_SHARE = 1 / 32
"""Of every batch that fills a GPU, on a CPU."""


def command(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/reproduce"),
    model: Annotated[
        str, typer.Option(help="`default`, a Hugging Face folder, a GGUF file or a hub name.")
    ] = "default",
    names: Annotated[str, typer.Option(help="Layer kinds beside full attention.")] = "W256,J",
    data: Annotated[
        str, typer.Option(help="Text: .txt, .jsonl (.xz), .parquet, a folder, hf:NAME[:SPLIT]; default: Python's help.")
    ] = "",
    suite: Annotated[
        Path | None,
        typer.Option(help="Folder of benchmark items (.jsonl), as nasbench/evaluation/suite.py says."),
    ] = None,
    sequence: Annotated[str, typer.Option(help="Tokens of a training row.")] = "2k",
    full_attention: Annotated[
        str, typer.Option("--full-attention", "-k", help="Numbers of full-attention layers that are compared.")
    ] = "0,1,2,4,6,8,15,30",
    finalize: Annotated[str, typer.Option(help="Those of which one placement is distilled further.")] = "4,8",
    seeds: Annotated[int, typer.Option(help="Random placements of each number.")] = 5,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of the training.")] = None,
    choose: Annotated[
        str, typer.Option(help="What the finalised placement is chosen by: recall (text and retrieval) or kl (text).")
    ] = "recall",
    finalize_lr: Annotated[float, typer.Option(help="Peak learning rate of finalising.")] = 5e-4,
    align_seconds: Annotated[float, typer.Option(help="Of block-wise alignment.")] = 40,
    supernet_seconds: Annotated[float, typer.Option(help="Of random sub-networks.")] = 150,
    search_seconds: Annotated[float, typer.Option(help="Of all searches together.")] = 80,
    finalize_seconds: Annotated[float, typer.Option(help="Of each finalised placement.")] = 240,
    remedies: Annotated[
        str,
        typer.Option(
            help="Other ways to finalise, '' for none: mixers, hidden, long, fast, gentle, self, plain, average."
        ),
    ] = "average",
    speed_seconds: Annotated[float, typer.Option(help="Of decode speeds.")] = 30,
    measure_seconds: Annotated[
        float, typer.Option(help="Of benchmarks and retrieval; it ends before where all is asked.")
    ] = 900,
    measure_devices: Annotated[
        str,
        typer.Option(
            help="Devices that benchmarks and retrieval are measured on at once, cuda:0,cuda:1; the first is the run's "
            "own. Default: that one alone."
        ),
    ] = "",
    contexts: Annotated[str, typer.Option(help="Of the decode speeds.")] = "8k,64k",
    batches: Annotated[str, typer.Option(help="Sequences decoded at once at each of the contexts.")] = "64,16",
    search_tokens: Annotated[str, typer.Option(help="Held-out tokens that score a placement in a search.")] = "32k",
    test_tokens: Annotated[str, typer.Option(help="Other held-out tokens, of the table.")] = "256k",
    quick_items: Annotated[int, typer.Option(help="Items of each benchmark that every placement is asked.")] = 50,
    retrieval: Annotated[str, typer.Option(help="Lengths of key-value retrieval.")] = "512,1k,2k,4k,8k",
    quick_retrieval: Annotated[str, typer.Option(help="Those of every placement.")] = "2k",
    retrieval_items: Annotated[int, typer.Option(help="Questions at each length.")] = 200,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16; master weights are fp32 either way.")] = "bf16",
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Tables and page of what there is; no model.")
    ] = False,
) -> None:
    """Align, train, search, finalise and measure a model's hybrids, each stage for about the seconds given.

    Writes OUT/report: table.csv of every placement, comparisons with intervals, figures, index.html. Stopped at any
    moment, the same command continues; more seconds give a finished stage more tokens.
    """
    from nasbench.checkpoints.resolve import resolve_shape
    from nasbench.cli.common import log, progress_bar, torch_device, torch_dtype
    from nasbench.cli.distill_command import parse_names
    from nasbench.cli.search_command import parse_counts
    from nasbench.reproduce.recipe import Recipe
    from nasbench.supernet.settings import DistillConfig

    if dtype == "fp16":
        raise UserError("dtype fp16 cannot train (its range is too small): choose fp32 or bf16")
    if suite is not None and not suite.is_dir():
        raise UserError(f"no such folder: {suite}: --suite takes a folder of .jsonl files of benchmark items")
    shape = resolve_shape(model)
    where = torch_device(device)
    settings = DistillConfig.read(config) if config else scaled(Recipe().training, where)
    recipe = Recipe(
        model=model, names=parse_names(names, shape), data=data, suite=suite, sequence=parse_size(sequence), seed=seed,
        counts=parse_counts(full_attention), finalized=parse_counts(finalize), seeds=seeds, training=settings,
        align_seconds=align_seconds, supernet_seconds=supernet_seconds, search_seconds=search_seconds,
        finalize_seconds=finalize_seconds, speed_seconds=speed_seconds,
        measure_seconds=measure_seconds, finalize_lr=finalize_lr, choose=choose,
        remedies=tuple(name.strip() for name in remedies.split(",") if name.strip()),
        search_tokens=parse_size(search_tokens), test_tokens=parse_size(test_tokens),
        contexts=_sizes(contexts), batches=_sizes(batches), quick_items=quick_items,
        retrieval=_sizes(retrieval), quick_retrieval=_sizes(quick_retrieval), retrieval_items=retrieval_items,
    )  # fmt: skip
    recipe.check(shape.num_layers)
    if recipe.sequence > shape.max_context:
        raise UserError(f"sequence {recipe.sequence} is beyond the context of {shape.name}, {shape.max_context}")

    # A report of another machine's run needs none of its devices.
    helpers = () if report_only else helper_devices(measure_devices, where)

    from nasbench.reproduce.driver import reproduce, write_report

    # As it was typed: a report that leaves options out is not one to repeat.
    told = shlex.join(["nasbench", *(word for word in sys.argv[1:] if word != "--report-only")])
    if report_only:
        page = write_report(out, recipe, told)
    else:
        with progress_bar() as progress:
            kind = torch_dtype(dtype)
            page = reproduce(recipe, out, told, device=where, dtype=kind, log=log, progress=progress, helpers=helpers)
    log(f"Open {page} in a browser.")


def scaled(settings, where: str):  # type: ignore[no-untyped-def]
    """The settings with batches that suit the device."""
    if where.startswith("cuda"):
        return settings
    names = ("ridge_tokens", "align_batch_tokens", "supernet_batch_tokens")
    changes = {name: max(1, int(getattr(settings, name) * CPU_SHARE)) for name in names}
    return settings.updated({**changes, "kl_chunk": 512})


def helper_devices(text: str, where: str) -> tuple[str, ...]:
    """Of `cuda:0,cuda:1`, the devices beside the run's own, `where`, which comes first; none of an empty text.

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
            raise unknown("measure device", part.strip(), names)
        found.append(names[part.strip()])
    if found[0] != (own := names.get(where, where)):
        raise UserError(f"bad --measure-devices {text!r}: the first must be the run's own device, {own}")
    return tuple(found[1:])


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(parse_size(part) for part in text.split(",") if part.strip())
