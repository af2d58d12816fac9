"""Multiple choice from JSONL: `{"query": ..., "choices": [...], "gold": index}` a line.

The answer is the choice with the highest log-likelihood behind the query, divided by its length in bytes (`mc`), or
undivided (`mc-plain`), as evaluation harnesses do.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor

from nasbench.backbone.decoder import Decoder
from nasbench.backbone.tokenizer import Tokenizer
from nasbench.errors import UserError
from nasbench.evaluation.reading import Text, read_ends
from nasbench.evaluation.tasks import TASKS, Context, Task
from nasbench.files import machine_errors


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


def log_likelihoods(decoder: Decoder, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """log p(continuation | context) of token id lists, in nats. A context that is too long loses its beginning."""
    ends = read_ends(decoder, [Text(context + continuation, len(continuation)) for context, continuation in pairs])
    return [float(log_p.sum()) for log_p, _ in ends]


def tokenised(tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of each pair of texts. Tokenised together, since the first token of a continuation
    usually holds the space before it; apart where the context's tokens would change."""
    pairs = []
    for (first, second), together in zip(texts, tokenizer.encode_batch([a + b for a, b in texts]), strict=True):
        prefix = tokenizer.encode(first) or [tokenizer.eos_id or 0]
        tail = together[len(prefix) :] if together[: len(prefix)] == prefix else tokenizer.encode(second)
        pairs.append((prefix, tail or tokenizer.encode(second)))
    return pairs


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
        questions = read_questions(self.path)
        texts = [(question.query, choice) for question in questions for choice in question.choices]
        pairs = context.once((self.name, self.path), lambda: tokenised(context.tokenizer, texts))
        values = iter(log_likelihoods(decoder, pairs))
        correct = []
        for question in questions:
            scores = [
                next(values) / (max(1, len(choice.encode())) if self.normalised else 1) for choice in question.choices
            ]
            correct.append(float(max(range(len(scores)), key=scores.__getitem__) == question.gold))
        return Tensor(correct)


@dataclass(frozen=True)
class PlainMultipleChoice(MultipleChoice):
    """Without length normalisation."""

    normalised: ClassVar[bool] = False
    name: ClassVar[str] = "mc-plain"


for _task in (MultipleChoice, PlainMultipleChoice):
    TASKS.register(_task.name, _task)
