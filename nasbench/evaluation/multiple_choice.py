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

import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench.backbone.decoder import Decoder
from nasbench.errors import UserError
from nasbench.evaluation.score import Score
from nasbench.evaluation.tasks import BATCH_TOKENS, TASKS, Context, Task, summarise
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


@torch.inference_mode()
def log_likelihoods(decoder: Decoder, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """log p(continuation | context) of token id lists, in nats. A context that is too long loses its beginning."""
    longest = decoder.shape.max_context
    rows = [((context + continuation)[-longest:], len(continuation)) for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    result = [0.0] * len(rows)
    start = 0
    while start < len(order):
        # Sorted by length, so the last row of a batch is its longest.
        size = 1
        while start + size < len(order) and (size + 1) * len(rows[order[start + size]][0]) <= BATCH_TOKENS:
            size += 1
        batch = order[start : start + size]
        width = len(rows[batch[-1]][0])
        # Padding stands behind the text, where causal layers never look back from it.
        tokens = torch.tensor([rows[i][0] + [0] * (width - len(rows[i][0])) for i in batch], device=decoder.device)
        hidden = decoder.hidden(tokens)
        for row, i in enumerate(batch):
            ids, count = rows[i]
            count = min(count, len(ids) - 1)
            place = slice(len(ids) - 1 - count, len(ids) - 1)
            log_p = F.log_softmax(decoder.logits(hidden[row, place]).float(), -1)
            result[i] = float(log_p.gather(-1, tokens[row, len(ids) - count : len(ids), None]).sum())
        start += size
    return result


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

    def score(self, decoder: Decoder, context: Context) -> Score:
        questions = read_questions(self.path)
        encode = context.tokenizer.encode
        pairs = []
        for question in questions:
            prefix = encode(question.query) or [context.tokenizer.eos_id or 0]
            for choice in question.choices:
                # Tokenised together: a choice's first token usually holds the space before it.
                together = encode(question.query + choice)
                tail = together[len(prefix) :] if together[: len(prefix)] == prefix else encode(choice)
                pairs.append((prefix, tail or encode(choice)))
        values = iter(log_likelihoods(decoder, pairs))
        correct = []
        for question in questions:
            scores = [
                next(values) / (max(1, len(choice.encode())) if self.normalised else 1) for choice in question.choices
            ]
            correct.append(float(max(range(len(scores)), key=scores.__getitem__) == question.gold))
        return summarise(self.label, "accuracy", Tensor(correct), True)


@dataclass(frozen=True)
class PlainMultipleChoice(MultipleChoice):
    """Without length normalisation."""

    normalised: ClassVar[bool] = False
    name: ClassVar[str] = "mc-plain"


for _task in (MultipleChoice, PlainMultipleChoice):
    TASKS.register(_task.name, _task)
