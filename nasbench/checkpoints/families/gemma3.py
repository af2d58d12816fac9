"""Gemma 3, text only: norms before and after, stored as 1 + w; GeGLU; scaled embedding; five windows to a full layer,
each kind with a rotary base of its own; query and key norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from nasbench.checkpoints.families.family import Family, Place, placed, read_heads, write_windows
from nasbench.checkpoints.families.rope import read_rope, write_scaling
from nasbench.checkpoints.fields import Fields
from nasbench.checkpoints.gguf_header import GgufHeader
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement

if TYPE_CHECKING:
    from torch import Tensor


class Gemma3(Family):
    model_type: ClassVar[str] = "gemma3_text"
    architecture: ClassVar[str] = "Gemma3ForCausalLM"
    modules: ClassVar[dict[str, str]] = {
        "mixer_post_norm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    }
    norm_shift: ClassVar[float] = 1.0
    gguf: ClassVar[str] = "gemma3"
    gguf_modules: ClassVar[dict[str, str]] = {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    tied: ClassVar[bool] = True
    head_dim: ClassVar[int | None] = 256
    activation: ClassVar[tuple[str, str]] = ("hidden_activation", "gelu_pytorch_tanh")
    qk_norm: ClassVar[bool] = True

    def details(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        for name in ("attention_bias", "use_bidirectional_attention"):
            fields.neutral(name, False)
        # transformers does not look for the trained context beside nested rotary parameters.
        for name in ("final_logit_softcapping", "attn_logit_softcapping", "original_max_position_embeddings"):
            fields.neutral(name)
        fields.neutral("hidden_act", "gelu_pytorch_tanh")
        queries = (sizes["head_dim"] / fields.number("query_pre_attn_scalar", 256)) ** 0.5
        layers, window = sizes["num_layers"], fields.integer("sliding_window", 4096)
        fields.raw("_sliding_window_pattern")  # written beside layer_types, never read by transformers
        every = fields.integer("sliding_window_pattern", 6)
        kinds = fields.items("layer_types", str, layers) or [
            "sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)
        ]
        scale = float(sizes["hidden_size"] ** 0.5)
        return placed(fields, kinds, window) | {"post_norms": True, "embedding_scale": scale, "query_scale": queries}

    def rope(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        ropes = fields.object("rope_parameters")
        full, local = ropes.object("full_attention"), ropes.object("sliding_attention")
        if fields.raw("rope_scaling"):
            full = Fields({**full.data, **fields.object("rope_scaling").data}, full.where)
        full.neutral("truncate", True)  # transformers reads it beside the nested parameters alone
        base = fields.number("rope_local_base_freq", 10_000.0)
        local.neutral("rope_type", "default")
        ropes.finish(())
        window_theta = local.number("rope_theta", base)
        local.finish(())
        # The context of a Gemma is that after the scaling.
        context = {"window_rope_theta": window_theta, "max_context": sizes["max_context"]}
        return read_rope(full, fields, 1_000_000.0) | context

    def place(self, name: str, spec: ModelSpec) -> Place | None:
        """The norm of queries also holds their scale."""
        place = super().place(name, spec)
        return replace(place, scale=spec.query_scale) if place and name.endswith("q_norm.weight") else place

    def split(self, name: str, tensor: Tensor, spec: ModelSpec, placement: Placement) -> Iterator[tuple[str, Tensor]]:
        scaled = name.endswith("self_attn.q_norm.weight") and spec.query_scale != 1
        yield from super().split(name, tensor / spec.query_scale if scaled else tensor, spec, placement)

    def own_config(self, spec: ModelSpec, placement: Placement) -> dict[str, Any]:
        types, window = write_windows(self, spec, placement)
        config = super().own_config(spec, placement)
        local = spec.window_rope_theta or spec.rope_theta
        return config | {
            "max_position_embeddings": spec.max_context,
            "query_pre_attn_scalar": round(spec.head_dim / spec.query_scale**2),
            "sliding_window": window or 4096,
            "layer_types": types,
            "rope_local_base_freq": local,
            "rope_parameters": {
                "full_attention": config["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
            "rope_scaling": write_scaling(spec.rope_scaling) or None,
        }

    def gguf_config(self, keys: Fields, header: GgufHeader) -> dict[str, Any]:
        names = ("attention.head_count", "embedding_length", "attention.key_length")
        heads, hidden, head_dim = read_heads(keys, *names, None)
        return {
            "sliding_window": keys.integer("attention.sliding_window"),
            # llama.cpp knows the 27B by its 62 layers.
            "query_pre_attn_scalar": hidden // heads if keys.integer("block_count") == 62 else head_dim,
            "rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0),
        }
