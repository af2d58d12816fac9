"""Our own decoder: any mixers and FFNs around one residual stream, with static caches.

Module names are those of Llama's checkpoints, which Qwen and Jet-Nemotron share: `model.embed_tokens`,
`model.layers.N.{input_layernorm, self_attn, post_attention_layernorm, mlp}`, `model.norm`, and `lm_head` where the
output matrix is not the embedding's. Checkpoints of families with other names are translated when they are read.

Shapes: B sequences, T tokens, C hidden size, V vocabulary, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.core.errors import UserError
from nasbench.model.block import Block, BlockCache, Sublayer, with_weights
from nasbench.model.documents import Documents
from nasbench.model.meta import Meta, RotaryTables, SequenceMeta, StepMeta
from nasbench.model.shapes import ModelSpec
from nasbench.model.spec import FFNSpec
from nasbench.model.stream import Stream, stream_for
from nasbench.spaces.placement import Placement


class DecoderLayer(nn.Module):
    """A mixer and an FFN, each with a norm before it (Identity where the family has none) and maybe one after it."""

    def __init__(
        self,
        norm: nn.Module,
        mixer: Block,
        ffn_norm: nn.Module,
        ffn: Block,
        mixer_post_norm: nn.Module | None = None,
        ffn_post_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.input_layernorm = norm
        self.self_attn = mixer
        self.mixer_post_norm = mixer_post_norm
        self.post_attention_layernorm = ffn_norm
        self.mlp = ffn
        self.ffn_post_norm = ffn_post_norm

    @property
    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        first, second = (
            None if isinstance(norm, nn.Identity) else norm
            for norm in (self.input_layernorm, self.post_attention_layernorm)
        )
        return (
            Sublayer(first, self.self_attn, self.mixer_post_norm),
            Sublayer(second, self.mlp, self.ffn_post_norm),
        )

    def with_mixer(self, mixer: Block) -> DecoderLayer:
        """A layer that shares this one's norms and FFN and has another mixer."""
        return DecoderLayer(
            self.input_layernorm, mixer, self.post_attention_layernorm, self.mlp,
            self.mixer_post_norm, self.ffn_post_norm,
        )  # fmt: skip

    def forward(self, x: Tensor, meta: SequenceMeta) -> Tensor:
        """Residual stream x [B, T, C] through the layer, without a cache; x is left as it is."""
        stream = stream_for(x, meta, in_place=False)
        for sublayer in self.sublayers:
            sublayer(stream, meta)
        return stream.content()

    def finish(self, x: Tensor, mixed: Tensor, meta: SequenceMeta) -> Tensor:
        """The rest of the layer: residual stream x and the mixer's output, both [B, T, C]."""
        mixer, ffn = self.sublayers
        stream = stream_for(x, meta, in_place=False)
        stream.add(mixed, mixer.post_norm)
        ffn(stream, meta)
        return stream.content()


class DecoderCache:
    """The caches of all layers and how many tokens they hold.

    Attributes:
        blocks: one cache per sublayer, mixers and FFNs in turn; None for blocks that keep nothing.
        length: tokens held, the same for every sequence; kept on the host.
        context: most tokens it was allocated for.
    """

    def __init__(self, blocks: list[BlockCache | None], batch: int, context: int) -> None:
        self.blocks = blocks
        self.batch = batch
        self.context = context
        self.length = 0

    @property
    def kept(self) -> list[BlockCache]:
        """The caches that there are."""
        return [cache for cache in self.blocks if cache is not None]

    @property
    def nbytes(self) -> int:
        """Allocated bytes of keys, values and recurrent states."""
        return sum(cache.nbytes for cache in self.kept)

    @property
    def conv_state_nbytes(self) -> int:
        """Allocated bytes of the inputs that short convolutions keep."""
        return sum(cache.conv_state_nbytes for cache in self.kept)

    def reset(self) -> None:
        for cache in self.kept:
            cache.reset()
        self.length = 0

    def fill_random(self, length: int, generator: torch.Generator | None = None) -> None:
        """Random contents, as if `length` tokens had been read. Caches of one shape get the same contents, each in its
        own memory: drawing numbers takes a CPU many times longer than copying them."""
        if not 0 <= length <= self.context:
            raise UserError(f"cannot fill a cache of {self.context} tokens with {length}")
        drawn: dict[tuple[object, ...], dict[str, Tensor]] = {}
        for cache in self.kept:
            tensors = cache.tensors
            key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
            if key not in drawn:
                cache.fill_random(generator)
                drawn[key] = tensors
                continue
            for name, tensor in tensors.items():
                tensor.copy_(drawn[key][name])
        self.length = length


