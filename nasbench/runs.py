"""A run folder: where the stages of one search meet in files.

runs/NAME/
  run.json                 what is searched: model, layer kinds, data, seed
  options.json             options of its commands, which later commands take over
  supernet/                weights of every alternative, optimiser state, losses.csv
  scores/                  every score, item by item (nasbench.evaluation.scores)
  trials.csv  front.csv    what the searches tried, and the Pareto front of it
  validation.csv           predicted against measured end-to-end speed
  final/<placement>/       finalised hybrids
  report/index.html        the report and its PNGs
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_origin, get_type_hints

from nasbench.core.errors import UserError
from nasbench.core.files import read_json, write_json
from nasbench.spaces.placement import MOST_LAYERS, parse_placement
from nasbench.spaces.space import Space

OPTIONS = "options.json"


@dataclass(frozen=True)
class RunSpec:
    """What a run is about; written once, checked when the run is opened again.

    Attributes:
        model: as given to --model: built-in name, folder or hub name.
        names: layer-kind names that every layer may choose from, "A" first.
        data: text for training, "" for the default corpus.
        sequence: tokens of a training sequence.
        seed: of everything random.
        original: the model's own placement; "" where every layer is full attention.
    """

    model: str
    names: tuple[str, ...]
    num_layers: int
    data: str = ""
    sequence: int = 256
    seed: int = 0
    original: str = ""

    def check(self) -> None:
        """Raises UserError for a field of another type, or layer kinds that are none."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, get_origin(kind) or kind):
                raise UserError(f"bad {name} {value!r}")
        if not 1 <= self.num_layers <= MOST_LAYERS or self.sequence < 1 or not self.names:
            raise UserError(f"bad num_layers {self.num_layers}, sequence {self.sequence} or names {self.names}")
        for text in self.names:
            if not isinstance(text, str) or parse_placement(text) != (text,):
                raise UserError(f"bad names {self.names}: {text!r} is no layer kind")
        if self.original:
            parse_placement(self.original, self.num_layers)

    @property
    def space(self) -> Space:
        if not self.original:
            return Space.uniform(self.num_layers, self.names)
        return Space.around(parse_placement(self.original, self.num_layers), self.names)


@dataclass(frozen=True)
class Run:
    """Paths of a run folder, and its specification."""

    path: Path
    spec: RunSpec

    @property
    def supernet(self) -> Path:
        return self.path / "supernet"

    @property
    def scores(self) -> Path:
        return self.path / "scores"

    @property
    def trials(self) -> Path:
        return self.path / "trials.csv"

    @property
    def front(self) -> Path:
        return self.path / "front.csv"

    @property
    def validation(self) -> Path:
        return self.path / "validation.csv"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @classmethod
    def create(cls, path: Path, spec: RunSpec) -> Run:
        """Opens or creates the run. Raises UserError if the folder holds a run of another specification."""
        if (path / "run.json").exists():
            run = cls.open(path)
            if run.spec != spec:
                old, new = asdict(run.spec), asdict(spec)
                changed = ", ".join(f"{key} {old[key]!r} (asked: {new[key]!r})" for key in old if old[key] != new[key])
                raise UserError(f"{path} holds a run with another {changed}: choose another folder")
            return run
        write_json(path / "run.json", asdict(spec))
        return cls(path, spec)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Opens an existing run. Raises UserError if it is none."""
        if not (path / "run.json").is_file():
            raise UserError(f"{path} is not a run folder (no run.json): make one with `nasbench distill --out {path}`")
        data = read_json(path / "run.json")
        try:
            spec = RunSpec(**{**data, "names": tuple(data["names"])})
            spec.check()
        except (TypeError, KeyError, AttributeError, UserError) as error:
            raise UserError(f"{path / 'run.json'} is not a run specification: {error}") from None
        return cls(path, spec)

    def recall(self, **given: str) -> dict[str, str]:
        """Options as they are given; those that are empty as an earlier command of this run had them, else empty."""
        return {name: text or self._options().get(name, "") for name, text in given.items()}

    def remember(self, **options: str) -> None:
        """Keeps options that are not empty for later commands of this run."""
        known = self._options()
        found = {**known, **{name: text for name, text in options.items() if text}}
        if found != known:
            write_json(self.path / OPTIONS, found)

    def _options(self) -> dict[str, str]:
        path = self.path / OPTIONS
        data = read_json(path) if path.is_file() else {}
        if not isinstance(data, dict) or not all(isinstance(text, str) for text in data.values()):
            raise UserError(f"{path} does not map options to texts: remove it")
        return data
