"""Greedy agreement with the teacher: the share of a text that the teacher wrote greedily and the model would write too.

The teacher continues pieces of held-out text. Each of its tokens is predicted from the teacher's own tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from nasbench.core.errors import UserError
from nasbench.evaluation.reading import Ends, Text
from nasbench.evaluation.tasks import TASKS, Context, Task, parse_length
from nasbench.model.decoder import Decoder
from nasbench.runtime.generate import stream

PROMPT_TOKENS = 128
"""Held-out text before what the teacher writes; less where rows are shorter."""
ITEMS = 128
"""Texts."""


class AgreementEnds(Ends):
    """Ends of one length, which the teacher wrote."""

    def judge(self, log_p: np.ndarray, right: np.ndarray) -> dict[str, Tensor]:
        agreed = torch.from_numpy(right).view(len(self.counts), -1).float()
        # .prefix: tokens before the first that differs, as a share; a text that is written alone follows just as far.
        return {self.title: agreed.mean(1), f"{self.title}.prefix": agreed.cumprod(1).mean(1)}


@dataclass(frozen=True)
class Agreement(Task):
    """Mean share of the teacher's greedy tokens that are the model's first choice.

    Attributes:
        length: tokens that the teacher writes.
    """

    length: int = 128
    name: ClassVar[str] = "agreement"
    needs_teacher: ClassVar[bool] = True

    @classmethod
    def parse(cls, length: str, argument: str) -> Self:
        if argument:
            raise UserError(f"task {cls.name} takes a number of tokens only: write {cls.name}@128")
        return cls(parse_length(cls.name, length, cls.length))

    @property
    def label(self) -> str:
        return f"{self.name}@{self.length}"

    def settings(self, context: Context) -> str:
        return f"v1/{context.split}/{ITEMS}/{context.corpus.fingerprint[:8]}"

    def reading(self, decoder: Decoder, context: Context) -> AgreementEnds:
        self.check(context)
        teacher, longest = context.teacher, decoder.shape.max_context
        assert teacher is not None

        def lay_out() -> AgreementEnds:
            texts = [Text(row, self.length) for row in self.texts(teacher, context).tolist()]
            return AgreementEnds(texts, longest, decoder.device, title=self.title)

        return context.once((self, context.split, longest, decoder.device), lay_out)

    def texts(self, teacher: Decoder, context: Context) -> Tensor:
        """[n, prompt + length]: pieces of held-out text and what the teacher writes behind them."""
        rows = context.corpus.held_out(context.split).tokens
        prompts = rows[:: max(1, len(rows) // ITEMS)][:ITEMS, : min(PROMPT_TOKENS, rows.shape[1] // 2)]
        new = torch.stack([t.clone() for t in stream(teacher, prompts, max_new_tokens=self.length)], 1)
        return torch.cat((prompts, new.cpu()), 1)

    def scored_tokens(self, context: Context) -> int:
        return min(PROMPT_TOKENS, context.corpus.sequence // 2) + self.length


TASKS.register(Agreement.name, Agreement)
