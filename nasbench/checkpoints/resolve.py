"""What a --model name means: a built-in shape, a local folder or GGUF file, or a hub name. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nasbench.checkpoints import fetch, gguf_file, hf_folder
from nasbench.core.errors import MachineError, UserError, unknown
from nasbench.model.shapes import DEFAULT_MODEL, MODELS, ModelSpec

_WITH_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ModelName:
    """A --model argument, classified.

    Attributes:
        kind: "default" (SmolLM2 with weights), "shape" (built in, no weights), "folder", "gguf" or "hub".
        value: shape name, path or hub name.
    """

    kind: Literal["default", "shape", "folder", "gguf", "hub"]
    value: str

    @property
    def has_weights(self) -> bool:
        return self.kind != "shape"


def classify(name: str) -> ModelName:
    """Which of the five a name is. What exists on the disk wins over a hub name. Raises UserError for none of them."""
    if name in ("default", DEFAULT_MODEL):
        return ModelName("default", DEFAULT_MODEL)
    if name in MODELS:
        return ModelName("shape", name)
    path = Path(name)
    if path.is_dir():
        return ModelName("folder", name)
    if path.suffix == ".gguf":
        return ModelName("gguf", name)
    if path.is_file():
        raise UserError(f"{name} is no model: give a folder with config.json and safetensors, or a .gguf file")
    if name.startswith((".", "/", "~")) or name.endswith("/"):
        raise UserError(f"no such model folder: {name}")
    if _HUB_NAME.fullmatch(name):
        return ModelName("hub", name)
    error = unknown("model", name, ("default", *MODELS))
    raise UserError(f"{error}; or give a local folder, a .gguf file or a hub name (org/name)")


def resolve_shape(name: str) -> ModelSpec:
    """The shape of any --model argument; weights are not read. Raises UserError, and MachineError for the hub."""
    model = classify(name)
    if model.kind in ("default", "shape"):
        return MODELS[model.value]
    if model.kind == "gguf":
        return replace(gguf_file.gguf_spec(Path(model.value)), source=name)
    return replace(model_folder(model, weights=False)[1], source=name)


def model_folder(model: ModelName, weights: bool = True) -> tuple[Path, ModelSpec, str]:
    """(folder with config.json, safetensors and tokenizer.json; shape; where it came from) of a name with weights.

    Args:
        weights: False fetches no more of a hub model than its configuration.
    """
    if model.kind == "default":
        folder = fetch.smollm2_folder() or gguf_file.convert(fetch.smollm2_gguf(), fetch.SHA256)
        return folder, MODELS[DEFAULT_MODEL], fetch.SOURCE
    if model.kind == "gguf":
        path = Path(model.value)
        folder = gguf_file.convert(path)
        return folder, replace(hf_folder.folder_spec(folder), name=path.stem), f"{path.name}, dequantised"
    if model.kind == "folder":
        folder = Path(model.value)
        return folder, hf_folder.folder_spec(folder), str(folder)
    if model.kind == "hub":
        folder = _hub_snapshot(model.value, weights)
        shape = replace(hf_folder.folder_spec(folder), name=model.value.split("/")[-1])
        return folder, shape, f"hub {model.value}"
    raise UserError(
        f"model {model.value!r} is a shape without weights: use default, a local folder, a .gguf file or a hub name"
    )


def _hub_snapshot(name: str, weights: bool) -> Path:
    """The local folder of a hub model, downloaded if needed: safetensors only."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MachineError(
            f"model {name!r} is no local folder, and the hub needs the package huggingface-hub: "
            "pip install 'nasbench[hub]'"
        ) from None
    patterns = [
        "config.json",
        *(_WITH_WEIGHTS if weights else []),
    ]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, HTTP and OS errors
        if "NotFound" in type(error).__name__ and "LocalEntry" not in type(error).__name__:
            raise unknown("model", name, ("default", *MODELS)) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MachineError(f"model {name!r} is no local folder, and the hub does not give it: {reason}") from error
