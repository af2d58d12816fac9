"""Our own decoder: pre-norm blocks around any token mixers, with static caches.

Module names are those of published checkpoints (Llama, Qwen2, Qwen3, Jet-Nemotron), so a state_dict is a checkpoint:
`model.embed_tokens`, `model.layers.N.{input_layernorm, self_attn, post_attention_layernorm, mlp}`, `model.norm`, and
`lm_head` where the output matrix is not the embedding's.

Shapes: B sequences, T tokens, C hidden size, V vocabulary, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.core.errors import UserError
from nasbench.model import fused
from nasbench.model.block import Chunk, MixerCache, Step, TokenMixer
from nasbench.model.packed import StackedProjections
from nasbench.model.rotary import rotary_tables
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the feed-forward of every family here."""

    def __init__(self, shape: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)
        self.stacked = StackedProjections((self.gate_proj, self.up_proj))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.stacked(x)
        return self.down_proj(F.silu(gate) * up)

    def step(self, x: Tensor) -> Tensor:
        """The same for one new token of every sequence, x [B, 1, C], by fused kernels where they run."""
        if not fused.usable(x):
            return self(x)
        rows = x[:, 0]
        weight, _ = self.stacked.matrices()
        if rows.shape[0] == 1:
            inner = fused.ops().gemv(rows, weight, swiglu=True)
        else:
            inner = fused.ops().swiglu(F.linear(rows, weight))
        return fused.linear(inner, self.down_proj.weight)[:, None]


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, norm: nn.RMSNorm, mixer: TokenMixer, mlp_norm: nn.RMSNorm, mlp: GatedMLP) -> None:
        super().__init__()
        self.input_layernorm = norm
        self.self_attn = mixer
        self.post_attention_layernorm = mlp_norm
        self.mlp = mlp

    def with_mixer(self, mixer: TokenMixer) -> DecoderLayer:
        """A layer that shares this one's norms and MLP and has another mixer."""
        return DecoderLayer(self.input_layernorm, mixer, self.post_attention_layernorm, self.mlp)

    def attention_input(self, x: Tensor) -> Tensor:
        """What the mixer sees of the residual stream x [B, T, C]."""
        return self.input_layernorm(x)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer: residual stream x and the mixer's output, both [B, T, C]."""
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, chunk: Chunk, cache: MixerCache | None = None) -> Tensor:
        return self.finish(x, self.self_attn(self.attention_input(x), chunk, cache))

    def step(self, x: Tensor, step: Step, cache: MixerCache) -> Tensor:
        """One new token of every sequence, x [B, 1, C]."""
        x = x + self.self_attn.step(self.attention_input(x), step, cache)
        return x + self.mlp.step(self.post_attention_layernorm(x))


class DecoderCache:
    """The caches of all layers and how many tokens they hold.

    Attributes:
        mixers: one cache per layer.
        length: tokens held, the same for every sequence; kept on the host.
        context: most tokens it was allocated for.
    """

    def __init__(self, mixers: list[MixerCache], batch: int, context: int) -> None:
        self.mixers = mixers
        self.batch = batch
        self.context = context
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Allocated bytes of keys, values and recurrent states."""
        return sum(cache.nbytes for cache in self.mixers)

    @property
    def history_nbytes(self) -> int:
        """Allocated bytes of the inputs that short convolutions keep."""
        return sum(cache.history_nbytes for cache in self.mixers)

    def reset(self) -> None:
        for cache in self.mixers:
            cache.reset()
        self.length = 0

    def fill_random(self, length: int, generator: torch.Generator | None = None) -> None:
        """Random contents, as if `length` tokens had been read. Caches of one shape get the same contents, each in its
        own memory: drawing numbers takes a CPU many times longer than copying them."""
        if not 0 <= length <= self.context:
            raise UserError(f"cannot fill a cache of {self.context} tokens with {length}")
        drawn: dict[tuple[object, ...], dict[str, Tensor]] = {}
        for cache in self.mixers:
            tensors = {**cache.state, **cache.history}
            key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
            if key not in drawn:
                cache.fill_random(generator)
                drawn[key] = tensors
                continue
            for name, tensor in tensors.items():
                tensor.copy_(drawn[key][name])
        self.length = length


class _RotaryMemo:
    """Rotary tables of positions 0..n-1, one pair per device, grown by doubling. Decoders over the same weights share
    one memo. Plain attributes, not buffers: a checkpoint has no place for them and a dtype change must not touch them.
    """

    def __init__(self, shape: ModelSpec) -> None:
        self.shape = shape
        self.tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def upto(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [at least `length`, D] fp32."""
        known = self.tables.get(device)
        if known is None or known[0].shape[0] < length:
            size = min(max(256, 1 << (length - 1).bit_length()), max(length, self.shape.max_context))
            # Tables made under inference_mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                known = rotary_tables(self.shape.layer, torch.arange(size, device=device))
            self.tables[device] = known
        return known


