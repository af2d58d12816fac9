"""Where a report's numbers come from: files, devices, dates, versions, and the commands that make them again."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nasbench.checkpoints.resolve import ModelName
from nasbench.core.files import damaged, read_object
from nasbench.core.sizes import format_size, is_count, parse_size
from nasbench.runs import Run
from nasbench.search.strategies import STRATEGIES
from nasbench.search.trials import UNIFORM, Trial
from nasbench.search.validation import ValidationRow
from nasbench.store import Row
from nasbench.supernet.settings import DistillConfig
from nasbench.supernet.trained import trained_with

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
"""How --dtype writes what torch calls a type."""


@dataclass(frozen=True)
class Source:
    """The origin of one group of numbers. `sha256`: the first twelve digits of each file's hash."""

    numbers: str
    file: str
    device: str
    dates: str
    versions: str
    note: str
    sha256: str = ""


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


def _distinct(rows: Sequence[Any], column: str) -> str:
    """Each value that rows have of a column, once."""
    return ", ".join(sorted({getattr(row, column, "") for row in rows} - {""}))


def _source(numbers: str, file: str, rows: Sequence[Any], note: str) -> Source:
    """Of rows that carry device, versions and time."""
    named = {"torch": "torch", "triton": "triton", "driver": "driver", "project": "nasbench", "nasbench": "nasbench"}
    versions = ", ".join(f"{name} {text}" for column, name in named.items() if (text := _distinct(rows, column)))
    return Source(numbers, file, _distinct(rows, "device"), span([row.measured_utc for row in rows]), versions, note)


def _hashes(run: Run, *names: str) -> str:
    """Of the files that are there."""
    paths = [run.path / name for name in names]
    return " ".join(hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths if path.is_file())


def sources(run: Run, trials: Sequence[Trial], rows: Sequence[Row], validated: Sequence[ValidationRow]) -> list[Source]:
    """One entry per group of numbers that the report has.

    Args:
        rows: profile rows that the report used.
        validated: the rows of validation.csv.
    """
    found = []
    if trials:
        versions = f"supernet {_distinct(trials, 'supernet')}"
        files = ("trials.csv", "front.csv", "scores/samples.jsonl")
        dates = span([trial.created_utc for trial in trials])
        limits = dict.fromkeys(trial.limits for trial in trials if trial.limits)
        note, hashes = "; within ".join([f"{len(trials):,} trials", *limits]), _hashes(run, *files)
        found.append(Source("losses, KL, searched placements", ", ".join(files), "", dates, versions, note, hashes))
    measured = [row for row in rows if row.source == "measured"]
    for kind, own in (("measured", measured), ("estimated", [row for row in rows if row.source != "measured"])):
        if own:
            file = f"profiles/{own[0].device}.csv"
            stale = sum(row.stale for row in own)
            note = f"{len(own)} {kind} rows" + (f", {stale} of them stale: of other kernels" if stale else "")
            found.append(_source("predicted tokens/s, speed by context", file, own, note))
    if validated:
        note = f"{len(validated)} placements end to end"
        source = _source("measured tokens/s", "validation.csv", validated, note)
        found.append(replace(source, sha256=_hashes(run, "validation.csv")))
    for numbers, name in (("layer importance", "importance.csv"), ("training curves", "supernet/losses.csv")):
        if hashes := _hashes(run, name):
            found.append(Source(numbers, name, "", "", "", "", hashes))
    formula = "keys, values and recurrent states by formula (arXiv 2508.15884, table 1)"
    return [*found, Source("cache sizes", "computed", "", "", "", formula)]


def commands(run: Run, trials: Sequence[Trial]) -> list[str]:
    """The command lines that make such a run again: those of the recipe that made it, or from what the files say."""
    path = run.path / "pipeline.json"
    if path.is_file():
        with damaged(path):
            return [command for command, stage in read_object(path)["stages"].items() if stage["done"]]
    spec, folder = run.spec, f"runs/{run.path.resolve().name}"
    lines = []
    for target in dict.fromkeys(trial.target for trial in trials):
        words = ["profile", "--model", spec.model, "--blocks", " ".join(spec.names)]
        words += ["--contexts", format_size(target.context), "--batches", str(target.batch), "--dtype", target.dtype]
        lines.append(f"{_command(words)}    # on {target.device}")
    words = ["distill", "--model", spec.model, "--blocks", " ".join(name for name in spec.names if name != "A")]
    words += ["--out", folder, *(["--data", spec.data] if spec.data else [])]
    words += ["--sequence", format_size(spec.sequence), "--seed", str(spec.seed)]
    lines.append(_command([*words, *_settings(run)]))
    for target in dict.fromkeys(trial.target for trial in trials):
        mine = [trial for trial in trials if trial.target == target]
        counts = ",".join(str(k) for k in sorted({trial.k for trial in mine if trial.strategy == UNIFORM}))
        goal = ["--profile", target.device, "--context", format_size(target.context), "--batch", str(target.batch)]
        for strategy, objective, limits in dict.fromkeys((t.strategy, t.objective, t.limits) for t in mine):
            if strategy in STRATEGIES and strategy != UNIFORM:
                tried = [t for t in mine if (t.strategy, t.objective, t.limits) == (strategy, objective, limits)]
                words = ["search", folder, "--strategy", strategy, "--objective", objective]
                words += limits.split() if limits else ["--full-attention", counts]
                words += [*goal, "--dtype", target.dtype, "--evaluations", str(len(tried))]
                lines.append(_command([*words, *_scoring(tried[-1])]))
    return [*lines, _command(["validate", folder]), _command(["report", folder])]


def _scoring(trial: Trial) -> list[str]:
    """On which text and in which dtype a search scored: `search/8x256/...` are 8 rows of 256 tokens."""
    rows, times, length = trial.settings.split("/")[1].partition("x") if "/" in trial.settings else ("", "", "")
    tokens = ["--search-tokens", format_size(int(rows) * parse_size(length))] if times and is_count(rows) else []
    return [*tokens, *(["--eval-dtype", DTYPES[trial.eval_dtype]] if trial.eval_dtype in DTYPES else [])]


def _settings(run: Run) -> list[str]:
    """`--set` for every setting of the training that is not the default, as the newest checkpoint has them."""
    known = trained_with(run.path)
    defaults = asdict(DistillConfig())
    changed = {n: v for n, v in known.items() if n in defaults and v != json.loads(json.dumps(defaults[n]))}
    words = [word for name, value in changed.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return [*words, *(["--dtype", DTYPES[known["dtype"]]] if known.get("dtype") in DTYPES else [])]


def _command(words: Sequence[str]) -> str:
    return shlex.join(["nasbench", *words])
