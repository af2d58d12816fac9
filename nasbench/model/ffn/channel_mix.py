"""RWKV7's channel mixing: an FFN with squared ReLU that sees the token before, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.model import fused
from nasbench.model.block import Block, BlockCache
from nasbench.model.ffn.spec import ChannelMixSpec
from nasbench.model.meta import Meta, SequenceMeta, StepMeta
from nasbench.model.packed import PackedProjections
from nasbench.model.shift import PREVIOUS, shift_cache, shifted
from nasbench.model.stream import Stream


class ChannelMix(Block):
    """Its projection reads a mix of two tokens, so `core` takes the normalised input."""

    spec: ChannelMixSpec
    supports_packed_documents = True

    def __init__(self, spec: ChannelMixSpec) -> None:
        super().__init__(spec)
        self.mix = nn.Parameter(torch.zeros(spec.hidden_size))
        self.key = nn.Linear(spec.hidden_size, spec.width, bias=False)
        self.value = nn.Linear(spec.width, spec.hidden_size, bias=False)
        self.packed = PackedProjections((self.key,))

    @property
    def out(self) -> nn.Linear:
        return self.value

    def new_cache(self, batch: int, context: int, *, device: torch.device | str, dtype: torch.dtype) -> BlockCache:
        """The last token's input."""
        return shift_cache(batch, context, self.spec.hidden_size, device, dtype)

    def features(self, stream: Stream, norm: nn.Module | None, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        return stream.core(self, stream.normed(norm), meta, cache)

    def core(self, row: Tensor, meta: Meta, cache: BlockCache | None = None) -> Tensor:
        """Normalised input [B, T, C] -> [B, T, width]."""
        return F.relu(self.key(row + (shifted(row, meta, cache) - row) * self.mix)).square()

    def train_core(self, row: Tensor, meta: SequenceMeta) -> Tensor:
        return self.core(row, meta)

    def decode_core(self, row: Tensor, meta: StepMeta, cache: BlockCache | None, active: Tensor | None) -> Tensor:
        from nasbench_kernels.rwkv7.decode import token_mix

        assert cache is not None
        mixed = token_mix(row[:, 0], cache.conv_state[PREVIOUS], self.mix[None], 1)[0]
        return F.relu(fused.linear(mixed, self.key.weight)).square()
