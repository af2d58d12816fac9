"""Reading many texts of different lengths at once: the likelihood of their ends, and greedy lines.

Texts are sorted by length and padded behind their end, where causal layers never look back from it. They are laid out
on the device once, for all decoders that read them, and what is read of a batch stays there until all batches are done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nasbench.data.packing import Batch
from nasbench.model.decoder import Decoder
from nasbench.supernet.forward import hidden_of
from nasbench.supernet.losses import CHUNK

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens of one forward, padding included: enough to keep the device busy. Scoring many placements at once keeps the
residual stream behind every layer: layers x these x hidden size."""
ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Forms of attention whose kernels take any shape. cuDNN's, which torch prefers on an H100, is planned by the host for
each new pair of batch and length, for tens to hundreds of milliseconds (github.com/modelscope/FunASR/issues/3704): here
no two batches are alike, and each pass over lines makes other ones."""


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
        parts = [reading.read(decoder, i, hidden_of(decoder, batch)) for i, batch in enumerate(reading.batches)]
    return reading.samples(parts)


@dataclass(frozen=True)
class Text:
    """Token ids, of which the last `count` are to be predicted from those before them (the first of all never is)."""

    ids: Sequence[int]
    count: int


def lengths_of(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """[rows] int64."""
    return np.fromiter(map(len, rows), np.int64, len(rows))


def batches_of(lengths: np.ndarray, tokens: int) -> Iterator[slice]:
    """Places of ascending lengths [n], in batches of at most `tokens` tokens once padded to the longest of each; a row
    longer than that is a batch of its own."""
    start = 0
    while start < len(lengths):
        sizes = np.arange(1, len(lengths) - start + 1) * lengths[start:]
        stop = start + max(1, int(sizes.searchsorted(tokens, "right")))
        yield slice(start, stop)
        start = stop


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[rows, longest] int64, zeros behind each row."""
    lengths = lengths_of(rows)
    table = np.zeros((len(rows), lengths.max()), np.int64)
    table[np.arange(table.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), np.int64)
    return torch.from_numpy(table).to(device)


