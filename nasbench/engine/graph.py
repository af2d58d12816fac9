"""Decode steps over a static cache: a replayed CUDA graph on a GPU, ordinary calls elsewhere.

A decode step of a small model is a few hundred kernels of a few microseconds: launched one by one, the launches cost
more than the work (REFERENCES: 100 ms a step instead of a few).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nasbench.backbone.decoder import Decoder, DecoderCache
from nasbench.engine.fused_step import FusedStep
from nasbench.errors import MachineError

WARM_UP = 3
"""Calls before a capture: libraries pick their kernels and allocate their workspaces on the first ones."""


def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Records `work` on the current GPU. It runs a few times before, so what it writes must bear that.

    Raises:
        MachineError: a kernel of `work` cannot be captured, or memory is short.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise MachineError(f"the decode step cannot be captured in a CUDA graph: {error}") from error
    return graph


class Stepper:
    """Feeds one token per sequence after another through a decoder.

    Made on an empty cache, before the prompt: capturing a graph runs steps, which leave traces in the cache.
    """

    def __init__(self, decoder: Decoder, cache: DecoderCache) -> None:
        if cache.length:
            raise ValueError("a Stepper is made before the prompt is read")
        self.decoder, self.cache = decoder, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        if decoder.device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        decoder, cache = self.decoder, self.cache
        self.tokens = torch.zeros(cache.batch, dtype=torch.int64, device=decoder.device)
        self.positions = torch.zeros_like(self.tokens)
        decoder.chunk(0, cache.context)  # makes the rotary tables: a graph must not

        with torch.inference_mode():
            step = FusedStep(decoder, cache) if FusedStep.usable(decoder) else None

            def work() -> None:
                if step is None:
                    self.logits = decoder.step_at(self.tokens, self.positions, cache)
                else:
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
