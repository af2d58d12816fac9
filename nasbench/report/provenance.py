"""Where a report's numbers come from: files, devices, dates, versions, and the commands that make them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nasbench.checkpoints.resolve import ModelName
from nasbench.core.sizes import format_size
from nasbench.runs import Run
from nasbench.search.trials import TEACHER, UNIFORM, Trial
from nasbench.store import Row


@dataclass(frozen=True)
class Source:
    """The origin of one group of numbers."""

    numbers: str
    file: str
    device: str
    dates: str
    versions: str
    note: str


class Validated(Protocol):
    """What this module reads of a row of validation.csv."""

    @property
    def device(self) -> str: ...
    @property
    def measured_utc(self) -> str: ...
    @property
    def torch(self) -> str: ...
    @property
    def driver(self) -> str: ...
    @property
    def nasbench(self) -> str: ...


def teacher_source(model: ModelName) -> str:
    """What the full-attention model is, in words."""
    if model.kind == "default":
        from nasbench.checkpoints.fetch import SOURCE

        return SOURCE
    kinds = {"gguf": "GGUF file, dequantised", "hub": "from the hub", "folder": "local folder"}
    return f"{model.value} ({kinds.get(model.kind, model.kind)})"


def span(times: Sequence[str]) -> str:
    """`2026-01-01` or `2026-01-01 to 2026-01-03` of UTC times."""
    days = sorted({time[:10] for time in times if time})
    return "" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _distinct(values: Sequence[str]) -> str:
    return ", ".join(sorted({value for value in values if value}))


def _versions(**named: Sequence[str]) -> str:
    """`torch 2.13.0, driver 580`: what is known, each value once."""
    return ", ".join(f"{name} {_distinct(values)}" for name, values in named.items() if _distinct(values))


def sources(run: Run, trials: Sequence[Trial], rows: Sequence[Row], validated: Sequence[Validated]) -> list[Source]:
    """One entry per group of numbers that the report has.

    Args:
        rows: profile rows that the report used.
        validated: the rows of validation.csv.
    """
    found = []
    if trials:
        versions = _distinct([trial.supernet for trial in trials])
        found.append(
            Source(
                "losses, KL, searched placements", "trials.csv, front.csv, evals.csv", "",
                span([trial.created_utc for trial in trials]), f"supernet {versions}", f"{len(trials)} trials",
            )
        )  # fmt: skip
    measured = [row for row in rows if row.source == "measured"]
    for kind, own in (("measured", measured), ("estimated", [row for row in rows if row.source != "measured"])):
        if own:
            versions = _versions(
                torch=[row.torch for row in own],
                triton=[row.triton for row in own],
                driver=[row.driver for row in own],
                nasbench=[row.project for row in own],
            )
            device = own[0].device
            found.append(
                Source(
                    "predicted tokens/s, speed by context", f"profiles/{device}.csv", device,
                    span([row.measured_utc for row in own]), versions, f"{len(own)} {kind} rows",
                )
            )  # fmt: skip
    if validated:
        versions = _versions(
            torch=[row.torch for row in validated],
            driver=[row.driver for row in validated],
            nasbench=[row.nasbench for row in validated],
        )
        found.append(
            Source(
                "measured tokens/s", "validation.csv", _distinct([row.device for row in validated]),
                span([row.measured_utc for row in validated]), versions, f"{len(validated)} placements end to end",
            )
        )  # fmt: skip
    found.append(
        Source(
            "cache sizes",
            "computed",
            "",
            "",
            "",
            "keys, values and recurrent states by formula (arXiv 2508.15884, table 1)",
        )
    )
    return found


def commands(run: Run, trials: Sequence[Trial]) -> list[str]:
    """The command lines that make such a run again; budgets are not written in the run's files and left out."""
    spec, folder = run.spec, f"runs/{run.path.resolve().name}"
    model = f"--model {spec.model}"
    data = f" --data {spec.data}" if spec.data else ""
    lines = [f"nasbench distill {model} --out {folder}{data}"]
    blocks = "".join(name for name in spec.names if len(name) == 1)
    for target in dict.fromkeys(trial.target for trial in trials):
        mine = [trial for trial in trials if trial.target == target]
        context = format_size(target.context)
        lines.insert(
            0,
            f"nasbench profile {model} --blocks {blocks} --contexts {context} --batches {target.batch} "
            f"--dtype {target.dtype}    # on {target.device}",
        )
        counts = ",".join(str(k) for k in sorted({trial.k for trial in mine if trial.strategy == UNIFORM}))
        for strategy in dict.fromkeys(trial.strategy for trial in mine):
            if strategy not in (TEACHER, UNIFORM):
                goal = f"--device {target.device} --context {context} --batch {target.batch} --dtype {target.dtype}"
                lines.append(f"nasbench search {folder} --strategy {strategy} --full-attention {counts} {goal}")
    return [*lines, f"nasbench validate {folder}", f"nasbench report {folder}"]
