"""Stage 4 of PostNAS (arXiv 2508.15884): dimensions of a recurrent layer that cost alike. The paper holds the cache
constant and finds that tokens/s hardly move while parameters and accuracy do (its Table 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from nasbench.core.errors import UserError, unknown
from nasbench.model.shapes import ModelSpec
from nasbench.model.spec import MIXERS, Dims, MixerSpec
from nasbench.search.storage import open_study
from nasbench.spaces.placement import Placement, with_kind
from nasbench.spaces.space import Space

SAME = ("cache", "parameters", "latency")
VALUE_STEP, WIDEST_VALUE = 16, 4096
"""A value dimension that is not given is the multiple of the first, up to the second, that costs most alike."""
KEY_DIMS = (64, 96, 128, 192, 256)
PATIENCE = 20
"""Suggestions in a row that bring nothing new, after which Optuna has seen what there is."""
Evaluate = Callable[[str], tuple[float, float] | None]
"""(what to minimise, tokens/s) of a block's name; None where it does not keep to the constraint."""


@dataclass
class DimSpace:
    """Dimensions around those of a reference.

    Attributes:
        same: what stays, of a layer: the bytes of its cache, its parameters, or the least bytes of its decode step.
        tolerance: as a share of the reference's.
        context, batch, dtype_bytes: of the cache and the decode step.
        value_dims: () for the one that fits heads and key dimension.
    """

    reference: MixerSpec
    same: str
    tolerance: float
    context: int
    batch: int
    dtype_bytes: int
    heads: tuple[int, ...] = ()
    key_dims: tuple[int, ...] = KEY_DIMS
    value_dims: tuple[int, ...] = ()
    conv_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.same not in SAME:
            raise unknown("constraint", self.same, SAME)
        if not 0 <= self.tolerance < 1:
            raise UserError(f"bad tolerance {self.tolerance}: write a share of the reference's, as 0.02")
        if (own := self.reference.dims) is None:
            legal = [kind for kind in MIXERS if MIXERS[kind].dims is not MixerSpec.dims]
            raise unknown("layer kind with heads, key and value dimensions", self.reference.kind, legal)
        thirds = tuple(own.heads * n // 3 for n in (1, 2, 3) if own.heads * n // 3)
        self.heads, self.conv_sizes = self.heads or thirds, self.conv_sizes or (own.conv_size,)

    def amount(self, spec: MixerSpec) -> int:
        """What must stay, of one layer."""
        if self.same == "cache":
            return spec.cache_bytes(1, self.context, self.dtype_bytes)
        if self.same == "parameters":
            return spec.parameters()
        return spec.decode_bytes(self.batch, self.context, self.dtype_bytes)

    def at(self, heads: int, key_dim: int, conv_size: int, value_dim: int | None = None) -> str | None:
        """The block's name, or None where it is not within the tolerance."""
        wanted = self.amount(self.reference)
        values = range(VALUE_STEP, WIDEST_VALUE + 1, VALUE_STEP) if value_dim is None else (value_dim,)
        specs = [self.reference.resized(Dims(heads, key_dim, value, conv_size)) for value in values]
        best = min(specs, key=lambda spec: abs(self.amount(spec) - wanted))
        return name_of(best) if abs(self.amount(best) - wanted) <= self.tolerance * wanted else None

    def names(self) -> list[str]:
        """Every block within the tolerance."""
        grid = product(self.heads, self.key_dims, self.conv_sizes, self.value_dims or (None,))
        return list(dict.fromkeys(name for each in grid if (name := self.at(*each))))

    def optimise(self, goal: str, trials: int, seed: int, journal: Path, evaluate: Evaluate) -> list[str]:
        """Blocks that Optuna (TPE, two objectives) chose, up to `trials`, those of earlier calls among them.

        Args:
            goal: what `evaluate` minimises; each has a study of its own in `journal`.
        """
        import optuna

        study = open_study(f"{goal} of {name_of(self.reference)} at the same {self.same}", "", journal)
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
        choices = {"heads": self.heads, "key_dim": self.key_dims, "conv_size": self.conv_sizes}
        choices |= {"value_dim": self.value_dims} if self.value_dims else {}
        legal: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.CategoricalDistribution(values) for name, values in choices.items()
        }
        seen: dict[str | None, Sequence[float] | None] = {None: None}
        seen |= {self.at(**trial.params): trial.values for trial in study.trials if trial.values}
        idle = 0
        while sum(map(bool, seen.values())) < trials and idle < PATIENCE:
            trial = study.ask(legal)
            name = self.at(**trial.params)
            idle = idle + 1 if name in seen else 0
            if name is not None and name not in seen:
                seen[name] = evaluate(name)
            values = seen[name]
            study.tell(trial, values, None if values else optuna.trial.TrialState.FAIL)
        return [name for name, values in seen.items() if name and values]


def name_of(spec: MixerSpec) -> str:
    """A block's name in placements, all its arguments written."""
    return f"{spec.kind}@{spec.args}"


def placement_of(shape: ModelSpec, name: str, full_attention: int) -> Placement:
    """The model's own placement with this block for all of its kind; where there are none, the block in every layer but
    `full_attention` evenly spread ones. Raises UserError where these are all."""
    if name in (found := with_kind(shape.placement, name)):
        return found
    space = Space.around(shape.placement, (name,))
    if (found := space.with_full_attention(space.homogeneous(name), space.evenly(full_attention))) == shape.placement:
        raise UserError(f"{full_attention} layers of full attention leave none for {name}: choose fewer")
    return found
