"""An objective without a model: additive loss with pair effects, a fixed time per layer kind."""

import itertools
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from nasbench.evaluation.scores import ScoreKey, Scores, ScoreStore
from nasbench.search.limits import Costs, Limit, Workload
from nasbench.search.objective import Measured, Speed
from nasbench.search.session import Options, Session
from nasbench.search.trials import Target
from nasbench.spaces.placement import Placement
from nasbench.spaces.space import Space

MS = {"A": 1.0, "W": 0.5, "J": 0.3, "V": 0.6}
"""Time of one layer, milliseconds."""
HOST_MS = {"A": 0.4, "W": 0.6, "J": 0.7, "V": 0.6}
"""Its launches in a prompt: the longer of both sums counts."""


class SyntheticCosts(Costs):
    """A batch of B takes B times the time; the cache is that of full attention alone."""

    def __init__(self) -> None:
        self.value, self.batches = cache(self._value), cache(self._batches)

    def room_bytes(self, device: str) -> float:
        return 64e6

    def _batches(self, device: str) -> list[int]:
        return [1, 4, 16]

    def predict(self, metric: str, at: Workload, placement: Placement) -> float:
        full = placement.count("A") * at.batch * at.context
        step_ms = (2.0 + sum(MS[name] for name in placement)) * at.batch / 4
        tokens = at.batch * at.context
        layers_ms = [sum(ms[name] for name in placement) * tokens / 1e3 for ms in (MS, HOST_MS)]
        values = {
            "tpot_ms": step_ms, "ttft_ms": max(layers_ms), "cache": 1e3 * full, "memory": 1e6 + 1e3 * full,
            "j_per_token": step_ms / 1e3,
        }  # fmt: skip
        return values[metric]


class SyntheticObjective:
    """Loss 3 + what every replaced layer costs, with a saving where neighbours are both replaced."""

    text, settings, dtype = "kl", "search/8x32/made-up", "bfloat16"
    store: ScoreStore
    limits: tuple[Limit, ...] = ()

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
        self.costs = SyntheticCosts()

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
        limits = [limit for limit in self.limits if limit.workload is None]
        return [
            Measured(kl.value, loss.value, loss.stderr, kl.value, sum(limit.excess(kl.value) for limit in limits))
            for kl, loss in kept
        ]

    def speed(self, placement: Placement) -> Speed:
        step_ms = 2.0 + sum(MS[name] for name in placement)
        return Speed(4 / step_ms * 1e3, 9000.0, step_ms, 1000 * placement.count("A"), "measured")

    def task_changes(self, limit: Limit, names: Sequence[str]) -> tuple[float, dict[tuple[int, str], float]]:
        return self.kl(self.space.original), dict(self.importance(names))

    def race(self, placements, keep):
        return {}

    def gates(self, base, start, counts, steps, seed):
        """Learnt on the loss, linear between the placements' corners."""
        import torch  # workers, which have no gates, start faster without

        from nasbench.evaluation.gates import learn_gates

        costs = torch.tensor([self.cost.get(key, 0.0) for key in enumerate(base)], dtype=torch.float32)
        pairs = torch.tensor(self.pair[:-1], dtype=torch.float32)

        def loss(gates, step):
            left = (1 - gates) * (costs > 0)
            return (left * costs).sum() + (pairs * left[:-1] * left[1:]).sum()

        return learn_gates(loss, start, self.space.may_be_full, counts, steps)

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
    objective.limits = tuple(options.get("limits", ()))
    return Session(folder, objective, Options(**options))
