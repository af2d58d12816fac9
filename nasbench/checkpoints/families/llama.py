"""Llama 2 and 3.x, and SmolLM2."""

from __future__ import annotations

from typing import Any, ClassVar

from nasbench.checkpoints.families.family import Family, placed
from nasbench.checkpoints.families.rope import write_scaling
from nasbench.checkpoints.fields import Fields
from nasbench.checkpoints.gguf_header import GgufHeader, read_tensor
from nasbench.core.errors import UserError


class Llama(Family):
    """The plain form, without biases."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    gguf: ClassVar[str] = "llama"
    gguf_unused: ClassVar[tuple[str, ...]] = ("rope_freqs.weight",)
    gguf_interleaved: ClassVar[bool] = True

    def details(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        fields.neutral("attention_bias", False)
        fields.neutral("mlp_bias", False)
        fields.neutral("pretraining_tp", 1, 0)
        return placed(fields, fields.items("layer_types", str, sizes["num_layers"]) or [], None)

    def gguf_config(self, keys: Fields, header: GgufHeader) -> dict[str, Any]:
        """GGUF files hold Llama 3's scaling as the divisors of the frequencies: one of the published two."""
        config = super().gguf_config(keys, header)
        if "rope_freqs.weight" not in header.tensors:
            return config
        import numpy as np

        divisors = read_tensor(header.tensors["rope_freqs.weight"])
        frequencies = keys.number("rope.freq_base", 10_000.0) ** -(np.arange(len(divisors)) / len(divisors))
        kept = np.clip((8192 * frequencies / (2 * np.pi) - 1.0) / (4.0 - 1.0), 0, 1)
        for factor in (8.0, 32.0):
            if np.allclose(divisors * (kept + (1 - kept) / factor), 1, rtol=1e-3):
                return config | {"rope_scaling": write_scaling(("llama3", factor, 1.0, 4.0, 8192.0))}
        raise UserError(f"{header.path}: rope_freqs is not Llama 3's scaling by 8 or 32: use the Hugging Face folder")
