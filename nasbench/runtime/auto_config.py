"""The configuration of our checkpoints for transformers."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from nasbench.checkpoints.families import Hybrid


class NasbenchConfig(PreTrainedConfig):
    """Any fields of config.json. `fields` has them as they were read: transformers moves some."""

    model_type = Hybrid.model_type

    def __init__(self, fields: dict[str, Any] | None = None, **known: Any) -> None:
        super().__init__(**known)
        self.fields = fields or {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        known = {name: value for name, value in config_dict.items() if not name.startswith("rope_")}
        return super().from_dict({**known, "fields": dict(config_dict)}, **options)

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it, so that nasbench reads it again."""
        found = super().to_dict()
        fields = found.pop("fields", {})
        return {**found, **fields}


def register() -> None:
    AutoConfig.register(NasbenchConfig.model_type, NasbenchConfig, exist_ok=True)
