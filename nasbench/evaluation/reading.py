"""Reading many texts of different lengths at once: the likelihood of their ends, and greedy lines.

Texts are sorted by length and padded behind their end, where causal layers never look back from it. What is read of a
batch stays on the device until all batches are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nasbench.backbone.decoder import Decoder
from nasbench.supernet.losses import CHUNK

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens of one forward, padding included: enough to keep the device busy."""


@dataclass(frozen=True)
class Text:
    """Token ids, of which the last `count` are to be predicted from those before them (the first of all never is)."""

    ids: Sequence[int]
    count: int


def batches_by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of at most `tokens` tokens once padded to the longest of each, shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    start = 0
    while start < len(order):
        size = 1
        while start + size < len(order) and (size + 1) * lengths[order[start + size]] <= tokens:
            size += 1
        yield order[start : start + size]
        start += size


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[rows, longest] int64, zeros behind each row."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    table = np.zeros((len(rows), lengths.max()), np.int64)
    table[np.arange(table.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), np.int64)
    return torch.from_numpy(table).to(device)


def end_places(lengths: Sequence[int], counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and place of the last `counts` tokens of padded rows of these lengths, [sum of counts] int64 each."""
    count = np.asarray(counts, np.int64)
    row = np.repeat(np.arange(len(count)), count)
    # Tokens of all ends in a row, less those of the ends before: each end's own, from 0 on.
    own = np.arange(len(row)) - np.repeat(count.cumsum() - count, count)
    place = np.repeat(np.asarray(lengths, np.int64) - count, count) + own
    return torch.from_numpy(row).to(device), torch.from_numpy(place).to(device)


@torch.inference_mode()
def read_ends(decoder: Decoder, texts: Sequence[Text]) -> list[tuple[Tensor, Tensor]]:
    """Of every text, for each token of its end: log p in nats [count] fp32, and whether it is the most likely [count].

    A text that is too long for the model loses its beginning.
    """
    longest, device = decoder.shape.max_context, decoder.device
    rows = [text.ids[-longest:] for text in texts]
    counts = [min(text.count, len(row) - 1) for text, row in zip(texts, rows, strict=True)]
    order: list[int] = []
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in batches_by_length(list(map(len, rows)), BATCH_TOKENS[device.type]):
        order += batch
        tokens = padded([rows[i] for i in batch], device)
        hidden = decoder.hidden(tokens)
        row, place = end_places([len(rows[i]) for i in batch], [counts[i] for i in batch], device)
        parts.append(_score(decoder, hidden[row, place - 1], tokens[row, place]))
    log_p, right = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
    sizes = [counts[i] for i in order]
    found: dict[int, tuple[Tensor, Tensor]] = dict(
        zip(order, zip(log_p.split(sizes), right.split(sizes), strict=True), strict=True)
    )
    return [found[i] for i in range(len(texts))]


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


@torch.inference_mode()
def greedy(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
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
        ends: token ids on the decoder's device.
        likely: first guesses, one row of at most `tokens` per prompt; none at all: zeros. They save passes and change
            nothing.
        progress: called after every pass with how many prompts are left.
    """
    device = decoder.device
    longest = decoder.shape.max_context - tokens
    rows = [list(prompt[-longest:]) for prompt in prompts]
    guesses = torch.zeros(len(rows), tokens, dtype=torch.int64)
    if likely:
        first = padded([[*row, 0] for row in likely], guesses.device)[:, :tokens]
        guesses[:, : first.shape[1]] = first
    left = list(range(len(rows)))
    while left:
        settled = []
        for batch in batches_by_length([len(rows[i]) + tokens for i in left], BATCH_TOKENS[device.type]):
            chosen = [left[at] for at in batch]
            said, done = _guess_again(decoder, [rows[i] for i in chosen], guesses[chosen], ends)
            guesses[chosen] = said
            settled += [i for i, over in zip(chosen, done, strict=True) if over]
        left = sorted(set(left) - set(settled))
        progress(len(left))
    return [_before(row, ends.cpu()) for row in guesses]


def _guess_again(
    decoder: Decoder, prompts: Sequence[list[int]], guesses: Tensor, ends: Tensor
) -> tuple[Tensor, list[bool]]:
    """One pass: the most likely tokens behind prompts and guesses [B, M], and which of the rows are settled."""
    count, device = guesses.shape[1], decoder.device
    ids = padded([prompt + guess for prompt, guess in zip(prompts, guesses.tolist(), strict=True)], device)
    starts = torch.tensor(list(map(len, prompts)))[:, None] - 1
    place = (starts + torch.arange(count)).to(device)
    hidden = decoder.hidden(ids).gather(1, place[..., None].expand(-1, -1, decoder.shape.hidden_size))
    said = torch.cat([decoder.logits(part).argmax(-1) for part in hidden.flatten(0, 1).split(CHUNK[device.type])])
    said = said.view(-1, count)
    agreed = (said == guesses.to(device)).cumprod(1).sum(1, keepdim=True)
    known = torch.arange(count, device=device) <= agreed
    done = (agreed[:, 0] + 1 >= count) | (torch.isin(said, ends) & known).any(1)
    return said.cpu(), done.tolist()


def _before(row: Tensor, ends: Tensor) -> list[int]:
    stops = torch.isin(row, ends).nonzero()
    return row[: int(stops[0]) if len(stops) else len(row)].tolist()
