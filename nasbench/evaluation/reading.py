"""Reading many texts of different lengths at once: the likelihood of their ends.

Texts are sorted by length and padded behind their end, where causal layers never look back from it. They are laid out
on the device once, for all decoders that read them, and what is read of a batch stays there until all batches are done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from nasbench.core.by_device import ByDevice
from nasbench.data.packing import Batch
from nasbench.model.decoder import Decoder
from nasbench.supernet.losses import CHUNK

BATCH_TOKENS = ByDevice(cpu=4096, cuda=32768)
"""Tokens of one forward, padding included: enough to keep the device busy. Scoring many placements at once keeps the
residual stream behind every layer: layers x these x hidden size."""
ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Forms of attention whose kernels take any shape. cuDNN's, which torch prefers on an H100, is planned by the host for
each new pair of batch and length, for tens to hundreds of milliseconds (github.com/modelscope/FunASR/issues/3704): here
no two batches are alike."""


class Reading(ABC):
    """Texts laid out on a device once, and what is read off a decoder's hidden states over them."""

    batches: Sequence[Batch]
    ragged: ClassVar[bool] = False
    """Whether the batches' shapes all differ."""

    @abstractmethod
    def read(self, decoder: Decoder, index: int, hidden: Tensor) -> tuple[Tensor, ...]:
        """What is kept of final hidden states [B, T, C] over batch `index`; `decoder` lends its head."""

    @abstractmethod
    def samples(self, parts: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """Samples [n] by the title of what was measured, from what `read` gave for every batch in order."""

    def kernels(self) -> AbstractContextManager[None]:
        """The attention kernels that suit the batches."""
        return sdpa_kernel(ANY_SHAPE) if self.ragged else nullcontext()


@torch.inference_mode()
def read_alone(decoder: Decoder, reading: Reading) -> dict[str, Tensor]:
    """What one decoder gives."""
    with reading.kernels():
        parts = [
            reading.read(decoder, i, decoder.hidden_by_layer(batch.tokens, documents=batch.documents))
            for i, batch in enumerate(reading.batches)
        ]
    return reading.samples(parts)


@dataclass(frozen=True)
class Text:
    """Token ids, of which the last `count` are to be predicted from those before them (the first of all never is)."""

    ids: Sequence[int]
    count: int


def batches_of(lengths: Sequence[int], tokens: int) -> Iterator[slice]:
    """Places of ascending lengths, in batches of at most `tokens` tokens once padded to the longest of each; a row
    longer than that is a batch of its own."""
    start = 0
    for place, length in enumerate(lengths):
        if place > start and (place - start + 1) * length > tokens:
            yield slice(start, place)
            start = place
    if start < len(lengths):
        yield slice(start, len(lengths))


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[rows, longest] int64, zeros behind each row."""
    return pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)


def end_places(lengths: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Row and place of the last `counts` tokens of padded rows of these lengths, [sum of counts] int64 each."""
    behind = lengths[:, None] - torch.arange(int(lengths.max()))
    row, place = ((behind > 0) & (behind <= counts[:, None])).nonzero(as_tuple=True)
    return row, place


class Ends(Reading):
    """Texts whose ends are read, laid out once for all decoders that read them.

    Args:
        longest: tokens that the decoders can read; a longer text loses its beginning.
        tokens: most of a batch, padding included; None: BATCH_TOKENS.
        title: of the samples.

    Attributes:
        batches: all texts, the shortest first.
        places: row and place of the tokens of all ends of each batch, [M] int64 each.
        counts: tokens of each text's end that are predicted, [texts] int64, in the order of the texts.
    """

    ragged = True

    def __init__(
        self, texts: Sequence[Text], longest: int, device: torch.device, tokens: int | None = None, title: str = ""
    ) -> None:
        self.title = title
        rows = [text.ids[-longest:] for text in texts]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        counts = torch.tensor([text.count for text in texts], dtype=torch.int64).minimum(lengths - 1)
        order = lengths.argsort(stable=True)
        self.batches, self.places = [], []
        for part in batches_of(lengths[order].tolist(), tokens or BATCH_TOKENS.of(device)):
            chosen = order[part]
            self.batches.append(Batch(padded([rows[i] for i in chosen]).to(device)))
            row, place = end_places(lengths[chosen], counts[chosen])
            self.places.append((row.to(device), place.to(device)))
        self.counts = counts.numpy()
        self._text = np.repeat(np.arange(len(texts)), self.counts)
        # From the order of the batches to that of the texts, token by token.
        self._back = np.repeat(order.numpy(), self.counts[order.numpy()]).argsort(kind="stable")

    def before(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states [M, C] from which the ends' tokens of a batch are predicted."""
        row, place = self.places[index]
        return hidden[row, place - 1]

    def read(self, decoder: Decoder, index: int, hidden: Tensor) -> tuple[Tensor, ...]:
        """For each token of the ends: log p in nats [M] fp32, and whether it is the most likely one [M] bool."""
        return score_tokens(decoder, self.before(index, hidden), self.batches[index].tokens[self.places[index]])

    def columns(self, parts: Sequence[tuple[Tensor, ...]]) -> list[np.ndarray]:
        """What `read` gave, brought to the host: of each column [sum of counts], text by text."""
        return [torch.cat(column).cpu().numpy()[self._back] for column in zip(*parts, strict=True)]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over each text's end of values as `columns` gives them: [texts] float64, 0 where nothing is read."""
        return np.bincount(self._text, values, len(self.counts))

    def samples(self, parts: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        log_p, right = self.columns(parts)
        return self.judge(log_p, right)

    def judge(self, log_p: np.ndarray, right: np.ndarray) -> dict[str, Tensor]:
        """Samples by title, from log p and correctness of every token of the ends, text by text."""
        return {"log_p": torch.from_numpy(log_p), "right": torch.from_numpy(right)}


def score_tokens(decoder: Decoder, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [M, C], targets [M] -> log p [M], whether the target is the most likely token [M]."""
    log_p, right = [], []
    for states, ids in zip(hidden.split(CHUNK.of(hidden.device)), targets.split(CHUNK.of(hidden.device)), strict=True):
        logits = decoder.logits(states)
        log_p.append(F.log_softmax(logits, -1, dtype=torch.float32).gather(-1, ids[:, None])[:, 0])
        right.append(logits.argmax(-1) == ids)
    return torch.cat(log_p), torch.cat(right)
