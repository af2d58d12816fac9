"""What a reproduction is asked for, and the plan that it makes of it: budgets in tokens, placements that are compared.

runs/NAME/plan.json holds every decision once it is made, so that a run that is stopped and started again goes on with
the same ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from nasbench.core.errors import UserError, unknown
from nasbench.core.files import read_json, write_json
from nasbench.spaces.placement import Placement, format_placement, parse_placement
from nasbench.supernet.settings import DistillConfig

REMEDIES = ("mixers", "hidden", "long", "fast", "gentle", "self", "plain", "average")
"""Other ways to finalise, where a hybrid falls short: the replaced mixers alone are trained, not whole layers; a loss
on hidden states beside the KL; rows four times as long; three times the learning rate; a third of it; text of which the
model itself wrote one half; text as it is, no row repeating a passage of its own; the mean of the weights before and
after, of every finalised placement."""
CHOICES = ("recall", "kl")
"""Which of the searched placements is finalised: the one with the least divergence on text and on answers to key-value
questions together, or on text alone."""


@dataclass(frozen=True)
class Recipe:
    """What is asked for.

    Attributes:
        model, names, data, sequence, seed: of the run, as for `nasbench distill`.
        suite: folder of benchmark items (.jsonl), None for none.
        counts: numbers of full-attention layers that are compared; 0 < K < layers are searched.
        finalized: those of them of which one placement is distilled further.
        seeds: random placements of each K.
        training: settings of alignment and supernet; their token budgets come from the seconds.
        align_seconds, supernet_seconds, search_seconds, finalize_seconds, speed_seconds, measure_seconds: time of each
            stage; of finalising, each placement's.
        finalize_lr: peak learning rate of finalising.
        choose: which searched placement is finalised, of CHOICES.
        remedies: which are tried, on the first of `finalized`, with the tokens of the first point of its curve.
        search_tokens, test_tokens: held-out tokens that score a placement, while searching and in the table.
        contexts: of the decode speeds; `batches` decoded at once at each.
        quick_items: items of each file of the suite that every placement is asked; the chosen ones are asked all.
        retrieval, quick_retrieval: lengths at which key-value retrieval is measured, of chosen and of all placements.
        retrieval_items: questions at each length.
    """

    model: str = "default"
    names: tuple[str, ...] = ("A", "W256", "J")
    data: str = ""
    suite: Path | None = None
    sequence: int = 2048
    seed: int = 0
    counts: tuple[int, ...] = (0, 1, 2, 4, 6, 8, 15, 30)
    finalized: tuple[int, ...] = (4, 8)
    seeds: int = 5
    training: DistillConfig = field(
        default_factory=lambda: DistillConfig(
            ridge_tokens=131072, align_lr=1e-3, align_batch_tokens=65536,
            supernet_batch_tokens=32768, supernet_lr=5e-4, kl_chunk=4096,
            frozen=(), solved=(), documents=False, repeat_share=0.5, most_full=0.5, whole=True,
            checkpoint_every_s=300.0,
        )
    )  # fmt: skip
    align_seconds: float = 40.0
    supernet_seconds: float = 150.0
    search_seconds: float = 80.0
    finalize_seconds: float = 240.0
    speed_seconds: float = 30.0
    measure_seconds: float = 900.0
    finalize_lr: float = 5e-4
    choose: str = "recall"
    remedies: tuple[str, ...] = ("average",)
    search_tokens: int = 32768
    test_tokens: int = 262144
    contexts: tuple[int, ...] = (8192, 65536)
    batches: tuple[int, ...] = (64, 16)
    quick_items: int = 50
    retrieval: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    quick_retrieval: tuple[int, ...] = (2048,)
    retrieval_items: int = 200

    def check(self, num_layers: int) -> None:
        """Raises UserError for what the model cannot do."""
        if self.choose not in CHOICES:
            raise unknown("choice", self.choose, CHOICES)
        for name in self.remedies:
            if name not in REMEDIES:
                raise unknown("remedy", name, REMEDIES)
        for count in (*self.counts, *self.finalized):
            if not 0 <= count <= num_layers:
                raise UserError(f"{count} full-attention layers asked of {num_layers}: choose 0 to {num_layers}")
        for count in self.finalized:
            if count not in self.counts:
                raise UserError(
                    f"bad --finalize {count}: it is not among --full-attention {', '.join(map(str, self.counts))}"
                )
        if len(self.contexts) != len(self.batches):
            raise UserError(f"{len(self.contexts)} contexts and {len(self.batches)} batches: give as many of each")
        for name, value in vars(self).items():
            if name.endswith("_seconds") and not value >= 0:
                raise UserError(f"bad {name.replace('_', '-')} {value!r}: at least 0")

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads, for another process."""
        return {**asdict(self), "suite": None if self.suite is None else str(self.suite)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The recipe that `as_json` wrote; JSON has lists for tuples."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        values["suite"] = None if data["suite"] is None else Path(data["suite"])
        values["training"] = DistillConfig(**data["training"])
        return cls(**values)


@dataclass(frozen=True)
class Candidate:
    """A placement of the table.

    Attributes:
        method: teacher, uniform, random-N, beam, kl-greedy or recall.
        fill: "best" where every other layer has its best alternative, or the one name that all have.
        weights: "teacher", "supernet", or "final" with the remedy's name behind a colon.
    """

    k: int
    method: str
    placement: Placement
    fill: str = "best"
    weights: str = "supernet"


class Plan:
    """The decisions of a run; every change is on the disk at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = read_json(path) if path.is_file() else {}

    def __getitem__(self, key: str) -> Any:
        return self.data.get(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value
        write_json(self.path, self.data)

    @property
    def candidates(self) -> list[Candidate]:
        rows = self.data.get("candidates", [])
        return [Candidate(**{**row, "placement": parse_placement(row["placement"])}) for row in rows]

    def add_candidates(self, new: list[Candidate]) -> None:
        """Adds those that are not there; a placement that two methods found stands there for each."""
        rows = list(dict.fromkeys([*self.candidates, *new]))
        self["candidates"] = [{**vars(row), "placement": format_placement(row.placement)} for row in rows]
