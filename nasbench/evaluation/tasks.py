"""What a task is, and the two that need only text: held-out loss and KL to the teacher.

A task is written `name`, `name@length` or `name:argument`. To add one, write its class and register it here, or
under the entry-point group `nasbench.tasks`. A task that reads given texts lays them out as a `Reading`, so that
placements which share their first layers share those layers' work; any other task overrides `measures`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import MachineError, UserError
from nasbench.core.provenance import provenance
from nasbench.core.registry import Registry
from nasbench.core.sizes import format_size, parse_size
from nasbench.data.packing import Batch, Corpus
from nasbench.evaluation.reading import BATCH_TOKENS, Reading, read_alone
from nasbench.evaluation.scores import Scores
from nasbench.model.decoder import Decoder
from nasbench.supernet.losses import Distribution, teacher_distribution, token_losses

T = TypeVar("T")
KEPT_BYTES = 1 << 30
"""The teacher's distributions are kept up to this size: making them again costs a third of a CPU's time for a score."""


@dataclass(frozen=True)
class Context:
    """What a task may use.

    Attributes:
        teacher: the model itself; None when a checkpoint is evaluated alone.
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
        metric: what its samples are: "nats", "accuracy".
        needs_teacher: compares with the teacher, so that a checkpoint alone cannot be scored.
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def parse(cls, length: str, argument: str) -> Self:
        """From the text behind `@` and behind `:`, "" where there is none. Raises UserError."""

    @property
    @abstractmethod
    def label(self) -> str:
        """As a person writes it, e.g. `retrieval@512`."""

    @property
    def title(self) -> str:
        """The label without folders: a score's task in the store."""
        return self.label

    @abstractmethod
    def settings(self, context: Context) -> str:
        """Everything that the score depends on beside weights, placement and dtype."""

    def reading(self, decoder: Decoder, context: Context) -> Reading | None:
        """The texts that the task reads, laid out once for all decoders of this one's shape and device."""
        return None

    def measures(self, decoder: Decoder, context: Context) -> dict[str, Tensor]:
        """Samples [n] under the task's title, the same items in the same order for every decoder; what else comes
        out of the same reading under other titles."""
        self.check(context)
        reading = self.reading(decoder, context)
        assert reading is not None, f"task {self.name} overrides neither reading nor measures"
        return read_alone(decoder, reading)

    def check(self, context: Context) -> None:
        """Raises UserError where the task lacks its teacher."""
        if self.needs_teacher and context.teacher is None:
            raise UserError(f"task {self.name} needs a teacher: evaluate a run or a finalised hybrid")

    def scored_tokens(self, context: Context) -> int:
        """Tokens of the longest text that a sample looks back over."""
        return context.corpus.sequence

    def larger(self) -> Task | None:
        """A task whose samples include this one's; `pick` takes them out."""
        return None

    def pick(self, samples: NDArray[np.float64]) -> NDArray[np.float64]:
        """This task's samples out of those of `larger`."""
        return samples

    def scores(self, samples: Tensor, title: str = "", context: Context | None = None, device: object = "") -> Scores:
        """Of the samples that `measures` gave under a title."""
        about = {"device": str(device), **provenance().cells("torch", "project")}
        return Scores.of(samples.double().cpu().numpy(), self.metric, self.higher_is_better, about)

    def all_scores(self, decoder: Decoder, context: Context) -> dict[str, Scores]:
        """Every measure of the task, by title. Raises MachineError for one that is not finite, naming the layer."""
        measures = self.measures(decoder, context)
        found = {title: self.scores(samples, title, context, decoder.device) for title, samples in measures.items()}
        if not all(math.isfinite(scores.value) for scores in found.values()):
            batch = context.corpus.batch(0, 1, 0).to(decoder.device)
            layer = decoder.nonfinite_layer(batch.tokens, batch.documents) or "the head"
            raise MachineError(f"task {self.label} is not finite: {layer} gives such numbers in {decoder.dtype}")
        return found

    def score(self, decoder: Decoder, context: Context) -> Scores:
        """Measured now, and kept nowhere. Raises as `all_scores`."""
        return self.all_scores(decoder, context)[self.title]


TASKS: Registry[type[Task]] = Registry("task", group="nasbench.tasks")