class _Body(nn.Module):
    """What published checkpoints call `model`."""

    def __init__(self, embed_tokens: nn.Embedding, layers: Sequence[DecoderLayer], norm: nn.RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class Decoder(nn.Module):
    """A decoder-only language model whose layers have any mixers.

    Built on torch's default device and dtype with torch's initial weights; `nasbench.checkpoints.load` fills it.
    """

    def __init__(self, shape: ModelSpec, placement: Placement) -> None:
        super().__init__()
        self.shape = shape
        self.placement = placement
        layers = [
            DecoderLayer(
                nn.RMSNorm(shape.hidden_size, shape.rms_eps),
                config.build(),
                nn.RMSNorm(shape.hidden_size, shape.rms_eps),
                GatedMLP(shape),
            )
            for config in shape.mixers(placement)
        ]
        embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.model = _Body(embed, layers, nn.RMSNorm(shape.hidden_size, shape.rms_eps))
        # Tied models have no `lm_head` in their checkpoints, and a second name for one tensor breaks safetensors.
        self.lm_head = None if shape.tie_embeddings else nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self._rotary = _RotaryMemo(shape)

    def with_mixers(self, mixers: Sequence[TokenMixer], placement: Placement) -> Self:
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
    def mixers(self) -> list[TokenMixer]:
        return [layer.self_attn for layer in self.layers]

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def new_cache(self, batch: int, context: int) -> DecoderCache:
        """An empty cache of `batch` sequences of at most `context` tokens. Raises UserError beyond the model's."""
        self._check_context(context)
        # Tensors made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            caches = [mixer.new_cache(batch, context, device=self.device, dtype=self.dtype) for mixer in self.mixers]
        return DecoderCache(caches, batch, context)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int64 -> [B, T, C]."""
        return self.model.embed_tokens(tokens)

    def chunk(self, start: int, tokens: int) -> Chunk:
        """Where `tokens` new tokens stand after `start` earlier ones. Raises UserError beyond the model's context."""
        end = start + tokens
        self._check_context(end)
        cos, sin = self._rotary.upto(end, self.device)
        return Chunk(start, cos[start:end], sin[start:end])

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions 0 to at least length - 1, [.., D] fp32, on the decoder's device."""
        return self._rotary.upto(length, self.device)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, [V, C]: the embedding's where they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, tokens: Tensor, cache: DecoderCache | None = None) -> Tensor:
        """tokens [B, T] -> final normalised hidden states [B, T, C]; with a cache, continues after its tokens."""
        start = 0
        if cache is not None:
            self.check_room(cache, tokens.shape[1])
            start = cache.length
        chunk = self.chunk(start, tokens.shape[1])
        x = self.embed(tokens)
        mixer_caches = [None] * len(self.model.layers) if cache is None else cache.mixers
        if fused.usable(x):
            hidden = self._fused_hidden(x, chunk, mixer_caches)
        else:
            for layer, mixer_cache in zip(self.model.layers, mixer_caches, strict=True):
                x = layer(x, chunk, mixer_cache)
            hidden = self.model.norm(x)
        if cache is not None:
            cache.length = start + tokens.shape[1]
        return hidden

    def _fused_hidden(self, x: Tensor, chunk: Chunk, caches: Sequence[MixerCache | None]) -> Tensor:
        """The layers and the last norm on embeddings x [B, T, C], which it adds to in place: residual addition and norm
        are one kernel, and so is SwiGLU."""
        ops = fused.ops()
        delta: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            norm, mlp_norm, mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
            mixed = layer.self_attn(ops.add_norm(x, delta, norm.weight, norm.eps), chunk, cache)
            weight, _ = mlp.stacked.matrices()
            inner = F.linear(ops.add_norm(x, mixed.contiguous(), mlp_norm.weight, mlp_norm.eps), weight)
            delta = mlp.down_proj(ops.swiglu(inner))
        return ops.add_norm(x, delta, self.model.norm.weight, self.model.norm.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states [..., C] -> [..., V]."""
        return F.linear(hidden, self.head_weight)

    def forward(self, tokens: Tensor, cache: DecoderCache | None = None) -> Tensor:
        """tokens [B, T] int64 -> logits [B, T, V]; with a cache, continues after its tokens (chunked prefill)."""
        return self.logits(self.hidden(tokens, cache))

    def step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """One new token of every sequence, tokens [B] int64 -> logits [B, V]; all stand at `cache.length`."""
        self.check_room(cache, 1)
        span = cache.length + 1
        cos, sin = self._rotary.upto(span, self.device)
        positions = torch.full((tokens.shape[0],), span - 1, device=self.device)
        rows = (tokens.shape[0], 1, cos.shape[1])
        step = Step(positions, span, True, cos[span - 1].expand(rows), sin[span - 1].expand(rows))
        logits = self._step(tokens, step, cache)
        cache.length = span
        return logits

    def step_at(self, tokens: Tensor, positions: Tensor, cache: DecoderCache, span: int | None = None) -> Tensor:
        """As `step`, each sequence at its own position: for CUDA graphs, where the host may not know it.

        Args:
            positions: [B] int64 on the device. `cache.length` is neither read nor advanced.
            span: host-side bound, no position reaches it; default the cache's context.
        """
        span = cache.context if span is None else span
        cos, sin = self._rotary.upto(span, self.device)
        return self._step(tokens, Step(positions, span, False, cos[positions, None], sin[positions, None]), cache)

    def _step(self, tokens: Tensor, step: Step, cache: DecoderCache) -> Tensor:
        x = self.embed(tokens[:, None])
        for layer, mixer_cache in zip(self.model.layers, cache.mixers, strict=True):
            x = layer.step(x, step, mixer_cache)  # type: ignore[operator]
        return self.logits(self.model.norm(x))[:, 0]

    def check_room(self, cache: DecoderCache, tokens: int) -> None:
        """Raises UserError if `tokens` more do not fit in the cache."""
        if cache.length + tokens > cache.context:
            raise UserError(f"{cache.length + tokens} tokens do not fit in a cache of {cache.context}")

    def _check_context(self, context: int) -> None:
        if not 1 <= context <= self.shape.max_context:
            raise UserError(f"context {context} is beyond {self.shape.name}'s: choose 1 to {self.shape.max_context}")
