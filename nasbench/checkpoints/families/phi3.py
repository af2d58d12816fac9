"""Phi-3, 3.5 and 4: projections packed in one matrix; a part of each head may be rotated alone; longrope."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from nasbench.checkpoints.families.family import Family, layer_kinds, placed, read_heads, write_windows
from nasbench.checkpoints.fields import Fields
from nasbench.checkpoints.gguf_header import GgufHeader, read_tensor
from nasbench.core.errors import UserError
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement

if TYPE_CHECKING:
    from torch import Tensor

_FACTORS = ("short", "long")
_PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
_PACKED = re.compile(r"(model\.layers\.\d+\.(?:self_attn|mlp))\.(qkv|gate_up)_proj\.weight")


class Phi3(Family):
    """`sliding_window` is of every layer, null or absent for full attention."""

    model_type: ClassVar[str] = "phi3"
    architecture: ClassVar[str] = "Phi3ForCausalLM"
    gguf: ClassVar[str] = "phi3"
    gguf_modules: ClassVar[dict[str, str]] = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    gguf_unused: ClassVar[tuple[str, ...]] = tuple(f"rope_factors_{name}.weight" for name in _FACTORS)
    rms_eps: ClassVar[float] = 1e-5
    partial_rotation: ClassVar[bool] = True

    def details(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        for name in ("resid_pdrop", "embd_pdrop"):  # of the training
            fields.raw(name)
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            fields.neutral(name, False)
        fields.neutral("full_attn_mod", 1)
        fields.neutral("interpolate_factor", 1)
        window = fields.integer("sliding_window", None)
        return placed(fields, layer_kinds(sizes["num_layers"], window), window)

    def rope(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        """The trained context stands outside the rotary parameters, 4096 where it is absent; `su` is longrope."""
        outer: dict[str, Any] = {"original_max_position_embeddings": 4096, **fields.data}
        for name in ("rope_scaling", "rope_parameters"):
            values = fields.object(name).data
            kind = values.get("rope_type", values.get("type"))
            outer |= {name: {**values, "rope_type": "longrope"}} if kind in ("su", "yarn") else {}
        read = Fields(outer, fields.where)
        found = super().rope(read, sizes)
        for name in ("original_max_position_embeddings", "rope_theta", "partial_rotary_factor", "rope_interleaved"):
            fields.raw(name)
        return found

    def gguf_config(self, keys: Fields, header: GgufHeader) -> dict[str, Any]:
        """GGUF files hold longrope as two tensors of factors and what cosine and sine are multiplied by."""
        head_dim = read_heads(keys, "attention.head_count", "embedding_length", "attention.key_length", None)[2]
        found: dict[str, Any] = {
            "sliding_window": keys.integer("attention.sliding_window", 0, least=0) or None,
            "partial_rotary_factor": keys.integer("rope.dimension_count", head_dim) / head_dim,
        }
        tensors = [header.tensors[name] for name in self.gguf_unused if name in header.tensors]
        if tensors:
            keys.neutral("rope.scaling.type", "longrope")
            if len(tensors) < len(_FACTORS):
                raise UserError(f"{header.path} has {tensors[0].name} alone of the two factors of longrope")
            lists = {
                f"{name}_factor": read_tensor(tensor).tolist() for name, tensor in zip(_FACTORS, tensors, strict=True)
            }
            attention = keys.number("rope.scaling.attn_factor", 1.0)
            found["rope_scaling"] = {"rope_type": "longrope", "attention_factor": attention, **lists}
            found["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        return found

    def own_config(self, spec: ModelSpec, placement: Placement) -> dict[str, Any]:
        _, window = write_windows(self, spec, placement)
        scaling = spec.rope_scaling
        return super().own_config(spec, placement) | {
            "sliding_window": window,
            "original_max_position_embeddings": int(scaling[2]) if scaling[:1] == ("longrope",) else spec.max_context,
        }

    def unpack(self, name: str, tensor: Tensor, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
        match = _PACKED.fullmatch(name)
        if match is None:
            yield from super().unpack(name, tensor, spec)
            return
        sizes = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim)
        ends = (0, sizes[0], sum(sizes), None) if match[2] == "qkv" else (0, spec.intermediate_size, None)
        for part, (begin, end) in zip(_PARTS[match[2]], pairwise(ends), strict=True):
            yield from super().unpack(f"{match[1]}.{part}_proj.weight", tensor[begin:end], spec)

    def pack(self, tensors: dict[str, Tensor], spec: ModelSpec, placement: Placement) -> dict[str, Tensor]:
        import torch

        found = super().pack(tensors, spec, placement)
        for i, mixer in enumerate(spec.mixers(placement)):
            rooms = {"qkv": "self_attn", "gate_up": "mlp"} if mixer.is_attention else {"gate_up": "mlp"}
            for packed, room in rooms.items():
                name = f"model.layers.{i}.{room}.{{}}_proj.weight"
                found[name.format(packed)] = torch.cat([found.pop(name.format(part)) for part in _PARTS[packed]])
        return found
