"""Qwen3-MoE: Qwen3 whose FFNs are mixtures of experts. Checkpoints name the experts' matrices one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from nasbench.checkpoints.families.family import Family, Place, layer_kinds, placed, read_window, write_windows
from nasbench.checkpoints.fields import Fields
from nasbench.checkpoints.gguf_header import GgufHeader
from nasbench.core.errors import UserError
from nasbench.model.ffn.spec import MixtureSpec
from nasbench.model.shapes import ModelSpec
from nasbench.model.spec import specs_of
from nasbench.spaces.placement import Placement

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_EXPERT = re.compile(r"(.+\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


class Qwen3Moe(Family):
    """Layers that `mlp_only_layers` or `decoder_sparse_step` leave out have a plain FFN."""

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    gguf: ClassVar[str] = "qwen3moe"
    gguf_modules: ClassVar[dict[str, str]] = {
        "ffn_gate_inp": "mlp.gate",
        **{f"ffn_{name}_exps": f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")},
    }
    qk_norm: ClassVar[bool] = True

    def details(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        fields.neutral("attention_bias", False)
        fields.raw("max_window_layers")
        window = read_window(fields, used=False)
        experts = fields.integer("num_experts", fields.integer("num_local_experts", None), most=1 << 16)
        if experts is None:
            raise UserError(f"{fields.where} lacks the field num_experts")
        chosen = fields.integer("num_experts_per_tok", 8)
        raw = "" if fields.flag("norm_topk_prob") else ":raw"
        mixture = f"moe@{experts}x{chosen}x{fields.integer('moe_intermediate_size', 768, most=1 << 24)}{raw}"
        plain = set(fields.items("mlp_only_layers", int) or [])
        step = fields.integer("decoder_sparse_step", 1)
        layers = sizes["num_layers"]
        ffn = tuple("gated" if i in plain or (i + 1) % step else mixture for i in range(layers))
        return placed(fields, layer_kinds(layers, window), window) | {"ffn": ffn}

    def own_config(self, spec: ModelSpec, placement: Placement) -> dict[str, Any]:
        _, window = write_windows(self, spec, placement)
        mixtures = set(specs_of(MixtureSpec, spec.ffns()))
        if len(mixtures) != 1:
            raise self.no_place(spec, f"{len(mixtures)} kinds of mixtures")
        (mixture,) = mixtures
        return super().own_config(spec, placement) | {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, ffn in enumerate(spec.ffns()) if ffn != mixture],
            "num_experts": mixture.experts,
            "num_experts_per_tok": mixture.chosen,
            "moe_intermediate_size": mixture.width,
            "norm_topk_prob": mixture.normalised,
        }

    def place(self, name: str, spec: ModelSpec) -> Place | None:
        match = _EXPERT.fullmatch(name)
        if match is None:
            return super().place(name, spec)
        layer, expert = match[1], int(match[2])
        if match[3] == "down":
            return Place(f"{layer}.down", (expert,))
        width = specs_of(MixtureSpec, spec.ffns())[0].width
        return Place(f"{layer}.gate_up", (expert, slice(0, width) if match[3] == "gate" else slice(width, 2 * width)))

    def split(self, name: str, tensor: Tensor, spec: ModelSpec, placement: Placement) -> Iterator[tuple[str, Tensor]]:
        module, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up", "down"):
            yield from super().split(name, tensor, spec, placement)
            return
        for number, matrix in enumerate(tensor):
            parts = ("down",) if leaf == "down" else ("gate", "up")
            for part, values in zip(parts, matrix.chunk(len(parts)), strict=True):
                yield f"{module}.experts.{number}.{part}_proj.weight", values

    def gguf_config(self, keys: Fields, header: GgufHeader) -> dict[str, Any]:
        return {
            "num_experts": keys.integer("expert_count"),
            "num_experts_per_tok": keys.integer("expert_used_count"),
            "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
            "norm_topk_prob": True,
        }

    def from_gguf(self, name: str, values: np.ndarray, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        for ours, found in super().from_gguf(name, values, config):
            module, _, leaf = ours.partition(".experts.")
            if not leaf:
                yield ours, found
            else:
                yield from ((f"{module}.experts.{i}.{leaf}", matrix) for i, matrix in enumerate(found))
