"""A decoder as a model of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness).

    lm_eval.simple_evaluate(HarnessModel(decoder, tokenizer, batch_size=32), tasks=["arc_easy"])

Requests with the same input run once. What several requests begin with is read once, into a cache. Logits are computed
only where a token is scored. The rules for tokens are the harness's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.attention import sdpa_kernel

from nasbench.checkpoints.tokenizer import Tokenizer
from nasbench.core.by_device import ByDevice
from nasbench.evaluation.prefixes import BLOCK, Group, shared_prefixes
from nasbench.evaluation.reading import ANY_SHAPE, padded, score_tokens
from nasbench.evaluation.suite import encode_prompts, tokenised
from nasbench.model.decoder import Decoder, DecoderCache
from nasbench.runtime.generate import cache_rows, prefill, stream

BATCH = ByDevice(cpu=16, cuda=64)
"""Requests of one forward."""
MOST_ROWS = 2
"""Rows behind a prefix, in batches: each has a copy of the prefix's cache."""
NEW_TOKENS = 256
"""Longest answer of a task that sets no length, as in the harness."""
LOOK_EVERY = 16
"""New tokens between two looks for stop strings."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The harness's: the texts, the context's tokens and the continuation's."""


class HarnessModel(TemplateLM):
    """Log-likelihoods and greedy or sampled text of a decoder."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, batch_size: int | None = None) -> None:
        super().__init__()
        self.decoder, self.words = decoder, tokenizer
        self.batch_size = batch_size or BATCH.of(decoder.device)
        self.max_length = decoder.shape.max_context
        self._device = decoder.device

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id or 0

    @property
    def prefix_token_id(self) -> int:
        return self.words.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return self.words.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.words.encode(string) if add_special_tokens is False else self.words.encode_prompt(string)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-likelihood in nats, and whether greedy decoding would write it."""
        texts = [request.args for request in requests]
        pairs = tokenised(self.words, texts)
        return self._loglikelihood_tokens([(text, *pair) for text, pair in zip(texts, pairs, strict=True)])

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **options: Any) -> list[tuple[float, bool]]:
        """Sum of log-probabilities in nats of each continuation, and whether greedy decoding would write it."""
        inputs: dict[tuple[int, ...], int] = {}
        places, ends = [], []
        for _, context, continuation in requests:
            tokens = (context + continuation)[-(self.max_length + 1) :]
            places.append(inputs.setdefault(tuple(tokens[:-1]), len(inputs)))
            ends.append(tokens[-min(len(continuation), len(tokens) - 1) :])
        asked: list[list[int]] = [[] for _ in inputs]
        for request, row in enumerate(places):
            asked[row].append(request)
        rows, answers = list(inputs), [(0.0, False)] * len(requests)
        # Hidden states are read where a token is scored: that is behind every prefix.
        most = [len(row) - max(len(ends[request]) for request in asked[place]) for place, row in enumerate(rows)]
        for batch, prefix, cache in self._batches(rows, most):
            known = [request for row in batch for request in asked[row]]
            tails = padded([rows[row][prefix:] for row in batch]).to(self.decoder.device)
            with sdpa_kernel(ANY_SHAPE):
                hidden = self.decoder.hidden(tails, cache)
            line = [index for index, row in enumerate(batch) for request in asked[row] for _ in ends[request]]
            place = [
                position - prefix
                for request in known
                for position in range(len(rows[places[request]]) - len(ends[request]), len(rows[places[request]]))
            ]
            targets = torch.tensor([token for request in known for token in ends[request]], device=self.decoder.device)
            log_p, right = (column.cpu() for column in score_tokens(self.decoder, hidden[line, place], targets))
            sizes = [len(ends[request]) for request in known]
            for request, part, hits in zip(known, log_p.split(sizes), right.split(sizes), strict=True):
                answers[request] = float(part.sum()), bool(hits.all())
                if requests[request][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[request][0], answers[request])
        return answers

    def _batches(
        self, rows: Sequence[tuple[int, ...]], most: Sequence[int]
    ) -> Iterator[tuple[list[int], int, DecoderCache | None]]:
        """(places of rows, length of the prefix that they have read, the cache behind it), rows of like length at once.

        Prefixes are read ahead, and rows behind them share a pass, as many as have the tokens of `batch_size` whole
        requests: small passes take as long as large ones where the host launches more slowly than the GPU computes.
        """

        def tail(group: Group) -> int:
            return max(len(rows[row]) for row in group.rows) - group.prefix

        found = shared_prefixes(rows, most, BLOCK.of(self.decoder.device))
        groups = sorted(found, key=lambda group: (group.prefix, tail(group)))
        for prefix, members in groupby(groups, lambda group: group.prefix):
            alike = list(members)
            count = self.batch_size * (prefix + tail(alike[-1])) // prefix if prefix else len(alike)
            for start in range(0, len(alike), count):
                part = alike[start : start + count]
                order = [row for group in part for row in group.rows]
                if not prefix:
                    for first in range(0, len(order), self.batch_size):
                        yield order[first : first + self.batch_size], 0, None
                    continue
                longest = tail(part[-1])
                cache = self.decoder.new_cache(len(part), prefix + longest)
                heads = [rows[group.rows[0]][:prefix] for group in part]
                with sdpa_kernel(ANY_SHAPE):
                    prefill(self.decoder, torch.tensor(heads, device=self.decoder.device), cache)
                place = [index for index, group in enumerate(part) for _ in group.rows]
                size = min(MOST_ROWS * self.batch_size, self.batch_size * (prefix + longest) // longest)
                for first in range(0, len(order), size):
                    index = torch.tensor(place[first : first + size], device=self.decoder.device)
                    yield order[first : first + size], prefix, cache_rows(cache, index)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts, in windows of the model's context that do not overlap."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, list(context), list(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text behind each context, up to the first of its stop strings. Contexts that leave too little room lose their
        beginning."""
        texts = [""] * len(requests)
        known = encode_prompts(self.words, [request.args[0] for request in requests])
        prompts = [ids or [self.prefix_token_id] for ids in known]

        def settings(index: int) -> str:
            return json.dumps(requests[index].args[1], sort_keys=True)

        order = sorted(range(len(requests)), key=lambda index: (settings(index), len(prompts[index])))
        for _, members in groupby(order, settings):
            chosen = list(members)
            for start in range(0, len(chosen), self.batch_size):
                part = chosen[start : start + self.batch_size]
                written = self._write([prompts[index] for index in part], requests[part[0]].args[1])
                for index, text in zip(part, written, strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _write(self, prompts: Sequence[Sequence[int]], asked: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(asked, NEW_TOKENS)
        count, stops = options["max_gen_toks"], options["until"]
        room = max(1, self.max_length - count)
        heat = float(options.get("temperature", 0.0)) if options["do_sample"] else 0.0
        new, texts = [], [""] * len(prompts)
        steps = stream(
            self.decoder, [prompt[-room:] for prompt in prompts], max_new_tokens=count, temperature=heat,
            top_p=float(options.get("top_p", 1.0)),
        )  # fmt: skip
        for step, tokens in enumerate(steps, 1):
            new.append(tokens.clone())
            if step % LOOK_EVERY and step < count:
                continue
            rows = torch.stack(new, 1).tolist()
            ends = [next((i for i, t in enumerate(row) if t in self.words.eos_ids), len(row)) for row in rows]
            whole = [self.words.decode(row[:end]) for row, end in zip(rows, ends, strict=True)]
            texts = [postprocess_generated_text(text, stops, None) for text in whole]
            if all(end < step or text != before for end, text, before in zip(ends, texts, whole, strict=True)):
                break
        return texts
