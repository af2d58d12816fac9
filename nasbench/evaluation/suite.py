"""A benchmark from JSONL, its form read from its keys:

    {"query", "choices", "gold"}      the likeliest " " + choice behind the query, for its length in bytes
    {"prefixes", "suffix", "gold"}    the prefix behind which " " + suffix is likeliest
    {"query", "answers"}              one line written greedily: right if one of the answers occurs in it, case-blind

`suite:FILE.jsonl` reads all items, `suite@200:FILE.jsonl` 200 of them, evenly spread over the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.errors import UserError
from nasbench.core.files import machine_errors
from nasbench.evaluation.multiple_choice import Choices, lay_out
from nasbench.evaluation.reading import Prompts, greedy
from nasbench.evaluation.tasks import TASKS, Context, Task, parse_length
from nasbench.model.decoder import Decoder

ANSWER_TOKENS = 24
"""Longest line that is written as an answer."""
FORMS = ({"query", "choices", "gold"}, {"prefixes", "suffix", "gold"}, {"query", "answers"})


@dataclass(frozen=True)
class SuiteItem:
    """One item: its alternatives as (context, continuation), of which `gold` is right, or a query and its answers."""

    alternatives: tuple[tuple[str, str], ...] = ()
    gold: int = 0
    query: str = ""
    answers: tuple[str, ...] = ()


def _item(data: Any) -> SuiteItem:
    """Raises KeyError, TypeError or ValueError for what is none of the forms."""
    keys = set(data) if isinstance(data, dict) else set()
    form = next((form for form in FORMS if form <= keys), None)
    if form is None:
        raise TypeError("the keys must be " + " or ".join(", ".join(sorted(form)) for form in FORMS))
    lists = data.get("choices") or data.get("prefixes") or data.get("answers")
    texts = [*lists, data.get("query", ""), data.get("suffix", "")] if isinstance(lists, list) else [None]
    if not all(isinstance(text, str) for text in texts) or not lists or not all(lists):
        raise TypeError("texts, and lists of texts that are not empty")
    if "answers" in form:
        return SuiteItem(query=data["query"], answers=tuple(data["answers"]))
    pairs = [(data["query"], f" {choice}") for choice in data.get("choices", ())]
    pairs = pairs or [(prefix, f" {data['suffix']}") for prefix in data["prefixes"]]
    if type(data["gold"]) is not int or not 0 <= data["gold"] < len(pairs) >= 2:
        raise TypeError("gold must be the index of one of at least 2 alternatives")
    return SuiteItem(tuple(pairs), data["gold"])


def read_items(path: Path) -> list[SuiteItem]:
    """Raises UserError with file and line for a bad item, for items of both kinds, and for a file without any."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    with machine_errors(f"reading {path}"):
        lines = path.read_bytes().splitlines()
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line)))
            if bool(items[-1].answers) != bool(items[0].answers):
                raise TypeError("some items ask for a choice, some for an answer")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not an item of a benchmark: {error}") from None
    if not items:
        raise UserError(f"{path} holds no item")
    return items


def evenly(count: int, total: int) -> list[int]:
    """Indexes of `count` of `total` items, evenly spread; all of them where there are fewer."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def chance(items: list[SuiteItem]) -> float:
    """What guessing scores."""
    return sum(1 / len(item.alternatives) if item.alternatives else 0.0 for item in items) / len(items)


@dataclass(frozen=True)
class Suite(Task):
    """Accuracy over the items of a file.

    Attributes:
        limit: how many of them, 0 for all.
    """

    path: Path
    limit: int = 0
    name: ClassVar[str] = "suite"

    @classmethod
    def parse(cls, length: str, argument: str) -> Self:
        if not argument:
            raise UserError(f"task {cls.name} needs its items: write {cls.name}:FILE.jsonl")
        return cls(Path(argument), parse_length(cls.name, length, 0))

    @property
    def label(self) -> str:
        return f"{self.name}{f'@{self.limit}' if self.limit else ''}:{self.path}"

    def key(self, context: Context) -> str:
        read_items(self.path)
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    def items(self) -> list[SuiteItem]:
        """Those that are asked."""
        items = read_items(self.path)
        return [items[i] for i in evenly(self.limit or len(items), len(items))]

    def values(self, decoder: Decoder, context: Context) -> Tensor:
        return self.measures(decoder, context)[self.label]

    def measures(self, decoder: Decoder, context: Context) -> dict[str, Tensor]:
        items = context.once(self, self.items)
        if items[0].answers:
            return {self.label: self._written(items, decoder, context)}

        def ask() -> Choices:
            questions = [(item.alternatives, item.gold) for item in items]
            # The space that stands before a continuation is not counted.
            return lay_out(decoder, context.tokenizer, questions, lambda text: len(text.encode()) - 1)

        choices = context.once((self, decoder.shape.max_context, decoder.device), ask)
        by_byte, plain = choices.correct(decoder)
        return {self.label: by_byte, f"{self.label}.plain": plain}

    def _written(self, items: list[SuiteItem], decoder: Decoder, context: Context) -> Tensor:
        tokenizer, device = context.tokenizer, decoder.device
        ends = context.once(("line ends", device), lambda: line_ends(tokenizer).to(device))
        queries = [item.query for item in items]
        prompts = context.once((self, device), lambda: Prompts(tokenizer.encode_batch(queries), device))
        # Placements of one model write much the same: what the last one wrote is the first guess.
        memory: dict[str, list[list[int]]] = context.once((self, "lines"), dict)
        lines = greedy(decoder, prompts, ANSWER_TOKENS, ends, memory.get("lines", ()))
        memory["lines"] = lines
        texts = [tokenizer.decode(line).lower() for line in lines]
        hits = [any(a.lower() in text for a in item.answers) for item, text in zip(items, texts, strict=True)]
        return Tensor([float(hit) for hit in hits])


def line_ends(tokenizer: Tokenizer) -> Tensor:
    """Tokens that end a line: those with a newline in them, and those that end a text."""
    size = tokenizer.vocab_size
    broken = [number for number in range(size) if "\n" in tokenizer.decode([number])]
    return torch.tensor(sorted({*broken, *tokenizer.eos_ids}), dtype=torch.int64)


TASKS.register(Suite.name, Suite)