def task_names() -> list[str]:
    """Every registered task."""
    # Registered by their own modules, which import this one.
    from nasbench.evaluation import agreement, retrieval, ruler, suite  # noqa: F401

    return list(TASKS)


def parse_task(text: str) -> Task:
    """`loss`, `retrieval@512`, `mc:questions.jsonl`, or a name that lm-evaluation-harness knows -> the task. Raises
    UserError naming the legal ones."""
    task_names()
    head, _, argument = text.strip().partition(":")
    name, _, length = head.partition("@")
    if name not in TASKS:
        from nasbench.evaluation.harness import HarnessTask

        return HarnessTask.of(name, length, argument)
    return TASKS[name].parse(length, argument)


def parse_tasks(text: str) -> list[Task]:
    """A comma-separated list of tasks, repeats dropped. Raises UserError when it is empty."""
    tasks = {part.strip(): parse_task(part) for part in text.split(",") if part.strip()}
    if not tasks:
        raise UserError(f"no task in {text!r}: choose from {', '.join(task_names())}")
    return list(tasks.values())


def parse_length(name: str, length: str, default: int) -> int:
    """The token count behind `@`."""
    try:
        return parse_size(length) if length else default
    except UserError as error:
        raise UserError(f"task {name}@{length}: {error}") from None


class HeldOut(Reading):
    """Loss, and KL where there is a teacher, of the rows of a split."""

    def __init__(self, context: Context, device: torch.device) -> None:
        sequences = context.corpus.held_out(context.split, context.tokens).to(device)
        self.batches = sequences.split(max(1, BATCH_TOKENS.of(device) // context.corpus.sequence))
        self.teacher = context.teacher
        self._said: dict[int, Tensor | Distribution] = {}

    def read(self, decoder: Decoder, index: int, hidden: Tensor) -> tuple[Tensor, ...]:
        batch = self.batches[index]
        reference = self._teacher_says(self.teacher, index, batch) if self.teacher is not None else None
        nll, kl = token_losses(hidden, batch.tokens, decoder.head_weight, reference)
        return tuple(batch.per_row(values) for values in (nll, kl) if values is not None)

    def samples(self, parts: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
        return dict(zip((HeldOutLoss.name, TeacherKL.name), columns, strict=False))

    def _teacher_says(self, teacher: Decoder, index: int, batch: Batch) -> Tensor | Distribution:
        """The teacher's distribution while there is room, else its final hidden states, from which its logits are made
        again chunk by chunk."""
        if index not in self._said:
            hidden, weight = teacher.hidden_by_layer(batch.tokens, batch.documents), teacher.head_weight
            kept = sum(said.p.nbytes for said in self._said.values() if isinstance(said, Distribution))
            fits = kept + batch.tokens.numel() * len(weight) * 4 <= KEPT_BYTES
            self._said[index] = teacher_distribution(hidden, weight) if fits else hidden
        return self._said[index]


class HeldOutLoss(Task):
    """Mean next-token loss, nats a token."""

    name = "loss"
    metric = "nats"
    higher_is_better = False

    @classmethod
    def parse(cls, length: str, argument: str) -> Self:
        if length or argument:
            raise UserError(f"task {cls.name} takes no arguments: write {cls.name}")
        return cls()

    @property
    def label(self) -> str:
        return self.name

    def settings(self, context: Context) -> str:
        batch = context.corpus.held_out(context.split, context.tokens)
        count, length = batch.tokens.shape
        apart = "" if batch.ages is None else "/apart"
        return f"{context.split}/{count}x{format_size(length)}/{context.corpus.fingerprint[:8]}{apart}"

    def reading(self, decoder: Decoder, context: Context) -> HeldOut:
        self.check(context)
        key = ("held out", context.split, context.tokens, context.teacher is None, decoder.device)
        return context.once(key, lambda: HeldOut(context, decoder.device))

    def scored_tokens(self, context: Context) -> int:
        batch = context.corpus.held_out(context.split, context.tokens)
        return batch.tokens.shape[1] if batch.ages is None else int(batch.ages.max()) + 1


class TeacherKL(HeldOutLoss):
    """Mean KL(teacher || model) over the vocabulary, nats a token."""

    name = "kl"
    needs_teacher = True


TASKS.register(HeldOutLoss.name, HeldOutLoss)
TASKS.register(TeacherKL.name, TeacherKL)
