"""The settings of a distillation: a frozen dataclass, optionally read from a TOML file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nasbench.core.errors import UserError, unknown
from nasbench.core.files import read_toml
from nasbench.model import MIXERS


def kinds_that_start_trained() -> tuple[str, ...]:
    """The letters of the kinds for which the attention's own weights serve unchanged."""
    return tuple(letter for letter in MIXERS if MIXERS[letter].starts_trained)


FULL_SCHEDULES = ("uniform", "falling")


@dataclass(frozen=True)
class DistillConfig:
    """How the supernet is trained. Budgets are in tokens, so that the result does not depend on the machine's speed.

    Attributes:
        ridge_tokens: tokens for the closed-form solution of every output projection, before and after alignment.
        ridge: strength of the pull to the present projection, relative to the mean energy of the features.
        align_tokens: tokens of block-wise alignment to the attention's outputs.
        supernet_tokens: tokens of random sub-networks trained by distillation.
        align_batch_tokens, supernet_batch_tokens: tokens of a step (rounded to whole sequences, at least one).
        align_lr, supernet_lr: peak learning rates of AdamW; cosine to a tenth after a linear warm-up.
        warmup: share of a stage's steps that warm up.
        clip: largest gradient norm of one mixer; each is clipped alone.
        frozen: letters of the mixers that are not trained; by default those whose weights are the attention's.
        solved: letters of frozen mixers whose output projection is solved in closed form all the same. A window shorter
            than the row misses the attention's first tokens, into which much of its weight sinks. SmolLM2-135M in W64,
            rows of 256, KL to the model: 0.38 solved, 0.91 not; with 4 layers of attention 0.35 and 0.89.
        transfer: mixers start from the attention's weights where shapes allow; false: random, for comparison.
        least_full, most_full: shares of the layers between which the sampled number of full-attention layers varies.
        full_schedule: `uniform`, or `falling`: `most_full` falls to `least_full` in the course of the stage.
        smallest_every: every so many steps of random sub-networks train the smallest one; 0 for none.
        sandwich: every step trains the smallest sub-network beside the sampled one.
        hidden_weight: weight of the relative L2 loss on the last hidden state beside the KL.
        whole: finalising trains every weight of the layers from the first replaced one on, on copies of MLPs, norms and
            the attention that stays; false: the replaced mixers alone. Alignment and supernet never train them:
            sub-networks share those weights.
        whole_rate: learning rate of what is trained beside the mixers, as a share of theirs: these weights fit already.
        kl_chunk: tokens whose logits are held at once.
        documents: keeps documents apart that share a row: no attention, state or convolution crosses their border.
        repeat_share: share of the training rows that end, for a quarter of their length, with a passage of their first
            half; not with documents. Ordinary text hardly needs what stood far before. SmolLM2-135M, windows of 256, 4
            layers of attention, 131 thousand tokens of finalising on a CPU; values found in 1024 tokens, of 48: 26 with
            0.5, 10 with 0, 5 before, 32 the model itself. KL on text: 0.147 and 0.134.
        recompute: the backward pass computes the student's activations again: slower, less memory.
        graphs: on a GPU every layer of a sub-network is replayed from CUDA graphs: fewer launches, more memory.
        shard: the processes that torchrun started share weights, gradients and moments, for models that one card does
            not hold (nasbench.parallel.fsdp); false: each process holds all. Not with graphs.
        log_every: steps between two rows of losses.csv.
        checkpoint_every_s: seconds between two checkpoints.
        tensorboard: also writes losses and speed for TensorBoard.
    """

    ridge_tokens: int = 8192
    ridge: float = 0.1
    align_tokens: int = 24576
    supernet_tokens: int = 8192
    align_batch_tokens: int = 256
    supernet_batch_tokens: int = 512
    align_lr: float = 2e-3
    supernet_lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    frozen: tuple[str, ...] = field(default_factory=kinds_that_start_trained)
    solved: tuple[str, ...] = field(default_factory=kinds_that_start_trained)
    transfer: bool = True
    least_full: float = 0.0
    most_full: float = 0.6
    full_schedule: str = "uniform"
    smallest_every: int = 4
    sandwich: bool = False
    hidden_weight: float = 0.0
    whole: bool = False
    whole_rate: float = 0.2
    kl_chunk: int = 512
    documents: bool = True
    repeat_share: float = 0.0
    recompute: bool = False
    graphs: bool = False
    shard: bool = False
    log_every: int = 10
    checkpoint_every_s: float = 120.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            name, kind, value = each.name, str(each.type), getattr(self, each.name)
            if kind.startswith("tuple"):
                if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
                    raise UserError(f'bad {name} {value!r}: write a list of letters, as ["W"]')
                object.__setattr__(self, name, tuple(value))
            elif kind == "bool":
                if not isinstance(value, bool):
                    raise UserError(f"bad {name} {value!r}: write true or false")
            elif kind in ("int", "float"):
                if isinstance(value, bool) or not isinstance(value, int if kind == "int" else (int, float)):
                    raise UserError(f"bad {name} {value!r}: write a {'whole ' if kind == 'int' else ''}number")
                least = 1 if name.endswith(("batch_tokens", "chunk", "log_every")) else 0
                if not value >= least:
                    raise UserError(f"bad {name} {value!r}: at least {least}")
        if self.full_schedule not in FULL_SCHEDULES:
            raise unknown("full_schedule", self.full_schedule, FULL_SCHEDULES)
        if self.repeat_share > 1:
            raise UserError(f"bad repeat_share {self.repeat_share}: a share of the rows, 0 to 1")
        if not 0 <= self.least_full <= self.most_full <= 1:
            raise UserError(f"bad least_full {self.least_full}, most_full {self.most_full}: 0 <= least <= most <= 1")
        if self.shard and self.graphs:
            raise UserError("shard and graphs exclude each other: the layers' weights move; set one of them to false")

    @classmethod
    def read(cls, path: Path, base: DistillConfig | None = None) -> DistillConfig:
        """The settings `base`, by default cls(), changed by a TOML file whose keys are the attributes. Raises UserError
        for an unknown key or a bad value."""
        return (base or cls()).updated(read_toml(path))

    def updated(self, changes: dict[str, Any]) -> DistillConfig:
        """With some attributes changed. Raises UserError for one that does not exist."""
        for key in changes:
            if key not in self.__dataclass_fields__:
                raise unknown("setting", key, self.__dataclass_fields__)
        return replace(self, **changes)
