"""Text generation: chunked prefill, then one token at a time, greedy or sampled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from nasbench.backbone.decoder import Decoder, DecoderCache
from nasbench.engine.graph import Stepper
from nasbench.errors import UserError

CHUNK = {"cpu": 512, "cuda": 8192}
"""Prefill tokens of a sequence at a time: enough to keep the device busy (one sequence of 64K tokens in chunks of 4096
waits for the launches of a slow host a third of the time), little enough that activations stay small."""


def default_chunk(device: torch.device) -> int:
    return CHUNK.get(device.type, CHUNK["cpu"])


@torch.inference_mode()
def prefill(decoder: Decoder, tokens: Tensor, cache: DecoderCache, chunk: int | None = None) -> Tensor:
    """Reads tokens [B, T] into the cache in chunks; logits of the last one [B, V]. Only those are ever computed."""
    chunk = chunk or default_chunk(decoder.device)
    for part in tokens.split(chunk, dim=1):
        last = decoder.hidden(part, cache)[:, -1]
    return decoder.logits(last)


@torch.inference_mode()
def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row of logits [B, V] -> [B] int64.

    Args:
        temperature: 0 takes the most likely token.
        top_p: samples among the fewest most likely tokens whose probabilities sum to at least this (arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # A token stays if those before it have not reached top_p; the first always does.
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def stream(
    decoder: Decoder,
    prompts: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chunk: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next tokens [B] of prompts [B, T] of one length, `max_new_tokens` times unless the caller stops.

    Raises:
        UserError: an empty prompt, a bad option, or more tokens than the model's context.
    """
    batch, length = prompts.shape
    if length == 0 or max_new_tokens < 1:
        raise UserError(f"a prompt of {length} tokens and {max_new_tokens} new ones: both must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature {temperature} and top_p {top_p}: choose at least 0, and above 0 up to 1")
    # The last token is not read back, so it needs no place in the cache.
    cache = decoder.new_cache(batch, length + max_new_tokens - 1)
    stepper = Stepper(decoder, cache)
    generator = torch.Generator(decoder.device).manual_seed(seed)
    logits = prefill(decoder, prompts.to(decoder.device), cache, chunk)
    for index in range(max_new_tokens):
        tokens = choose(logits, temperature, top_p, generator)
        yield tokens
        if index + 1 < max_new_tokens:
            logits = stepper.step(tokens)


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chunk: int | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, in order, without the end-of-text token that stopped it.

    Prompts of equal length run as one batch: recurrent layers have no mask that could hide padding from their state,
    so padding would change the result.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt)].append(index)
    results: list[list[int]] = [[] for _ in prompts]
    for members in groups.values():
        open_rows = dict(enumerate(members))
        tokens = torch.tensor([list(prompts[index]) for index in members], dtype=torch.int64)
        for new in stream(
            decoder, tokens, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, chunk=chunk
        ):
            ids = new.tolist()
            for row, index in list(open_rows.items()):
                if ids[row] in eos_ids:
                    del open_rows[row]
                else:
                    results[index].append(ids[row])
            if not open_rows:
                break
    return results
