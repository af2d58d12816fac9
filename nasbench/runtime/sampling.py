"""Choosing the next token from logits. Works without a host synchronisation, so that a CUDA graph can hold it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nasbench.core.errors import UserError
from nasbench.model import fused


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: samples among the fewest most likely tokens whose probabilities sum to at least this (arXiv 1904.09751).
        seed: what the sampled tokens depend on.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature {self.temperature} and top_p {self.top_p}: choose at least 0, and above 0 up to 1"
            )

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        return choose(logits, self.temperature, self.top_p, generator)


@torch.inference_mode()
def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row of logits [B, V] -> [B] int64; the options are those of Sampling."""
    if temperature == 0:
        return fused.most_likely(logits)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # A token stays if those before it have not reached top_p; the first always does.
        ordered.masked_fill_(ordered.cumsum(-1) - ordered >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    # The least of exponential times at rates p falls to token i with probability p_i. torch.multinomial does the same
    # behind checks of p, which some versions make the host wait for.
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    return probabilities.div_(times).argmax(-1)
