"""Hugging Face model folders: configuration, end tokens, and the tensors of safetensors files.

Only the tensors need torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasbench.checkpoints.families import read_spec
from nasbench.checkpoints.fields import Fields, read_object, refuse_pointer, token_ids
from nasbench.core.errors import UserError
from nasbench.model.shapes import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


def folder_spec(folder: Path) -> ModelSpec:
    """The specification of a model folder, named after it. Raises UserError naming the file and the field."""
    path = folder / "config.json"
    spec = read_spec(read_object(path), folder.resolve().name, str(path))
    return replace(spec, tie_embeddings=spec.tie_embeddings and not _has_other_head(folder))


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Ids that end a text, of config.json and then of generation_config.json. Raises UserError naming the field."""
    files = [path for name in ("config.json", "generation_config.json") if (path := folder / name).is_file()]
    found = [one for path in files for one in token_ids(Fields(read_object(path), str(path)), "eos_token_id")]
    return tuple(dict.fromkeys(found))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the whole file, which transformers prefers too, else an index's shards.

    Raises:
        UserError: none there, only pickles, a shard missing.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [whole]
    if index.is_file() and not whole.is_file():
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index} has no weight_map of tensor names to files")
        # Only plain names: an index must not reach outside of its folder.
        outside = sorted(name for name in set(names.values()) if Path(name).name != name)
        if outside:
            raise UserError(f"{index} names {outside[0]!r}, which is no file of its folder")
        files = [folder / name for name in sorted(set(names.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if not missing:
        return files
    pickles = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0]}: pickle can run code and is refused, use safetensors"
        )
    raise UserError(f"{folder} lacks {', '.join(missing)}")


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    """The `safe_open` of a file. Raises UserError naming a corrupt one."""
    from safetensors import SafetensorError, safe_open

    refuse_pointer(path)
    try:
        with safe_open(path, framework=framework) as tensors:
            yield tensors
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors. Raises UserError naming a corrupt file."""
    with _opened(path, "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of a safetensors file, one at a time. Raises UserError naming a corrupt file."""
    with _opened(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 -- not a dictionary
            yield name, file.get_tensor(name)


def _has_other_head(folder: Path) -> bool:
    """Whether the weights hold an output matrix that differs from the embedding: transformers then unties the two."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    try:
        places = {name: path for path in weight_files(folder) for name in tensor_shapes(path) if name in names}
        if len(places) < len(names):
            return False
        matrices = []
        for name in names:
            with _opened(places[name], "pt") as file:
                matrices.append(file.get_tensor(name))
    except UserError:
        return False  # A folder may hold its configuration alone; who reads a damaged file will tell.
    return not matrices[0].equal(matrices[1])
