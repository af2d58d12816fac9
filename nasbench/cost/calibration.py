"""What a whole step costs beyond the sum of its rows: launch gaps, a warm L2, fused norms. A few end-to-end
measurements of the device calibrate it.

    time = overhead * layers + shared * (embedding, norms, FFNs, head) + sum over kinds of scale[kind] * (its mixers)

A decode step of one sequence has an overhead of its own, `bs1_overhead`: a GPU runs other kernels there, about half as
many. `launch` scales the chunks of a prompt that the host takes longer to launch than the device to run.

The fit is a linear regression on relative errors. Its prior, overhead 0 and every scale 1, lets few measurements move
little: a kind that no measurement contains keeps its scale. Every prediction's uncertainty holds the covariance of the
posterior and the residual of the fit. The measurements lie in `calibration/<device>.csv` beside the profile database.
Every load fits anew, so that the fit always belongs to the rows at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nasbench.core.files import locked
from nasbench.core.tables import columns, read_table, write_table

SCHEMA = 1
PRIOR_SD = {"overhead": 3.0, "bs1_overhead": 3.0, "launch": 0.3}
"""Standard deviations of the prior: microseconds a layer for overheads, a share for the launch scale, which depends on
what else the host does ..."""
PRIOR_SCALE_SD = 0.1
"""... and of every other scale around 1."""
RESIDUAL = 0.02
"""Relative error that the fit expects of a measurement at first."""
LEAST_RESIDUAL = 0.01
"""Few measurements may agree by chance."""
LEAST_FREEDOM = 0.2
"""The left-out error of a measurement is its error over 1 - leverage, and 1 - leverage counts as at least this."""
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
    """Coefficients, their covariance, and the relative residual.

    Attributes:
        rows: measurements behind it; 0 is the prior alone.
    """

    names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    covariance: tuple[tuple[float, ...], ...] = ()
    residual: float = RESIDUAL
    rows: int = 0

    def coefficient(self, name: str) -> float:
        """Microseconds a layer for OVERHEAD and BS1_OVERHEAD, else the scale of a feature."""
        if name in self.names:
            return self.mean[self.names.index(name)]
        return _prior_mean(name)

    def apply(self, features: Features) -> tuple[float, float]:
        """(microseconds, their standard error from the coefficients and the residual)."""
        names = sorted(features)
        x = np.array([features[name] for name in names])
        mean = float(sum(self.coefficient(name) * features[name] for name in names))
        covariance = np.diag([_prior_sd(name) ** 2 for name in names])
        known = [i for i, name in enumerate(names) if name in self.names]
        places = [self.names.index(names[i]) for i in known]
        if known:
            covariance[np.ix_(known, known)] = np.array(self.covariance)[np.ix_(places, places)]
        variance = float(x @ covariance @ x) + (self.residual * mean) ** 2
        return mean, variance**0.5


def _prior_mean(name: str) -> float:
    return 0.0 if name in (OVERHEAD, BS1_OVERHEAD) else 1.0


def _prior_sd(name: str) -> float:
    return PRIOR_SD.get(name, PRIOR_SCALE_SD)


def fit(measured: Sequence[tuple[Features, float, float]]) -> Calibration:
    """Fits a calibration to measurements.

    Args:
        measured: (features in microseconds, measured microseconds, weight of its expected error: 1, or FOREIGN).
    """
    if not measured:
        return Calibration()
    names = sorted({name for features, _, _ in measured for name in features})
    x = np.array([[features.get(name, 0.0) / us for name in names] for features, us, _ in measured])
    weight = np.array([weight for _, _, weight in measured])
    prior = np.array([_prior_mean(name) for name in names])
    precision = np.diag([_prior_sd(name) ** -2 for name in names])
    residual = RESIDUAL
    # Twice: the second time with the error that the first one left.
    for _ in range(2):
        scaled = x / (residual * weight)[:, None]
        covariance = np.linalg.inv(precision + scaled.T @ scaled)
        mean = prior + covariance @ (scaled.T @ ((1.0 - x @ prior) / (residual * weight)))
        errors = (x @ mean - 1.0) / weight
        # Effective number of coefficients that the measurements, and not the prior, have set.
        leverage = np.einsum("ij,jk,ik->i", scaled, covariance, scaled)
        freedom = max(1.0, len(measured) - float(leverage.sum()))
        residual = max(LEAST_RESIDUAL, float(np.sqrt((errors**2).sum() / freedom)))
    # A fit bends towards each measurement by its leverage: it would err by so much more on one that it was not shown.
    left_out = errors / np.maximum(1.0 - leverage, LEAST_FREEDOM)
    residual = max(residual, float(np.sqrt((left_out**2).mean())))
    return Calibration(
        tuple(names), tuple(map(float, mean)), tuple(tuple(map(float, row)) for row in covariance), residual,
        len(measured),
    )  # fmt: skip


def calibrate(
    rows: Iterable[CalibrationRow], mode: str, model: str, features: Callable[[CalibrationRow], Features | None]
) -> Calibration:
    """Fits the rows of a mode.

    Args:
        model: rows of other models count for less.
        features: of a row; None where the profile does not cover it.
    """
    found = [(features(row), row) for row in rows if row.mode == mode]
    return fit(
        [
            (known, row.time_ms * 1e3, 1.0 if row.model == model else FOREIGN)
            for known, row in found
            if known is not None
        ]
    )


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
