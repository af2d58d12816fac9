"""An objective without a model: additive loss with pair effects, a fixed time per layer kind."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from nasbench.evaluation.scores import ScoreKey, Scores, ScoreStore
from nasbench.search.objective import Measured, Speed
from nasbench.search.session import Options, Session
from nasbench.search.trials import Target
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import Space

MS = {"A": 1.0, "W": 0.5, "J": 0.3, "V": 0.6}
"""Time of one layer, milliseconds."""


class SyntheticObjective:
    """Loss 3 + what every replaced layer costs, with a saving where neighbours are both replaced."""

    text, settings, dtype = "kl", "search/8x32/made-up", "bfloat16"
    store: ScoreStore

    def __init__(
        self, layers: int = 12, names: tuple[str, ...] = ("A", "W", "J"), seed: int = 0, version: str = "v1", space=None
    ):
        self.space = space or Space.uniform(layers, names)
        layers = self.space.num_layers
        self.target = Target("test-device", 1024, 4, "bf16")
        self.version = version
        self.reference = 8.0
        source = np.random.default_rng(seed)
        self.cost = {
            (layer, name): float(source.exponential(0.1)) * (1.0 if name == "W" else 2.0)
            for layer in range(layers)
            for name in self.space.alternatives(layer)
        }
        self.pair = source.normal(0.0, 0.02, size=layers)
        self.asked: list[Placement] = []

    def loss(self, placement: Placement) -> float:
        alone = sum(self.cost.get((layer, name), 0.0) for layer, name in enumerate(placement))
        pairs = itertools.pairwise(placement)
        own = self.space.original
        changed = [name != own[i] for i, name in enumerate(placement)]
        return 3.0 + alone + sum(float(self.pair[i]) for i, _ in enumerate(pairs) if changed[i] and changed[i + 1])

    def kl(self, placement: Placement) -> float:
        return self.loss(placement) - 2.5

    def key(self, placement: Placement, task: str) -> ScoreKey:
        return ScoreKey.of(self.version, placement, task, self.settings, self.dtype)

    def measure(self, placements: Sequence[Placement]) -> list[Measured]:
        for placement in placements:
            if self.store.get(self.key(placement, "kl")) is None:
                self.asked.append(placement)
                values = {"loss": self.loss(placement), "kl": self.kl(placement)}
                self.store.put(
                    {self.key(placement, task): Scores("nats", False, v, 0.01, 8) for task, v in values.items()}
                )
        kept = [[self.store.get(self.key(p, task)) for task in ("kl", "loss")] for p in placements]
        return [Measured(kl.value, loss.value, loss.stderr, kl.value) for kl, loss in kept]

    def speed(self, placement: Placement) -> Speed:
        step_ms = 2.0 + sum(MS[name] for name in placement)
        return Speed(4 / step_ms * 1e3, 9000.0, step_ms, 1000 * placement.count("A"), "measured")

    def importance(self, names: Sequence[str], by_score: bool = False) -> Mapping[tuple[int, str], float]:
        original = self.space.original
        return {
            (layer, name): self.loss((*original[:layer], name, *original[layer + 1 :])) - self.loss(original)
            for layer, name in self.cost
            if name in names
        }


def search(folder, objective=None, **options) -> Session:
    """A search whose scores are kept in the folder."""
    objective = objective or SyntheticObjective()
    objective.store = ScoreStore(folder / "scores")
    return Session(folder, objective, Options(**options))
