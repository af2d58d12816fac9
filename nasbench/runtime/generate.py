"""Text generation: chunked prefill, then a token of every sequence at a time, whatever the prompts' lengths."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from nasbench.core.by_device import PREFILL_CHUNK, ByDevice
from nasbench.core.errors import UserError
from nasbench.model.block import BlockCache
from nasbench.model.decoder import Decoder, DecoderCache
from nasbench.runtime.graph import Writer
from nasbench.runtime.sampling import Sampling

LOOK_EVERY = ByDevice(cpu=1, cuda=16)
"""Steps between two looks at whether every sequence has ended: looking waits for a GPU."""


@torch.inference_mode()
def prefill(decoder: Decoder, tokens: Tensor, cache: DecoderCache, chunk: int | None = None) -> Tensor:
    """Reads tokens [B, T] into the cache in chunks; logits of the last one [B, V]. Only those are ever computed."""
    chunk = chunk or PREFILL_CHUNK.of(decoder.device)
    for part in tokens.split(chunk, dim=1):
        last = decoder.hidden(part, cache)[:, -1]
    return decoder.logits(last)


def cache_rows(cache: DecoderCache, index: slice | Tensor) -> DecoderCache:
    """The cache of some of the sequences. A slice gives views: what is written there is written here. Indices [n] give
    copies, also several of one sequence."""

    def rows(block: BlockCache | None) -> BlockCache | None:
        view = copy.copy(block)  # whatever else a kind keeps stays
        if view is not None:
            view.state, view.conv_state = (
                {name: tensor[index] for name, tensor in tensors.items()} for tensors in (view.state, view.conv_state)
            )
        return view

    batch = len(index) if isinstance(index, Tensor) else len(range(cache.batch)[index])
    chosen = DecoderCache([rows(block) for block in cache.blocks], batch, cache.context)
    chosen.length = cache.length
    return chosen


def prefill_each(decoder: Decoder, prompts: Sequence[Tensor], cache: DecoderCache, chunk: int | None = None) -> Tensor:
    """Reads prompts [T_b], those of one length beside each other, each into its row of the cache: logits of their last
    tokens [B, V].

    Prompts of one length are read at once. Others are not padded: a recurrent layer has no mask that could hide padding
    from its state.
    """
    logits, begin = [], 0
    for _, members in groupby(prompts, len):
        tokens = torch.stack(list(members)).to(decoder.device)
        logits.append(prefill(decoder, tokens, cache_rows(cache, slice(begin, begin + len(tokens))), chunk))
        begin += len(tokens)
    return torch.cat(logits)


def stream(
    decoder: Decoder,
    prompts: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chunk: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next tokens [B] of all prompts, `max_new_tokens` times unless the caller stops; each is valid until
    the next.

    Args:
        prompts: [B, T], or one sequence of tokens each.

    Raises:
        UserError: an empty prompt, a bad option, or more tokens than the model's context.
    """
    texts = [torch.as_tensor(prompt, dtype=torch.int64) for prompt in prompts]
    lengths = [len(text) for text in texts]
    if min(lengths, default=0) == 0 or max_new_tokens < 1:
        raise UserError(
            f"a prompt of {min(lengths, default=0)} tokens and {max_new_tokens} new ones: both must be at least 1"
        )
    sampling = Sampling(temperature, top_p, seed)
    # Rows by length, so that prompts of one length are one part of the cache.
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    # The last token is not read back, so it needs no place in the cache.
    cache = decoder.new_cache(len(texts), max(lengths) + max_new_tokens - 1)
    writer = Writer(decoder, cache, sampling)
    logits = prefill_each(decoder, [texts[index] for index in order], cache, chunk)
    row_of = None
    if order != sorted(order):
        row_of = torch.tensor(order).argsort().to(decoder.device)
    for index in range(max_new_tokens):
        tokens = writer.step() if index else writer.begin(logits, [lengths[i] for i in order])
        yield tokens if row_of is None else tokens[row_of]


def until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(what of a growing text is before any of the stop strings for certain, whether one of them is there).

    An end that a stop string may begin with is not certain.
    """
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], True
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held], False


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    **options: Any,
) -> list[list[int]]:
    """New tokens of each prompt, in order, without the end-of-text token that stopped it. `options` are `stream`'s.

    All run as one batch, whatever their lengths. A sequence that has ended goes on until all have; what it writes
    behind its end is dropped.
    """
    if not prompts:
        return []
    ends = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=decoder.device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=decoder.device)
    look_every = LOOK_EVERY.of(decoder.device)
    columns = []
    for index, tokens in enumerate(stream(decoder, prompts, max_new_tokens=max_new_tokens, **options), 1):
        columns.append(tokens.clone())
        if len(ends):
            ended |= torch.isin(tokens, ends)
            if index % look_every == 0 and bool(ended.all()):
                break
    stops = set(eos_ids)
    return [
        row[: next((at for at, token in enumerate(row) if token in stops), len(row))]
        for row in torch.stack(columns, 1).tolist()
    ]