class _Body(nn.Module):
    """What published checkpoints call `model`."""

    def __init__(self, embed_tokens: nn.Embedding, layers: Sequence[DecoderLayer], norm: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class Decoder(nn.Module):
    """A decoder-only language model whose layers have any mixers and FFNs.

    Built on torch's default device and dtype with torch's initial weights; `nasbench.checkpoints.load` fills it.
    """

    def __init__(self, shape: ModelSpec, placement: Placement) -> None:
        super().__init__()
        self.shape = shape
        self.placement = placement

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(shape.hidden_size, shape.rms_eps)

        def norms(wanted: bool, absent: Any, ffn: FFNSpec) -> list[Any]:
            return [norm() if wanted and there else absent for there in (True, ffn.kind != "none")]

        layers = []
        for mixer, ffn in zip(shape.mixers(placement), shape.ffns(), strict=False):
            before, after = norms(shape.pre_norms, nn.Identity(), ffn), norms(shape.post_norms, None, ffn)
            layers.append(DecoderLayer(before[0], mixer.build(), before[1], ffn.build(), *after))
        embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.model = _Body(embed, layers, norm())
        # Tied models have no `lm_head` in their checkpoints, and a second name for one tensor breaks safetensors.
        self.lm_head = None if shape.tie_embeddings else nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self._rotary = RotaryTables(shape.max_context)

    def with_mixers(self, mixers: Sequence[Block], placement: Placement) -> Self:
        """A decoder with other mixers that shares every other module: no weight is copied."""
        other = type(self).__new__(type(self))
        nn.Module.__init__(other)
        other.shape = self.shape
        other.placement = placement
        layers = [layer.with_mixer(mixer) for layer, mixer in zip(self.layers, mixers, strict=True)]
        other.model = _Body(self.model.embed_tokens, layers, self.model.norm)
        other.lm_head = self.lm_head
        other._rotary = self._rotary
        return other.train(self.training)

    @property
    def layers(self) -> list[DecoderLayer]:
        return list(self.model.layers)  # type: ignore[arg-type]

    @property
    def mixers(self) -> list[Block]:
        return [layer.self_attn for layer in self.layers]

    @property
    def sublayers(self) -> list[Sublayer]:
        """Every mixer and FFN in order, with its norms."""
        return [sublayer for layer in self.layers for sublayer in layer.sublayers]

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, [V, C]: the embedding's where they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def new_cache(self, batch: int, context: int) -> DecoderCache:
        """An empty cache of `batch` sequences of at most `context` tokens. Raises UserError beyond the model's."""
        self._check_context(context)
        # Tensors made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            caches = [
                sublayer.block.new_cache(batch, context, device=self.device, dtype=self.dtype)
                for sublayer in self.sublayers
            ]
        return DecoderCache(caches, batch, context)

    def prepare(self, context: int) -> None:
        """Makes what steps up to `context` look up: a CUDA graph must not. Raises UserError beyond the model's."""
        self._check_context(context)
        for rotary in {mixer.rotary for mixer in self.shape.mixers(self.placement)}:
            self._rotary.upto(rotary, context, self.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int64 -> [B, T, C]."""
        x = with_weights(self.model.embed_tokens, nn.Module.__call__, tokens)
        if self.shape.embedding_scale == 1.0:
            return x
        # Published code rounds the factor to the model's dtype before it multiplies.
        return x * float(torch.tensor(self.shape.embedding_scale, dtype=x.dtype))

    def sequence_meta(self, start: int, tokens: int, documents: Documents | None = None) -> SequenceMeta:
        """Where `tokens` new tokens stand after `start` earlier ones. Raises UserError beyond the model's context."""
        self._check_context(start + tokens)
        return SequenceMeta(self._rotary, self.device, start, tokens, documents)

    def begin(self, tokens: Tensor, documents: Documents | None = None) -> tuple[Tensor, SequenceMeta]:
        """The residual stream [B, T, C] of tokens [B, T] before the first layer, and where they stand."""
        return self.embed(tokens), self.sequence_meta(0, tokens.shape[1], documents)

    def step_meta(self, positions: Tensor, max_seqlen: int, equal_lengths: bool = False) -> StepMeta:
        """Where one new token of every sequence stands: positions [B] int64 on the device, each below max_seqlen."""
        return StepMeta(self._rotary, positions, max_seqlen, equal_lengths)

    def _run(self, stream: Stream, meta: Meta, cache: DecoderCache | None) -> None:
        sublayers = self.sublayers
        caches = [None] * len(sublayers) if cache is None else cache.blocks
        for sublayer, block_cache in zip(sublayers, caches, strict=True):
            sublayer(stream, meta, block_cache)

    def hidden(self, tokens: Tensor, cache: DecoderCache | None = None, documents: Documents | None = None) -> Tensor:
        """tokens [B, T] -> final normalised hidden states [B, T, C]; with a cache, continues after its tokens.

        Args:
            documents: of packed rows, without a cache.
        """
        start = 0
        if cache is not None:
            self.check_room(cache, tokens.shape[1])
            start = cache.length
        meta = self.sequence_meta(start, tokens.shape[1], documents)
        stream = stream_for(self.embed(tokens), meta)
        self._run(stream, meta, cache)
        if cache is not None:
            cache.length = start + tokens.shape[1]
        return stream.normed(self.model.norm)

    def hidden_by_layer(self, tokens: Tensor, documents: Documents | None = None) -> Tensor:
        """As `hidden` without a cache, by each layer's own forward, as a supernet runs it. In half precision
        the fused forms of whole prompts round in other places, which KL to a teacher would show."""
        x, meta = self.begin(tokens, documents)
        for layer in self.layers:
            x = layer(x, meta)
        return self.model.norm(x)

    @torch.no_grad()
    def nonfinite_layer(
        self,
        tokens: Tensor,
        documents: Documents | None = None,
        anywhere: Callable[[Tensor], bool] = lambda bad: bool(bad),
    ) -> str | None:
        """`layers.3.J`: the first layer whose output on tokens [B, T] is not finite, None where none is.

        Args:
            anywhere: whether a flag is set in any of the processes that share the weights.
        """
        x, meta = self.begin(tokens, documents)
        for i, (layer, name) in enumerate(zip(self.layers, self.placement, strict=True)):
            x = layer(x, meta)
            if anywhere(~x.isfinite().all()):
                return f"layers.{i}.{name}"
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states [..., C] -> [..., V]."""
        return F.linear(hidden, self.head_weight)

    def forward(self, tokens: Tensor, cache: DecoderCache | None = None) -> Tensor:
        """tokens [B, T] int64 -> logits [B, T, V]; with a cache, continues after its tokens (chunked prefill)."""
        return self.logits(self.hidden(tokens, cache))

    def step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """One new token of every sequence, tokens [B] int64 -> logits [B, V]; all stand at `cache.length`."""
        self.check_room(cache, 1)
        length = cache.length + 1
        positions = torch.full((tokens.shape[0],), length - 1, device=self.device)
        logits = self._step(tokens, self.step_meta(positions, length, equal_lengths=True), cache)
        cache.length = length
        return logits

    def step_at(self, tokens: Tensor, positions: Tensor, cache: DecoderCache, max_seqlen: int | None = None) -> Tensor:
        """As `step`, each sequence at its own position: for CUDA graphs, where the host may not know it.

        Args:
            positions: [B] int64 on the device. `cache.length` is neither read nor advanced.
            max_seqlen: host-side bound that every position is below; default the cache's context.
        """
        return self._step(tokens, self.step_meta(positions, max_seqlen or cache.context), cache)

    def _step(self, tokens: Tensor, meta: StepMeta, cache: DecoderCache) -> Tensor:
        stream = stream_for(self.embed(tokens[:, None]), meta)
        self._run(stream, meta, cache)
        return stream.logits(self.model.norm, self.head_weight)[:, 0]

    def check_room(self, cache: DecoderCache, tokens: int) -> None:
        """Raises UserError if `tokens` more do not fit in the cache."""
        if cache.length + tokens > cache.context:
            raise UserError(f"{cache.length + tokens} tokens do not fit in a cache of {cache.context}")

    def _check_context(self, context: int) -> None:
        if not 1 <= context <= self.shape.max_context:
            raise UserError(f"context {context} is beyond {self.shape.name}'s: choose 1 to {self.shape.max_context}")
