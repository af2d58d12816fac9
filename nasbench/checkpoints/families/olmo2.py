"""OLMo 2: norms only after attention and FFN; the norms of queries and keys run over all heads together."""

from __future__ import annotations

from typing import Any, ClassVar

from nasbench.checkpoints.families.family import Family
from nasbench.checkpoints.fields import Fields


class Olmo2(Family):
    model_type: ClassVar[str] = "olmo2"
    architecture: ClassVar[str] = "Olmo2ForCausalLM"
    modules: ClassVar[dict[str, str]] = {
        "mixer_post_norm": "post_attention_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    }
    gguf: ClassVar[str] = "olmo2"
    gguf_modules: ClassVar[dict[str, str]] = {
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    rms_eps: ClassVar[float] = 1e-5
    qk_norm: ClassVar[bool] = True

    def details(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        fields.neutral("attention_bias", False)
        return {"pre_norms": False, "post_norms": True, "wide_qk_norm": True}
