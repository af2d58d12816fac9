"""SmolLM3: Llama with some layers that have no rotary positions; those may be windows."""

from __future__ import annotations

from typing import Any, ClassVar

from nasbench.checkpoints.families.family import Family, placed, write_windows
from nasbench.checkpoints.fields import Fields
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement


class SmolLM3(Family):
    """`no_rope_layers` has a 0 for each layer without positions; absent, every `no_rope_layer_interval`-th layer."""

    model_type: ClassVar[str] = "smollm3"
    architecture: ClassVar[str] = "SmolLM3ForCausalLM"
    gguf: ClassVar[str] = "smollm3"  # llama.cpp, too, leaves every fourth layer without positions
    gguf_interleaved: ClassVar[bool] = True
    tied: ClassVar[bool] = True
    kv_heads: ClassVar[int | None] = 4
    rope_theta: ClassVar[float] = 2_000_000.0

    def details(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        for name in ("attention_bias", "mlp_bias"):
            fields.neutral(name, False)
        layers, every = sizes["num_layers"], fields.integer("no_rope_layer_interval", 4)
        rotated = fields.items("no_rope_layers", int) or [int((i + 1) % every > 0) for i in range(layers)]
        if len(rotated) < layers or set(rotated) - {0, 1}:
            raise fields.wrong("no_rope_layers", f"a list of 0 or 1 for each of {layers} layers")
        bare = tuple(i for i in range(layers) if not rotated[i])
        window, used = fields.integer("sliding_window", None), fields.flag("use_sliding_window")
        kinds = fields.items("layer_types", str, layers) or [
            "sliding_attention" if used and window and i in bare else "full_attention" for i in range(layers)
        ]
        return placed(fields, kinds, window) | {"no_rope": bare}

    def own_config(self, spec: ModelSpec, placement: Placement) -> dict[str, Any]:
        types, window = write_windows(self, spec, placement)
        return super().own_config(spec, placement) | {
            "no_rope_layers": [int(i not in spec.no_rope) for i in range(spec.num_layers)],
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": types,
        }
