"""The scores of a run, sample by sample: runs/NAME/scores/samples.jsonl. Each score is measured once.

    store = ScoreStore(run.scores)
    key = ScoreKey(weights, placement, task, settings, dtype)
    store.get(key)                 -> Scores, or None if nobody measured it
    store.put({key: Scores.of(samples, metric="nats", higher_is_better=False)})
    store.find(task="kl", weights=version)   -> {key: Scores} of all keys with these fields
    store.table()                  -> pandas.DataFrame, one row a score
    difference(ours, theirs)       -> Gap: mean, standard error and 95 % interval over the same items

A line of the file is one score: the key, the samples, and about them: metric, sense, time and versions. Lines are only
added, under a lock file, so that several processes write; the newest line of a key counts. A line that a killed process
left unfinished is cut off by the next writer. Samples that are not finite are never written.

Older runs have evals.csv and items.jsonl; both are read too (nasbench.evaluation.old_scores).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nasbench.core.errors import MachineError
from nasbench.core.files import locked, machine_errors
from nasbench.core.provenance import utc_now
from nasbench.spaces.placement import Placement, format_placement

if TYPE_CHECKING:
    import pandas

FILE = "samples.jsonl"
Z95 = 1.96
"""Half of a 95 % interval in standard errors."""
log = logging.getLogger("nasbench")


@dataclass(frozen=True, order=True)
class ScoreKey:
    """What a score belongs to. Two scores with the same key are the same measurement.

    Attributes:
        weights: version of the supernet's or of finalised weights.
        placement: canonical text.
        task: with its arguments and without folders, e.g. `kl`, `retrieval@512`, `suite@50:arc`.
        settings: everything else the task depends on: split, rows x length, fingerprint of text or questions, seed.
        dtype: the model ran in, e.g. `bfloat16`.
    """

    weights: str
    placement: str
    task: str
    settings: str
    dtype: str

    @classmethod
    def of(cls, weights: str, placement: Placement, task: str, settings: str, dtype: str) -> Self:
        return cls(weights, format_placement(placement), task, settings, dtype)


@dataclass(frozen=True)
class Scores:
    """A task's result.

    Attributes:
        metric: what a sample is: "nats", "accuracy".
        value, stderr, n: mean over the samples, its standard error (NaN for one sample), how many there are.
        samples: (n,) float64, the same items in the same order for every placement; None where only means were kept.
        about: provenance: `utc`, and what the writer adds.
    """

    metric: str
    higher_is_better: bool
    value: float
    stderr: float
    n: int
    samples: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)
    about: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls, samples: ArrayLike, metric: str, higher_is_better: bool, about: Mapping[str, Any] | None = None
    ) -> Self:
        """Samples are rounded to fp32, which a file keeps exactly. They may be non-finite: `ScoreStore.put` refuses."""
        with np.errstate(over="ignore"):
            values = np.asarray(samples, np.float32).astype(np.float64)
        return cls(metric, higher_is_better, *mean_and_stderr(values), len(values), values, about or {})

    @property
    def cost(self) -> float:
        """Lower is better: nats, or 1 - accuracy."""
        return 1.0 - self.value if self.higher_is_better else self.value


def mean_and_stderr(samples: NDArray[np.float64] | None) -> tuple[float, float]:
    """NaN where there is nothing, the error also for a single sample."""
    if samples is None or not len(samples):
        return math.nan, math.nan
    with np.errstate(invalid="ignore"):
        error = float(samples.std(ddof=1)) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return float(samples.mean()), error


@dataclass(frozen=True)
class Gap:
    """Ours minus theirs, over `n` common items."""

    mean: float
    stderr: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - Z95 * self.stderr

    @property
    def high(self) -> float:
        return self.mean + Z95 * self.stderr


def difference(ours: Scores | None, theirs: Scores | None) -> Gap:
    """Item by item, so that how hard the items are cancels. NaN and n = 0 where the items are not the same."""
    pair = [scores.samples if scores is not None else None for scores in (ours, theirs)]
    if pair[0] is None or pair[1] is None or len(pair[0]) != len(pair[1]):
        return Gap(math.nan, math.nan, 0)
    return Gap(*mean_and_stderr(pair[0] - pair[1]), len(pair[0]))


class ScoreStore:
    """All scores of a run.

    Args:
        path: folder, usually `run.scores`; it is made with the first score.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path / FILE
        self._scores: dict[ScoreKey, Scores] = {}
        self._read_bytes = 0
        from nasbench.evaluation.old_scores import read_old_scores

        self._scores.update(read_old_scores(path.parent))
        self.refresh()

    def get(self, key: ScoreKey) -> Scores | None:
        """The score, also one that another process added meanwhile."""
        if key not in self._scores:
            self.refresh()
        return self._scores.get(key)

    def find(self, **fields: str) -> dict[ScoreKey, Scores]:
        """The scores whose keys have these fields, the oldest first."""
        self.refresh()
        wanted = fields.items()
        return {k: v for k, v in self._scores.items() if all(getattr(k, name) == text for name, text in wanted)}

    def put(self, scores: Mapping[ScoreKey, Scores]) -> None:
        """Adds scores. Raises MachineError naming task and placement for samples that are not finite, and writes
        nothing then."""
        for key, found in scores.items():
            _check_finite(key, found)
        if not scores:
            return
        lines = "".join(_line(key, found) for key, found in scores.items())
        with locked(self.file), machine_errors(f"writing {self.file}"), self.file.open("ab") as file:
            self.refresh()
            # What a killed writer left behind the last whole line.
            file.truncate(self._read_bytes)
            file.write(lines.encode())
        self.refresh()

    def refresh(self) -> None:
        """Reads what was added to the file since the last look."""
        size = self.file.stat().st_size if self.file.is_file() else 0
        # Somebody may have replaced the file by a shorter one.
        self._read_bytes = self._read_bytes if self._read_bytes <= size else 0
        if size == self._read_bytes:
            return
        with machine_errors(f"reading {self.file}"), self.file.open("rb") as file:
            file.seek(self._read_bytes)
            fresh = file.read()
        # Another process may be in the midst of its last line.
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            try:
                key, scores = _parse(json.loads(line))
            except (ArithmeticError, ValueError, KeyError, TypeError, RecursionError) as error:
                log.warning("%s: left out a line that is no score (%s): %.80r", self.file, error, line)
                continue
            # The newest of a key counts, also in the order of `find`.
            self._scores.pop(key, None)
            self._scores[key] = scores

    def table(self) -> pandas.DataFrame:
        """One row a score: the key's fields, metric, value, stderr, n, higher_is_better, utc."""
        import pandas

        self.refresh()
        columns = ["metric", "value", "stderr", "n", "higher_is_better"]
        rows = [vars(key) | vars(scores) | {"utc": scores.about.get("utc", "")} for key, scores in self._scores.items()]
        return pandas.DataFrame(rows, columns=[*ScoreKey.__dataclass_fields__, *columns, "utc"])


