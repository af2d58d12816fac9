"""Multiple choice from JSONL: `{"query": ..., "choices": [...], "gold": index}` a line.

The answer is the choice with the highest log-likelihood behind the query, divided by its length in bytes (`mc`), or
undivided (`mc-plain`), as evaluation harnesses do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import UserError
from nasbench.core.files import machine_errors
from nasbench.evaluation.reading import Ends, Text, read_ends
from nasbench.evaluation.tasks import TASKS, Context, Task
from nasbench.model.decoder import Decoder


@dataclass(frozen=True)
class Question:
    query: str
    choices: tuple[str, ...]
    gold: int


def read_questions(path: Path) -> list[Question]:
    """Raises UserError with file and line for a bad question, and for a file without any."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    questions = []
    with machine_errors(f"reading {path}"):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            question = Question(data["query"], tuple(data["choices"]), data["gold"])
            texts = (question.query, *question.choices)
            if not all(isinstance(text, str) for text in texts) or not all(question.choices):
                raise TypeError("query and choices must be texts")
            if type(question.gold) is not int or not 0 <= question.gold < len(question.choices) >= 2:
                raise TypeError("gold must be the index of one of at least 2 choices")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a question {{query, choices, gold}}: {error}") from None
        questions.append(question)
    if not questions:
        raise UserError(f"{path} holds no question")
    return questions


def log_likelihoods(decoder: Decoder, ends: Ends) -> np.ndarray:
    """log p of each text's end behind what stands before it, in nats, [texts] fp64."""
    log_p, _ = read_ends(decoder, ends)
    return ends.sums(log_p)


def tokenised(tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of each pair of texts. Tokenised together, since the first token of a continuation
    usually holds the space before it; apart where the context's tokens would change."""
    # Alternatives of one question mostly share its text.
    firsts = list(dict.fromkeys(first for first, _ in texts))
    prefixes = dict(zip(firsts, tokenizer.encode_batch(firsts), strict=True))
    pairs = []
    for (first, second), together in zip(texts, tokenizer.encode_batch([a + b for a, b in texts]), strict=True):
        prefix = prefixes[first] or [tokenizer.eos_id or 0]
        tail = together[len(prefix) :] if together[: len(prefix)] == prefix else tokenizer.encode(second)
        pairs.append((prefix, tail or tokenizer.encode(second)))
    return pairs


@dataclass(frozen=True)
class Choices:
    """Questions laid out once, to be asked of many decoders.

    Attributes:
        ends: all alternatives, those of one question beside each other.
        count: alternatives of each question, [questions] int64.
        weight: what an alternative's log-likelihood is divided by, [alternatives] float64.
        gold: the right alternative of each question, [questions] int64.
    """

    ends: Ends
    count: np.ndarray
    weight: np.ndarray
    gold: np.ndarray

    def correct(self, decoder: Decoder) -> tuple[Tensor, Tensor]:
        """1 where the right alternative is the likeliest, divided and undivided, [questions] fp32 each; of equally
        likely ones the first counts."""
        plain = np.asarray(log_likelihoods(decoder, self.ends))
        table = np.full((len(self.count), self.count.max()), -np.inf)
        there = np.arange(table.shape[1]) < self.count[:, None]
        found = []
        for values in (plain / self.weight, plain):
            table[there] = values
            found.append(torch.from_numpy(table.argmax(1) == self.gold).float())
        return found[0], found[1]


def lay_out(
    decoder: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[tuple[Sequence[tuple[str, str]], int]],
    weight: Callable[[str], int],
) -> Choices:
    """Questions for decoders of this one's context and device.

    Args:
        questions: alternatives as (context, continuation), and which is right.
        weight: of a continuation, what its log-likelihood is divided by.
    """
    pairs = [pair for alternatives, _ in questions for pair in alternatives]
    texts = [Text(first + second, len(second)) for first, second in tokenised(tokenizer, pairs)]
    return Choices(
        ends=Ends(texts, decoder.shape.max_context, decoder.device),
        count=np.array([len(alternatives) for alternatives, _ in questions]),
        weight=np.array([weight(continuation) for _, continuation in pairs], np.float64),
        gold=np.array([gold for _, gold in questions]),
    )


@dataclass(frozen=True)
class MultipleChoice(Task):
    """Accuracy over the questions of a file."""

    path: Path
    normalised: ClassVar[bool] = True
    name: ClassVar[str] = "mc"

    @classmethod
    def parse(cls, length: str, argument: str) -> Self:
        if length or not argument:
            raise UserError(f"task {cls.name} needs its questions: write {cls.name}:FILE.jsonl")
        return cls(Path(argument))

    @property
    def label(self) -> str:
        return f"{self.name}:{self.path}"

    def key(self, context: Context) -> str:
        read_questions(self.path)
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    def values(self, decoder: Decoder, context: Context) -> Tensor:
        def ask() -> Choices:
            questions = [([(q.query, choice) for choice in q.choices], q.gold) for q in read_questions(self.path)]
            return lay_out(decoder, context.tokenizer, questions, lambda choice: max(1, len(choice.encode())))

        # Both forms of the task read the same.
        key = (MultipleChoice.name, self.path, decoder.shape.max_context, decoder.device)
        by_byte, plain = context.once(key, ask).correct(decoder)
        return by_byte if self.normalised else plain


@dataclass(frozen=True)
class PlainMultipleChoice(MultipleChoice):
    """Without length normalisation."""

    normalised: ClassVar[bool] = False
    name: ClassVar[str] = "mc-plain"


for _task in (MultipleChoice, PlainMultipleChoice):
    TASKS.register(_task.name, _task)
