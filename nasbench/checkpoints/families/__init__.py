"""Families of checkpoints, one file each. Importing them imports no torch."""

from __future__ import annotations

from typing import Any

from nasbench.checkpoints.families.family import FAMILIES, Family
from nasbench.checkpoints.families.gemma3 import Gemma3
from nasbench.checkpoints.families.hybrid import Hybrid
from nasbench.checkpoints.families.jet_nemotron import JetNemotron
from nasbench.checkpoints.families.llama import Llama
from nasbench.checkpoints.families.mistral import Mistral
from nasbench.checkpoints.families.olmo2 import Olmo2
from nasbench.checkpoints.families.phi3 import Phi3
from nasbench.checkpoints.families.qwen import Qwen2, Qwen3
from nasbench.checkpoints.families.qwen3_moe import Qwen3Moe
from nasbench.checkpoints.families.smollm3 import SmolLM3
from nasbench.checkpoints.fields import Fields
from nasbench.core.errors import UserError, unknown
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement

__all__ = ["FAMILIES", "FORMATS", "Family", "read_spec", "write_config"]

for _family in (Llama, Mistral, Qwen2, Qwen3, Qwen3Moe, Gemma3, SmolLM3, Phi3, Olmo2, JetNemotron, Hybrid):
    FAMILIES.register(_family.model_type, _family)

FORMATS = ("hf", "jet-nemotron")


def read_spec(config: dict[str, Any], name: str, where: str) -> ModelSpec:
    """The specification that a config.json describes, its published placement included.

    Args:
        name: the specification's name.
        where: what error messages call the configuration, usually its path.
    """
    fields = Fields(config, where)
    return FAMILIES[fields.text("model_type", choices=FAMILIES)]().from_config(fields, name)


def write_config(spec: ModelSpec, placement: Placement, format: str = "hf") -> tuple[dict[str, Any], Family]:
    """(config.json, the family whose tensor names go with it) of a model.

    `hf` is the first format that transformers has and that can express the model: the family's own, Mistral's or
    Qwen2's (its windows in any layers; biases that the model lacks are zeros), else nasbench's. `jet-nemotron` is the
    published format, whatever the family. Raises UserError for what the format has no place for.
    """
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if format == "jet-nemotron":
        return JetNemotron().to_config(spec, placement), JetNemotron()
    own = FAMILIES[spec.family]()
    for family in (own, Mistral(), Qwen2()):
        try:
            return family.to_config(spec, placement), family
        except UserError:
            continue
    return Hybrid().to_config(spec, placement), own
