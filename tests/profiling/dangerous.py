"""A layer kind that dies in every way a block can, installed as another package would be.

`Z1` is harmless; the others kill the process that takes their first step, or never return from it.
"""

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from nasbench.model.block import Block, BlockCache
from nasbench.model.meta import StepMeta
from nasbench.model.spec import MixerSpec, parse_ints

HARMLESS, KILLED, LEFT, HUNG, CRASHED, GREEDY = range(1, 7)


@dataclass(frozen=True)
class DangerousConfig(MixerSpec):
    """Z: what its argument says."""

    ending: int = HARMLESS
    kind: ClassVar[str] = "Z"
    title: ClassVar[str] = "dangerous"

    @classmethod
    def parse(cls, shape, args):
        return cls(shape, *parse_ints("Z", args or "1", ("ending",)))

    @property
    def args(self):
        return str(self.ending)

    def cache_bytes(self, batch, context, dtype_bytes=2):
        return 4 * batch

    def parameters(self):
        return 1

    def flops(self, tokens, context):
        return tokens * context  # a kind that does the same at every context is measured at one

    @classmethod
    def block_class(cls):
        return Dangerous


class Dangerous(Block):
    def __init__(self, spec):
        super().__init__(spec)
        self.scale = torch.nn.Parameter(torch.ones(1))

    @property
    def out(self):
        return None

    def core(self, row, meta, cache=None):
        return row * self.scale

    def run(self, stream, norm, meta, cache=None, post_norm=None):
        if isinstance(meta, StepMeta) and meta.max_seqlen == 64:
            self.end()
        stream.add(self.core(stream.normed(norm), meta), post_norm)

    def new_cache(self, batch, context, *, device, dtype):
        return BlockCache(context, {"state": torch.zeros(batch, device=device)})

    def end(self):
        match self.spec.ending:
            case 2:
                os.kill(os.getpid(), signal.SIGKILL)
            case 3:
                os._exit(3)
            case 4:
                time.sleep(1000)
            case 5:
                ctypes.string_at(0)
            case 6:
                torch.empty(1 << 55)

    @classmethod
    def init_from_attention(cls, spec, attention):
        return cls(spec)
