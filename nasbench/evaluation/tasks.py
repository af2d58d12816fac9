"""What a task is, and the two that need only text: held-out loss and KL to the teacher.

A task is written `name`, `name@length` or `name:argument`. To add one, write its class and register it here, or
under the entry-point group `nasbench.tasks`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor

from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import UserError
from nasbench.core.registry import Registry
from nasbench.core.sizes import format_size, parse_size
from nasbench.data.packing import Corpus
from nasbench.evaluation.reading import BATCH_TOKENS
from nasbench.evaluation.score import Score
from nasbench.model.decoder import Decoder
from nasbench.supernet.forward import hidden_of
from nasbench.supernet.losses import token_losses

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What a task may use.

    Attributes:
        teacher: the full-attention model; None when a checkpoint is evaluated alone.
        split: "search" or "test": which held-out text.
        tokens: most held-out tokens to read, None for all.
        memo: what tasks made once for many decoders: tokenised questions, the teacher's answers.
    """

    tokenizer: Tokenizer
    corpus: Corpus
    teacher: Decoder | None
    split: str = "test"
    tokens: int | None = None
    memo: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returns, made on the first call with this key."""
        if key not in self.memo:
            self.memo[key] = make()
        return cast("T", self.memo[key])


class Task(ABC):
    """One way to score a decoder.

    Attributes:
        metric: what its values are: "nats", "accuracy".
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def parse(cls, length: str, argument: str) -> Self:
        """From the text behind `@` and behind `:`, "" where there is none. Raises UserError."""

    @property
    @abstractmethod
    def label(self) -> str:
        """As a person writes it, e.g. `retrieval@512`."""

    @abstractmethod
    def key(self, context: Context) -> str:
        """Everything that the score depends on beside the weights: the cache's key."""

    @abstractmethod
    def values(self, decoder: Decoder, context: Context) -> Tensor:
        """The value of every item, [n], the same items in the same order for every decoder."""

    def measures(self, decoder: Decoder, context: Context) -> dict[str, Tensor]:
        """`values` under the task's label, and what else comes out of the same reading, under `label.what`."""
        return {self.label: self.values(decoder, context)}

    def score(self, decoder: Decoder, context: Context) -> Score:
        """The mean of the values."""
        return summarise(self.label, self.metric, self.values(decoder, context), self.higher_is_better)


TASKS: Registry[type[Task]] = Registry("task", group="nasbench.tasks")


def parse_task(text: str) -> Task:
    """`loss`, `retrieval@512`, `mc:questions.jsonl` -> the task. Raises UserError naming the legal ones."""
    # Registered by their own modules, which import this one.
    from nasbench.evaluation import agreement, multiple_choice, retrieval, suite  # noqa: F401

    head, _, argument = text.strip().partition(":")
    name, _, length = head.partition("@")
    return TASKS[name].parse(length, argument)


def parse_tasks(text: str) -> list[Task]:
    """A comma-separated list of tasks, repeats dropped. Raises UserError when it is empty."""
    tasks = {part.strip(): parse_task(part) for part in text.split(",") if part.strip()}
    if not tasks:
        raise UserError(f"no task in {text!r}: choose from {', '.join(TASKS)}")
    return list(tasks.values())


def summarise(task: str, metric: str, values: Tensor, higher_is_better: bool) -> Score:
    """The mean of per-item values [n] and its standard error."""
    values = values.double()
    count = len(values)
    stderr = float(values.std(correction=1)) / math.sqrt(count) if count > 1 else math.nan
    return Score(task, metric, float(values.mean()), stderr, count, higher_is_better)


def refuse_arguments(name: str, length: str, argument: str) -> None:
    """Raises UserError for a task that takes neither `@length` nor `:argument`."""
    if length or argument:
        raise UserError(f"task {name} takes no arguments: write {name}")


def parse_length(name: str, length: str, default: int) -> int:
    """The token count behind `@`."""
    try:
        return parse_size(length) if length else default
    except UserError as error:
        raise UserError(f"task {name}@{length}: {error}") from None


class _HeldOut(Task):
    """Over the held-out sequences of the corpus."""

    metric = "nats"
    higher_is_better = False

    @classmethod
    def parse(cls, length: str, argument: str) -> Self:
        refuse_arguments(cls.name, length, argument)
        return cls()

    @property
    def label(self) -> str:
        return self.name

    def key(self, context: Context) -> str:
        return held_out_key(context)

    @torch.inference_mode()
    def values(self, decoder: Decoder, context: Context) -> Tensor:
        if self.name == "kl" and context.teacher is None:
            raise UserError("task kl needs a teacher: evaluate a run, not a checkpoint alone")
        sequences = context.corpus.held_out(context.split, context.tokens).to(decoder.device)
        values = []
        for batch in sequences.split(max(1, BATCH_TOKENS[decoder.device.type] // context.corpus.sequence)):
            reference = hidden_of(context.teacher, batch) if self.name == "kl" and context.teacher else None
            nll, kl = token_losses(hidden_of(decoder, batch), batch.tokens, decoder.head_weight, reference)
            values.append(batch.per_row(nll if kl is None else kl))
        return torch.cat(values).cpu()


class HeldOutLoss(_HeldOut):
    """Mean next-token loss, nats a token."""

    name = "loss"


class TeacherKL(_HeldOut):
    """Mean KL(teacher || model) over the vocabulary, nats a token."""

    name = "kl"


def held_out_key(context: Context) -> str:
    """Which held-out text a loss was measured on, and whether its documents were kept apart."""
    batch = context.corpus.held_out(context.split, context.tokens)
    count, length = batch.tokens.shape
    apart = "" if batch.ages is None else "/apart"
    return f"{context.split}/{count}x{format_size(length)}/{context.corpus.fingerprint[:8]}{apart}"


TASKS.register(HeldOutLoss.name, HeldOutLoss)
TASKS.register(TeacherKL.name, TeacherKL)