def end_places(lengths: np.ndarray, counts: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and place of the last `counts` tokens of padded rows of these lengths, [sum of counts] int64 each."""
    row = np.repeat(np.arange(len(counts)), counts)
    # Tokens of all ends in a row, less those of the ends before: each end's own, from 0 on.
    own = np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)
    place = np.repeat(lengths - counts, counts) + own
    return torch.from_numpy(row).to(device), torch.from_numpy(place).to(device)


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
        lengths = lengths_of(rows)
        self.counts = np.minimum([text.count for text in texts], lengths - 1)
        order = lengths.argsort(kind="stable")
        self.batches, self.places = [], []
        for part in batches_of(lengths[order], tokens or BATCH_TOKENS[device.type]):
            chosen = order[part]
            self.batches.append(Batch(padded([rows[i] for i in chosen], device)))
            self.places.append(end_places(lengths[chosen], self.counts[chosen], device))
        self._text = np.repeat(np.arange(len(texts)), self.counts)
        # From the order of the batches to that of the texts, token by token.
        self._back = np.repeat(order, self.counts[order]).argsort(kind="stable")

    def before(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states [M, C] from which the ends' tokens of a batch are predicted."""
        row, place = self.places[index]
        return hidden[row, place - 1]

    def read(self, decoder: Decoder, index: int, hidden: Tensor) -> tuple[Tensor, ...]:
        """For each token of the ends: log p in nats [M] fp32, and whether it is the most likely one [M] bool."""
        return _score(decoder, self.before(index, hidden), self.batches[index].tokens[self.places[index]])

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


def _score(decoder: Decoder, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [M, C], targets [M] -> log p [M], whether the target is the most likely token [M]."""
    log_p, right = [], []
    for states, ids in zip(
        hidden.split(CHUNK[hidden.device.type]), targets.split(CHUNK[hidden.device.type]), strict=True
    ):
        logits = decoder.logits(states)
        log_p.append(F.log_softmax(logits, -1, dtype=torch.float32).gather(-1, ids[:, None])[:, 0])
        right.append(logits.argmax(-1) == ids)
    return torch.cat(log_p), torch.cat(right)


class Prompts:
    """Texts behind which something is written, laid out once for all decoders that do so: the shortest first, one
    behind the other on a device, where any of them become a padded table without the host's touching a token.

    Attributes:
        order: which text stands at each place, [n] int64.
        lengths: tokens of those texts, [n] int64, ascending.
    """

    def __init__(self, texts: Sequence[Sequence[int]], device: torch.device) -> None:
        lengths = lengths_of(texts)
        self.order = lengths.argsort(kind="stable")
        self.lengths = lengths[self.order]
        ids = np.fromiter(chain.from_iterable(texts[i] for i in self.order), np.int64)
        self._ids = torch.from_numpy(ids).to(device)
        self._lengths = torch.from_numpy(self.lengths).to(device)
        self._stops = self._lengths.cumsum(0)

    def table(self, places: Tensor, longest: int, width: int) -> tuple[Tensor, Tensor]:
        """The texts at `places` [B], the last `longest` tokens of each: [B, width] int64 with zeros behind each, and
        their lengths [B, 1]."""
        lengths = self._lengths[places, None].clamp(max=longest)
        column = torch.arange(width, device=places.device)
        behind = column >= lengths
        at = (self._stops[places, None] - lengths + column).masked_fill_(behind, 0)
        return self._ids[at].masked_fill_(behind, 0), lengths


@torch.inference_mode()
def greedy(
    decoder: Decoder,
    prompts: Prompts | Sequence[Sequence[int]],
    tokens: int,
    ends: Tensor,
    likely: Sequence[Sequence[int]] = (),
    progress: Callable[[int], None] = lambda left: None,
) -> list[list[int]]:
    """What greedy decoding writes behind each prompt: `tokens` tokens, or fewer up to the first of `ends`, left out.

    All tokens of all prompts are guessed at once, and every pass replaces a guess by what the model says behind it.
    What stands behind right tokens is right, so each pass settles one token at least, and usually several: parallel
    (Jacobi) decoding, arXiv 2305.10427. It needs no cache, so that prompts of any lengths share a batch, which no
    recurrent state allows.

    Args:
        prompts: laid out on the decoder's device, if they are asked of several decoders.
        ends: token ids on the decoder's device.
        likely: first guesses, one row of at most `tokens` per prompt; none at all: zeros. They save passes and change
            nothing.
        progress: called after every pass with how many prompts are left.
    """
    device = decoder.device
    if not isinstance(prompts, Prompts):
        prompts = Prompts(prompts, device)
    longest = decoder.shape.max_context - tokens
    widths = prompts.lengths.clip(max=longest) + tokens
    count = len(widths)
    guesses = torch.zeros(count, tokens, dtype=torch.int64)
    if likely:
        first = padded([[*likely[i], 0] for i in prompts.order], guesses.device)[:, :tokens]
        guesses[:, : first.shape[1]] = first
    guesses = guesses.to(device)
    stops = torch.isin(torch.arange(decoder.shape.vocab_size, device=device), ends)
    settled = torch.zeros(count, dtype=torch.bool, device=device)
    left = np.arange(count)
    while len(left):
        places = torch.from_numpy(left).to(device)
        for part in batches_of(widths[left], BATCH_TOKENS[device.type]):
            chosen = places[part]
            table, lengths = prompts.table(chosen, longest, int(widths[left[part.stop - 1]]))
            guesses[chosen], settled[chosen] = _guess_again(decoder, table, lengths, guesses[chosen], stops)
        # All that the host has to know of a pass.
        left = np.flatnonzero(~settled.cpu().numpy())
        progress(len(left))
    sizes = (stops[guesses].cumsum(1) == 0).sum(1)
    lines: list[list[int]] = [[]] * count
    for i, line, size in zip(prompts.order.tolist(), guesses.tolist(), sizes.tolist(), strict=True):
        lines[i] = line[:size]
    return lines


def _guess_again(
    decoder: Decoder, table: Tensor, lengths: Tensor, guesses: Tensor, stops: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass.

    Args:
        table: prompts [B, T] with room behind them, where the guesses are written.
        lengths: of the prompts, [B, 1].
        guesses: [B, M].
        stops: whether a token ends a line, [vocabulary] bool.

    Returns:
        The most likely tokens behind prompts and guesses [B, M], and which of the rows are settled [B] bool.
    """
    own = torch.arange(guesses.shape[1], device=guesses.device)
    place = lengths + own
    table.scatter_(1, place, guesses)
    with sdpa_kernel(ANY_SHAPE):
        hidden = decoder.hidden(table)
    hidden = hidden.gather(1, (place - 1)[..., None].expand(-1, -1, decoder.shape.hidden_size))
    chunks = hidden.flatten(0, 1).split(CHUNK[guesses.device.type])
    said = torch.cat([decoder.logits(part).argmax(-1) for part in chunks]).view_as(guesses)
    agreed = (said == guesses).cumprod(1).sum(1, keepdim=True)
    done = (agreed[:, 0] + 1 >= len(own)) | (stops[said] & (own <= agreed)).any(1)
    return said, done
