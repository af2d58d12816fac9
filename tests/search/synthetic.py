"""An objective without a model: additive loss with pair effects, a fixed time per layer kind."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from nasbench.search.objective import Loss, Speed
from nasbench.search.trials import Target
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import Space

MS = {"A": 1.0, "W": 0.5, "J": 0.3}
"""Time of one layer, milliseconds."""


class SyntheticObjective:
    """Loss 3 + what every replaced layer costs, with a saving where neighbours are both replaced."""

    def __init__(self, layers: int = 12, names: tuple[str, ...] = ("A", "W", "J"), seed: int = 0, version: str = "v1"):
        self.space = Space.uniform(layers, names)
        self.target = Target("test-device", 1024, 4, "bf16")
        self.version = version
        self.reference_loss = 8.0
        source = np.random.default_rng(seed)
        self.cost = {
            (layer, name): float(source.exponential(0.1)) * (1.0 if name == "W" else 2.0)
            for layer in range(layers)
            for name in self.space.fillers(layer)
        }
        self.pair = source.normal(0.0, 0.02, size=layers)
        self.asked: list[Placement] = []

    def loss(self, placement: Placement) -> float:
        alone = sum(self.cost.get((layer, name), 0.0) for layer, name in enumerate(placement))
        pairs = itertools.pairwise(placement)
        return 3.0 + alone + sum(float(self.pair[i]) for i, (a, b) in enumerate(pairs) if "A" not in (a, b))

    def losses(self, placements: Sequence[Placement]) -> list[Loss]:
        self.asked.extend(placements)
        return [Loss(self.loss(placement), 0.01, self.loss(placement) - 2.5) for placement in placements]

    def speed(self, placement: Placement) -> Speed:
        step_ms = 2.0 + sum(MS[name] for name in placement)
        return Speed(4 / step_ms * 1e3, 9000.0, step_ms, 1000 * placement.count("A"), "measured")

    def importance(self, names: Sequence[str]) -> Mapping[tuple[int, str], float]:
        original = self.space.original
        return {
            (layer, name): self.loss((*original[:layer], name, *original[layer + 1 :])) - self.loss(original)
            for layer, name in self.cost
            if name in names
        }
