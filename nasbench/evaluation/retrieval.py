"""Key-value retrieval with a length dial: a generated text of `@length` tokens hides facts of one form among ordinary
prose, then asks for one of them. Greedy decoding must give the whole value.

What full attention does and a state of constant size does not: loss on ordinary text hardly shows it.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench.core.errors import UserError
from nasbench.core.sizes import format_size, is_count
from nasbench.evaluation.reading import Ends, Text
from nasbench.evaluation.tasks import TASKS, Context, Task, parse_length
from nasbench.model.decoder import Decoder

NAMES = (
    "Alice", "Brian", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "James", "Karen", "Louis", "Maria",
    "Nathan", "Olivia", "Peter", "Rachel", "Simon", "Teresa", "Victor", "Wendy", "Walter", "Julia", "Oscar",
)  # fmt: skip
ITEMS = 32
"""Questions of one score."""
FACT_TOKENS = 64
"""One fact for about this many tokens of the text."""
_SHORTEST = 64
VERSION = {"test": "v2", "search": "v3"}
"""Of the questions of a split."""


@dataclass(frozen=True)
class Item:
    """A prompt and the answer that must follow it, as token ids."""

    prompt: list[int]
    answer: list[int]


class AnswerEnds(Ends):
    """The answers, each behind its prompt."""

    def judge(self, log_p: np.ndarray, right: np.ndarray) -> dict[str, Tensor]:
        # Greedy decoding gives an answer exactly if each of its tokens is the first choice behind those before it.
        return {self.title: torch.from_numpy(self.sums(~right) == 0).float()}


@dataclass(frozen=True)
class Generated(Task):
    """A task whose texts are made, as long as asked.

    Attributes:
        length: tokens of prompt and answer together.
        items: questions, each with its own text.
    """

    length: int = 512
    items: int = ITEMS

    @classmethod
    def parse(cls, length: str, argument: str) -> Self:
        tokens = parse_length(cls.name, length, cls.length)
        if tokens < _SHORTEST:
            raise UserError(f"task {cls.name}@{length}: at least {_SHORTEST} tokens")
        if argument and not (is_count(argument) and int(argument) > 0):
            raise UserError(f"bad number of items {argument!r}: write {cls.name}@{length or cls.length}:ITEMS")
        return cls(tokens, int(argument) if argument else ITEMS)

    @property
    def label(self) -> str:
        return f"{self.name}@{format_size(self.length)}" + (f":{self.items}" if self.items != ITEMS else "")

    def reading(self, decoder: Decoder, context: Context) -> Ends:
        self.check(context)
        longest = decoder.shape.max_context
        if self.length > longest:
            raise UserError(f"task {self.label}: {decoder.shape.name} has a context of {longest}")
        key = self, context.split, longest, decoder.device
        return context.once(key, lambda: self.lay_out(longest, decoder.device, context))

    @abstractmethod
    def lay_out(self, longest: int, device: torch.device, context: Context) -> Ends:
        """The texts as this task reads them."""

    def scored_tokens(self, context: Context) -> int:
        return self.length


@dataclass(frozen=True)
class Retrieval(Generated):
    """Accuracy of greedy retrieval."""

    name: ClassVar[str] = "retrieval"

    def settings(self, context: Context) -> str:
        version = VERSION[context.split] + ("" if context.tokenizer.bos_id is None else "+bos")
        return f"{version}/{context.split}/{self.items}/{context.corpus.fingerprint[:8]}"

    def lay_out(self, longest: int, device: torch.device, context: Context) -> Ends:
        items = make_items(context, self.length, self.items)
        return self.ends([Text(i.prompt + i.answer, len(i.answer)) for i in items], longest, device, context)

    def ends(self, texts: Sequence[Text], longest: int, device: torch.device, context: Context) -> Ends:
        return AnswerEnds(texts, longest, device, title=self.title)


class AnswerKLEnds(AnswerEnds):
    """KL to the teacher over each answer's tokens."""

    def __init__(self, texts: Sequence[Text], longest: int, device: torch.device, title: str, teacher: Decoder) -> None:
        super().__init__(texts, longest, device, title=title)
        self.teacher = teacher
        self._said: dict[int, Tensor] = {}

    def read(self, decoder: Decoder, index: int, hidden: Tensor) -> tuple[Tensor, ...]:
        if index not in self._said:
            batch = self.batches[index]
            hidden_states = self.teacher.hidden_by_layer(batch.tokens, batch.documents)
            self._said[index] = self._log_p(self.teacher, index, hidden_states)
        target = self._said[index]
        return (torch.linalg.vecdot(target.exp(), target - self._log_p(decoder, index, hidden)),)

    def _log_p(self, decoder: Decoder, index: int, hidden: Tensor) -> Tensor:
        """Log-probabilities [M, V] fp32 of the answers' tokens."""
        return F.log_softmax(decoder.logits(self.before(index, hidden)), -1, dtype=torch.float32)

    def samples(self, parts: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        (kl,) = self.columns(parts)
        return {self.title: torch.from_numpy(self.sums(kl) / self.counts).float()}


@dataclass(frozen=True)
class RetrievalKL(Retrieval):
    """KL(teacher || model) over the answers, nats a token: moves smoothly where few answers are right or wrong."""

    name: ClassVar[str] = "retrieval-kl"
    metric: ClassVar[str] = "nats"
    higher_is_better: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True

    def ends(self, texts: Sequence[Text], longest: int, device: torch.device, context: Context) -> Ends:
        assert context.teacher is not None
        return AnswerKLEnds(texts, longest, device, self.title, context.teacher)


def make_items(context: Context, length: int, count: int) -> list[Item]:
    """`count` items over the context's split, whose prompt and answer are `length` tokens at most, and all but a few of
    them. A search sees other questions than a report."""
    encode, first = context.tokenizer.encode, begin(context)
    rows = context.corpus.held_out(context.split).tokens.numpy()
    seed = 0 if context.split == "test" else context.split
    items = [
        _make_item(encode, rows, length - len(first), random.Random(f"{seed}/{index}/{length}"))
        for index in range(count)
    ]
    return [Item(first + item.prompt, item.answer) for item in items]


def begin(context: Context) -> list[int]:
    """The token that begins every text, where the model was trained with one."""
    bos = context.tokenizer.bos_id
    return [] if bos is None else [bos]


def _make_item(encode: Callable[[str], list[int]], rows: np.ndarray, length: int, generator: random.Random) -> Item:
    facts_count = max(2, min(len(NAMES), length // FACT_TOKENS))
    names = generator.sample(NAMES, facts_count)
    values = [str(generator.randrange(1000, 10_000)) for _ in names]
    facts = [encode(f"\nThe secret number of {name} is {value}.\n") for name, value in zip(names, values, strict=True)]
    asked = generator.randrange(facts_count)
    question = encode(f"\nThe secret number of {names[asked]} is")
    answer = encode(f" {values[asked]}")
    room = length - len(question) - len(answer) - sum(map(len, facts))
    prompt: list[int] = []
    for index, fact in enumerate(facts):
        size = max(0, room * (index + 1) // facts_count - room * index // facts_count)
        prompt += prose(rows, size, generator) + fact
    return Item(prompt + question, answer)


def prose(rows: np.ndarray, size: int, generator: random.Random) -> list[int]:
    """`size` tokens of ordinary text [rows, T] from a random place; the first row follows the last.

    An array and no tensor: where cores are busy, indexing a tensor waits for torch's threads, 50 times longer than it
    copies these few tokens.
    """
    row, column = generator.randrange(rows.shape[0]), generator.randrange(rows.shape[1])
    start = row * rows.shape[1] + column
    return rows.ravel()[np.arange(start, start + size) % rows.size].tolist()


for _task in (Retrieval, RetrievalKL):
    TASKS.register(_task.name, _task)
