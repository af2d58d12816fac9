"""Greedy agreement with the teacher: what of a text that the teacher wrote greedily the model would write, too.

The teacher continues pieces of held-out text. Read behind the teacher's own tokens, the share of them that is the
model's first choice is the agreement; the first that is not is where the model's own greedy text leaves the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from nasbench.core.errors import UserError
from nasbench.evaluation.reading import Ends, Text, read_ends
from nasbench.evaluation.tasks import TASKS, Context, Task, parse_length
from nasbench.model.decoder import Decoder
from nasbench.runtime.generate import stream

PROMPT_TOKENS = 128
"""Of held-out text before what the teacher writes; less where rows are shorter."""
ITEMS = 128
"""Texts."""


@dataclass(frozen=True)
class Agreement(Task):
    """Mean share of the teacher's greedy tokens that are the model's first choice.

    Attributes:
        length: tokens that the teacher writes.
    """

    length: int = 128
    name: ClassVar[str] = "agreement"

    @classmethod
    def parse(cls, length: str, argument: str) -> Self:
        if argument:
            raise UserError(f"task {cls.name} takes a number of tokens only: write {cls.name}@128")
        return cls(parse_length(cls.name, length, cls.length))

    @property
    def label(self) -> str:
        return f"{self.name}@{self.length}"

    def key(self, context: Context) -> str:
        return f"v1/{ITEMS}/{context.corpus.fingerprint[:8]}"

    def values(self, decoder: Decoder, context: Context) -> Tensor:
        return self.measures(decoder, context)[self.label]

    def measures(self, decoder: Decoder, context: Context) -> dict[str, Tensor]:
        if context.teacher is None:
            raise UserError(f"task {self.name} needs a teacher: evaluate a run, not a checkpoint alone")
        teacher, longest = context.teacher, decoder.shape.max_context

        def lay_out() -> Ends:
            rows = context.once(self, lambda: self.texts(teacher, context))
            return Ends([Text(row, self.length) for row in rows.tolist()], longest, decoder.device)

        ends = context.once((self, longest, decoder.device), lay_out)
        _, agreed = read_ends(decoder, ends)
        # The texts are of one length, and so are their ends.
        right = torch.from_numpy(agreed).view(len(ends.counts), -1).float()
        # .prefix: tokens before the first that differs, as a share; a text that is written alone follows just as far.
        return {self.label: right.mean(1), f"{self.label}.prefix": right.cumprod(1).mean(1)}

    def texts(self, teacher: Decoder, context: Context) -> Tensor:
        """[n, prompt + length]: pieces of held-out text and what the teacher writes behind them."""
        rows = context.corpus.held_out("test").tokens
        prompts = rows[:: max(1, len(rows) // ITEMS)][:ITEMS, : min(PROMPT_TOKENS, rows.shape[1] // 2)]
        new = torch.stack([t.clone() for t in stream(teacher, prompts, max_new_tokens=self.length)], 1)
        return torch.cat((prompts, new.cpu()), 1)


TASKS.register(Agreement.name, Agreement)
