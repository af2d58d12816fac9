"""Decode steps over a static cache: a replayed CUDA graph on a GPU, ordinary calls elsewhere.

A decode step of a small model is a few hundred kernels of a few microseconds: launched one by one, the launches cost
more than the work (100 ms a step instead of a few for a 2B model).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nasbench.core.errors import MachineError
from nasbench.model.decoder import Decoder, DecoderCache
from nasbench.runtime.sampling import Sampling

WARM_UP = 3
"""Calls before a capture: libraries pick their kernels and allocate their workspaces on the first ones."""


def capture(
    work: Callable[[], object], generator: torch.Generator | None = None, warm_up: int = WARM_UP
) -> torch.cuda.CUDAGraph:
    """Records `work` on the current GPU. It runs `warm_up` times before, so what it writes must bear that.

    Args:
        generator: what `work` draws from; every replay then draws on from where the generator is. The default one
            needs no mention.

    Raises:
        MachineError: a kernel of `work` cannot be captured, or memory is short.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            # It gets tensors that every replay writes, in inference mode or not.
            with torch.inference_mode(False):
                graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise MachineError(f"this work cannot be captured in a CUDA graph: {error}") from error
    return graph


def capturable_step(decoder: Decoder, cache: DecoderCache) -> Callable[[Tensor, Tensor], Tensor]:
    """tokens, positions [B] -> logits [B, V], each sequence at its own position, for a graph. Called, like
    what it returns, in inference mode."""
    decoder.prepare(cache.context)
    return lambda tokens, positions: decoder.step_at(tokens, positions, cache)


class Stepper:
    """Feeds one token per sequence after another through a decoder, for callers that want the logits.

    Made on an empty cache, before the prompt: capturing a graph runs steps, which leave traces in the cache.
    """

    def __init__(self, decoder: Decoder, cache: DecoderCache) -> None:
        _refuse_full(cache)
        self.decoder, self.cache = decoder, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        if decoder.device.type == "cuda":
            self._capture()

    @torch.inference_mode()
    def _capture(self) -> None:
        decoder, cache = self.decoder, self.cache
        self.tokens, self.positions = (
            _rows_of_zeros(cache.batch, decoder.device),
            _rows_of_zeros(cache.batch, decoder.device),
        )
        step = capturable_step(decoder, cache)

        def work() -> None:
            self.logits = step(self.tokens, self.positions)

        self.graph = capture(work)
        cache.reset()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """tokens [B] int64 at `cache.length` -> logits [B, V], valid until the next step."""
        if self.graph is None:
            return self.decoder.step(tokens, self.cache)
        self.decoder.check_room(self.cache, 1)
        self.tokens.copy_(tokens)
        self.positions.fill_(self.cache.length)
        self.graph.replay()
        self.cache.length += 1
        return self.logits


class Writer:
    """Writes on behind prompts of any lengths, all sequences of a batch together, each at its own position.

    A step reads the tokens that the one before chose, and chooses the next: on a GPU one replayed graph, sampling
    included, and nothing that the host waits for. `cache.length` is that of the longest sequence.

    Made on an empty cache, before the prompts, as a Stepper.
    """

    def __init__(self, decoder: Decoder, cache: DecoderCache, sampling: Sampling) -> None:
        _refuse_full(cache)
        self.decoder, self.cache, self.sampling = decoder, cache, sampling
        self.generator = torch.Generator(decoder.device)
        self.tokens, self.positions = (
            _rows_of_zeros(cache.batch, decoder.device),
            _rows_of_zeros(cache.batch, decoder.device),
        )
        self.uniform = True
        self.graph: torch.cuda.CUDAGraph | None = None
        if decoder.device.type == "cuda":
            self._capture()
        # After the capture, whose warm-up drew numbers: what is sampled depends on the seed alone.
        self.generator.manual_seed(sampling.seed)

    @torch.inference_mode()
    def _capture(self) -> None:
        step = capturable_step(self.decoder, self.cache)

        def work() -> None:
            self.tokens.copy_(self.sampling.choose(step(self.tokens, self.positions), self.generator))

        self.graph = capture(work, self.generator if self.sampling.temperature else None)
        self.cache.reset()

    @torch.inference_mode()
    def begin(self, logits: Tensor, lengths: Sequence[int]) -> Tensor:
        """The first new tokens [B], from the logits [B, V] of the prompts' last tokens.

        Args:
            lengths: of the prompts, which the cache now holds.
        """
        self.tokens.copy_(self.sampling.choose(logits, self.generator))
        self.positions.copy_(torch.tensor(lengths) - 1)
        self.uniform = len(set(lengths)) == 1
        self.cache.length = max(lengths)
        return self.tokens

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The next tokens [B], valid until the next step. Raises UserError where the cache is full."""
        decoder, cache = self.decoder, self.cache
        decoder.check_room(cache, 1)
        self.positions += 1
        if self.graph is not None:
            self.graph.replay()
            cache.length += 1
            return self.tokens
        if self.uniform:  # without a mask over the keys
            logits = decoder.step(self.tokens, cache)
        else:
            cache.length += 1
            logits = decoder.step_at(self.tokens, self.positions, cache, cache.length)
        self.tokens.copy_(self.sampling.choose(logits, self.generator))
        return self.tokens


def _refuse_full(cache: DecoderCache) -> None:
    if cache.length:
        raise ValueError("decoding is prepared before the prompt is read")


def _rows_of_zeros(batch: int, device: torch.device) -> Tensor:
    return torch.zeros(batch, dtype=torch.int64, device=device)
