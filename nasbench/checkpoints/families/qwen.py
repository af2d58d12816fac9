"""Qwen2 and Qwen2.5 (biases on q, k and v), Qwen3 (norms on q and k); the layers above one may be windows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from nasbench.checkpoints.families.family import Family, layer_kinds, placed, read_window, write_windows
from nasbench.checkpoints.fields import Fields
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement

if TYPE_CHECKING:
    from torch import Tensor


class Qwen2(Family):
    """Windows from layer `max_window_layers` on if `use_sliding_window`, or as `layer_types` says."""

    model_type: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"
    gguf: ClassVar[str] = "qwen2"
    qkv_bias: ClassVar[bool] = True

    def details(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        fields.neutral("attention_bias", self.qkv_bias)
        fields.neutral("use_mrope", False)
        window = read_window(fields, used=False)
        first, layers = fields.integer("max_window_layers", 28, least=0), sizes["num_layers"]
        return placed(fields, fields.items("layer_types", str, layers) or layer_kinds(layers, window, first), window)

    def own_config(self, spec: ModelSpec, placement: Placement) -> dict[str, Any]:
        types, window = write_windows(self, spec, placement)
        return super().own_config(spec, placement) | {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": types.index("sliding_attention") if window else spec.num_layers,
            "layer_types": types,
        }

    def split(self, name: str, tensor: Tensor, spec: ModelSpec, placement: Placement) -> Iterator[tuple[str, Tensor]]:
        yield from super().split(name, tensor, spec, placement)
        if self.qkv_bias:
            yield from zero_biases(name, tensor, spec, placement)


_INPUT = re.compile(r"(model\.layers\.(\d+)\.self_attn\.[qkv]_proj)\.weight")


def zero_biases(name: str, tensor: Tensor, spec: ModelSpec, placement: Placement) -> Iterator[tuple[str, Tensor]]:
    """The biases on q, k and v of an attention layer that a format has and the model does not."""
    match = _INPUT.fullmatch(name)
    if match and not spec.qkv_bias and spec.mixers(placement)[int(match[2])].is_attention:
        yield f"{match[1]}.bias", tensor.new_zeros(len(tensor))


class Qwen3(Qwen2):
    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    gguf: ClassVar[str] = "qwen3"
    head_dim: ClassVar[int | None] = 128
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = True