def _check_finite(key: ScoreKey, scores: Scores) -> None:
    values = scores.samples if scores.samples is not None else np.array([scores.value])
    bad = int((~np.isfinite(values)).sum())
    if bad or not len(values):
        raise MachineError(
            f"task {key.task} of {key.placement}: {bad} of {len(values)} samples are not finite: nothing is written. "
            f"Look for non-finite weights (version {key.weights}), or evaluate in fp32 instead of {key.dtype}"
        )


def _line(key: ScoreKey, scores: Scores) -> str:
    about = {"utc": utc_now(), **scores.about}
    row = {**asdict(key), "metric": scores.metric, "higher_is_better": scores.higher_is_better, "about": about}
    if scores.samples is None:
        row |= {"value": scores.value, "stderr": None if math.isnan(scores.stderr) else scores.stderr, "n": scores.n}
    else:
        row["samples"] = [_short(value) for value in scores.samples]
    return json.dumps(row, separators=(",", ":")) + "\n"


def _short(value: float) -> float | int:
    """The shortest text that reads back as the same fp32."""
    return int(value) if value == int(value) else float(str(np.float32(value)))


def _parse(row: dict[str, Any]) -> tuple[ScoreKey, Scores]:
    key = ScoreKey(**{name: str(row[name]) for name in ScoreKey.__dataclass_fields__})
    kind, about = (str(row["metric"]), bool(row["higher_is_better"])), dict(row.get("about", {}))
    if "samples" in row:
        scores = Scores.of(row["samples"], *kind, about)
    else:
        stderr = math.nan if row["stderr"] is None else float(row["stderr"])
        scores = Scores(*kind, float(row["value"]), stderr, int(row["n"]), None, about)
    if not math.isfinite(scores.value):
        raise ValueError(f"task {key.task} of {key.placement} is not finite")
    return key, scores
