"""A run folder: where the stages of one search meet in files.

runs/NAME/
  run.json                 what is searched: model, layer kinds, data, seed
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

from nasbench.core.errors import UserError
from nasbench.core.files import read_json, write_json
from nasbench.spaces.placement import parse_placement
from nasbench.spaces.space import Space


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
        except (TypeError, KeyError) as error:
            raise UserError(f"{path / 'run.json'} is not a run specification: {error}") from None
        return cls(path, spec)
