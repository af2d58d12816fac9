"""Mistral: Llama whose layers may all be windows."""

from __future__ import annotations

from typing import Any, ClassVar

from nasbench.checkpoints.families.family import Family, layer_kinds, placed, read_window, write_windows
from nasbench.checkpoints.fields import Fields
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement


class Mistral(Family):
    """`sliding_window` is of every layer; null for full attention, 4096 where it is absent."""

    model_type: ClassVar[str] = "mistral"
    architecture: ClassVar[str] = "MistralForCausalLM"

    def details(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        fields.neutral("use_sliding_window", True)  # Qwen's: here it would have no effect
        window = read_window(fields)
        return placed(fields, layer_kinds(sizes["num_layers"], window), window)

    def own_config(self, spec: ModelSpec, placement: Placement) -> dict[str, Any]:
        _, window = write_windows(self, spec, placement)
        return super().own_config(spec, placement) | {"sliding_window": window}
