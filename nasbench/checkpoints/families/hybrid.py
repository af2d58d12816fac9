"""nasbench's own format: a family's configuration, and a placement that the family's format cannot express."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from nasbench.checkpoints.families.family import FAMILIES, Family
from nasbench.checkpoints.fields import Fields
from nasbench.core.errors import UserError
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement, format_placement


class Hybrid(Family):
    """The family of `base_model_type` gives the tensors their names. No other engine takes the format for its own."""

    model_type: ClassVar[str] = "nasbench"
    architecture: ClassVar[str] = "NasbenchForCausalLM"

    def from_config(self, fields: Fields, name: str) -> ModelSpec:
        base = fields.text("base_model_type", choices=[name for name in FAMILIES if name != self.model_type])
        placement = fields.text("placement")
        spec = replace(FAMILIES[base]().from_config(fields, name), published_placement=placement)
        try:
            spec.parse(placement)
        except UserError as error:
            raise UserError(f"{fields.where}: {error}") from None
        return spec

    def own_config(self, spec: ModelSpec, placement: Placement) -> dict[str, Any]:
        complete = []
        for mixer in spec.mixers(placement):
            complete.append(f"{mixer.kind}{'@' if 'x' in mixer.args else ''}{mixer.args}")
        return FAMILIES[spec.family]().own_config(spec, ("A",) * spec.num_layers) | {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "base_model_type": spec.family,
            "placement": format_placement(tuple(complete)),
        }
