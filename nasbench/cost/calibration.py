"""What a whole step costs beyond the sum of its rows: launch gaps, a warm L2, fused norms. A few end-to-end
measurements of the device calibrate it.

    time = overhead * layers + shared * (embedding, norms, FFNs, head) + sum over kinds of scale[kind] * (its mixers)

A decode step of one sequence has an overhead of its own, `bs1_overhead`: a GPU runs other kernels there, about half as
many. What the host takes to launch the chunks of a prompt, where that is longer than the device takes, no measurement
scales: it differs by a third between one minute and the next.

The fit is a linear regression on relative errors. Its prior, overhead 0 and every scale 1, lets few measurements move
little: a kind that no measurement contains keeps its scale. Errors are of Student's t distribution: a measurement that
the host has delayed does not bend the rest. The uncertainty of a prediction is that of the posterior, times a width by
which it would have covered LEVEL of the measurements, each left out of the fit (the jackknife of arXiv 1905.02928).
The measurements lie in `calibration/<device>.csv` beside the profile database. Every load fits anew, so that the fit
always belongs to the rows at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from nasbench.core.files import locked
from nasbench.core.tables import columns, read_table, write_table
from nasbench.spaces.placement import parse_placement

SCHEMA = 1
PRIOR_SD = {"overhead": 2.0, "bs1_overhead": 2.0}
"""Standard deviations of the prior: microseconds a layer for overheads ..."""
PRIOR_SCALE_SD = 0.1
"""... and of every scale around 1."""
RESIDUAL = 0.02
"""Relative error that the fit expects of a measurement."""
LAUNCH_SD = 0.35
"""Relative error of the host's launches. Whole prompts took 0.6 to 1.25 of what the launches of their blocks sum to, on
two cards and in four sessions."""
FREEDOM, ROUNDS = 4.0, 6
"""Degrees of freedom of the t distribution of the errors, and how often the weights that follow from it are made."""
LEVEL, LEVEL_SD = 0.9, 1.645
"""Share that an interval is to cover, and its half for a normal distribution, in standard deviations."""
MEDIAN_SD = 0.674
"""Median of absolute errors of a normal distribution, in standard deviations."""
LEAST_DRAWN, WIDTH = 5, 1.25
"""With fewer random placements of this model, an interval is at least so much wider than a normal distribution's: the
other measurements are the ends of the range, and fit better. With 1.25, 92 % of 51 steps on an H100 were inside."""
FOREIGN = 3.0
"""How much less precise measurements of another model on the device count."""
OVERHEAD, BS1_OVERHEAD, SHARED, LAUNCH = "overhead", "bs1_overhead", "shared", "launch"

Features = Mapping[str, float]
"""Microseconds by feature: SHARED, LAUNCH and the letters of kinds; OVERHEAD and BS1_OVERHEAD are numbers of layers."""


@dataclass(frozen=True, kw_only=True)
class CalibrationRow:
    """One end-to-end measurement for fitting: a decode step, or the reading of a whole prompt."""

    schema: int = SCHEMA
    device: str
    model: str
    dtype: str
    mode: str
    placement: str
    context: int
    batch: int
    chunk: int
    time_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    torch: str
    driver: str
    project: str
    measured_utc: str

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _KEY)


_COLUMNS = columns(CalibrationRow)
_KEY = _COLUMNS[1 : _COLUMNS.index("chunk") + 1]


@dataclass(frozen=True)
class Calibration:
    """Coefficients, their covariance, and a width of the intervals.

    Attributes:
        width: of an interval, over that of a normal distribution.
        rows: measurements behind it; 0 is the prior alone.
    """

    names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    covariance: tuple[tuple[float, ...], ...] = ()
    width: float = 1.0
    rows: int = 0

    def coefficient(self, name: str) -> float:
        """Microseconds a layer for OVERHEAD and BS1_OVERHEAD, else the scale of a feature."""
        if name in self.names:
            return self.mean[self.names.index(name)]
        return _prior_mean(name)

    def apply(self, features: Features) -> tuple[float, float]:
        """(microseconds, their standard error: LEVEL_SD of them are half an interval)."""
        names = sorted(set(features) - {LAUNCH})
        x = np.array([features[name] for name in names])
        mean = float(sum(self.coefficient(name) * features[name] for name in features))
        covariance = np.diag([_prior_sd(name) ** 2 for name in names])
        known = [i for i, name in enumerate(names) if name in self.names]
        places = [self.names.index(names[i]) for i in known]
        if known:
            covariance[np.ix_(known, known)] = np.array(self.covariance)[np.ix_(places, places)]
        variance = float(x @ covariance @ x) + (RESIDUAL * mean) ** 2
        return mean, self.width * variance**0.5


def _prior_mean(name: str) -> float:
    return 0.0 if name in (OVERHEAD, BS1_OVERHEAD) else 1.0


def _prior_sd(name: str) -> float:
    return PRIOR_SD.get(name, PRIOR_SCALE_SD)


@dataclass(frozen=True)
class Measured:
    """One measurement for the fit.

    Attributes:
        features, us: microseconds.
        weight: of its expected error: 1, or FOREIGN.
        drawn: whether its placement is a random one, as those that will be predicted.
    """

    features: Features
    us: float
    weight: float = 1.0
    drawn: bool = False


def fit(measured: Sequence[Measured]) -> Calibration:
    """Fits a calibration to measurements."""
    if not measured:
        return Calibration()
    names = sorted({name for row in measured for name in row.features} - {LAUNCH})
    launch = np.array([row.features.get(LAUNCH, 0.0) / row.us for row in measured])
    x = np.array([[row.features.get(name, 0.0) / row.us for name in names] for row in measured])
    error = np.array([(row.weight * RESIDUAL) ** 2 for row in measured]) + (LAUNCH_SD * launch) ** 2
    prior = np.array([_prior_mean(name) for name in names])
    precision = np.diag([_prior_sd(name) ** -2 for name in names])
    share = np.ones(len(measured))
    for _ in range(ROUNDS):
        scaled = x * np.sqrt(share / error)[:, None]
        covariance = np.linalg.inv(precision + scaled.T @ scaled)
        mean = prior + covariance @ (x.T @ ((1.0 - launch - x @ prior) * share / error))
        errors = x @ mean + launch - 1.0
        share, used = (FREEDOM + 1.0) / (FREEDOM + np.maximum(errors**2 / error, 1.0)), share
    # Each measurement against a fit without it: by the leverage, without fitting anew.
    leverage = np.einsum("ij,jk,ik->i", scaled, covariance, scaled)
    score = np.abs(errors) / (1.0 - leverage) / np.sqrt(error * (1.0 + leverage / (1.0 - leverage) / used))
    width = _width(score, [row.drawn and row.weight == 1.0 for row in measured])
    rows = tuple(tuple(map(float, row)) for row in covariance)
    return Calibration(tuple(names), tuple(map(float, mean)), rows, width, len(measured))


def _width(score: np.ndarray, drawn: Sequence[bool]) -> float:
    """What covers LEVEL of the random placements and one more, over what would of a normal distribution; where there
    are few of those, by the median of all."""
    if sum(drawn) < LEAST_DRAWN:
        return max(WIDTH, float(np.median(score)) / MEDIAN_SD)
    known = np.sort(score[np.array(drawn)])
    return float(known[min(len(known), ceil(LEVEL * (len(known) + 1))) - 1]) / LEVEL_SD


def calibrate(
    rows: Iterable[CalibrationRow],
    mode: str,
    model: str,
    features: Callable[[CalibrationRow], Features | None],
) -> Calibration:
    """Fits the rows of a mode.

    Args:
        model: rows of other models count for less.
        features: of a row; None where the profile does not cover it.
    """
    found = []
    for row in rows:
        known = features(row) if row.mode == mode else None
        if known is not None:
            weight = 1.0 if row.model == model else FOREIGN
            found.append(Measured(known, row.time_ms * 1e3, weight, _drawn(row.placement)))
    return fit(found)


def _drawn(text: str) -> bool:
    """Whether a placement is neither of one kind alone nor of several by turns."""
    placement = parse_placement(text)
    kinds = list(dict.fromkeys(placement))
    return any(name != kinds[i % len(kinds)] for i, name in enumerate(placement))


def calibration_path(profile: Path) -> Path:
    """Where the measurements beside a profile database lie."""
    return profile.parent / "calibration" / profile.name


def read_calibration(path: Path) -> list[CalibrationRow]:
    """The rows of a file, [] where there is none. Raises UserError naming the line and column of a bad cell."""

    def check(row: CalibrationRow) -> str:
        return "" if row.time_ms > 0 else "time_ms: write a positive number"

    return read_table(path, CalibrationRow, check=check)


def add_calibration(path: Path, rows: Iterable[CalibrationRow]) -> None:
    """Adds measurements to a file, the new one in place of an old one of the same key; atomically, under a lock."""
    with locked(path):
        table = {row.key: row for row in [*read_calibration(path), *rows]}
        write_table(path, [table[key] for key in sorted(table)], CalibrationRow, digits=4)


def find_calibration(profiles: Iterable[Path]) -> list[CalibrationRow]:
    """The measurements beside several databases of one device, the last file's over the others'."""
    table = {row.key: row for path in profiles for row in read_calibration(calibration_path(path))}
    return list(table.values())
