"""GGUF files, converted once into an ordinary model folder in the cache.

Reading a GGUF takes seconds (its vocabulary is parsed in Python, its tensors are dequantised), so the result is kept:
fp32 safetensors, because a dequantised value (scale x integer + minimum) has more bits than bf16 or fp16 hold.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasbench.checkpoints.families import FAMILIES, Family
from nasbench.checkpoints.families.family import read_heads
from nasbench.checkpoints.fields import Fields
from nasbench.checkpoints.gguf_header import GgufHeader, read_header, read_tensor
from nasbench.core.errors import UserError
from nasbench.core.files import atomic_path, locked, write_json
from nasbench.core.sizes import cache_dir
from nasbench.model.shapes import ModelSpec

if TYPE_CHECKING:
    import numpy as np


def file_sha256(path: Path) -> str:
    """Hex digest of a file. Raises UserError if it is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no such file: {path}") from None


def converted_folder(sha256: str) -> Path:
    """Where the model folder made from the GGUF of this digest is kept. The suffix changes with the conversion."""
    return cache_dir() / "converted" / f"{sha256[:32]}-v3"


def convert(path: Path, sha256: str | None = None) -> Path:
    """The model folder of a GGUF file, of this digest if it is known, made now if the cache does not hold it.

    Raises:
        UserError: the file is not a GGUF of a family that is known here, or corrupt.
        MachineError: the cache cannot be written.
    """
    header = read_header(path)
    digests = [sha256] if sha256 else [file_sha256(part) for part in header.parts]
    folder = converted_folder(
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )
    if folder.is_dir():
        return folder
    with locked(folder):
        if not folder.is_dir():
            with atomic_path(folder, folder=True) as temporary:
                _write_folder(header, temporary)
    return folder


def _write_folder(header: GgufHeader, folder: Path) -> None:
    import numpy as np

    from nasbench.checkpoints.gguf_tokenizer import gguf_tokenizer
    from nasbench.checkpoints.load import find_places

    family, config, fields = _config(header)
    spec = family.from_config(Fields(config, str(header.path)), header.path.stem)
    tokenizer = gguf_tokenizer(fields)
    fields.finish(key for key in fields.data if key.startswith("tokenizer.chat_template"))
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in header.tensors.values():
        # Zeros without memory have the shapes that the values will have.
        found = list(family.from_gguf(tensor.name, np.broadcast_to(np.float32(0), tensor.shape), config))
        if not found and tensor.name not in family.gguf_unused:
            raise UserError(
                f"{tensor.path} has a tensor {tensor.name} that the family {family.model_type} does not have"
            )
        shapes |= {name: values.shape for name, values in found}
    find_places(shapes, spec, None, str(header.path))
    _write_safetensors(folder / "model.safetensors", shapes, _values(header, family, config))
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", tokenizer.special_tokens | {"chat_template": tokenizer.chat_template})
    config |= {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
        "nasbench_source": f"{header.path.name}, dequantised to fp32",
    }
    write_json(folder / "config.json", config)


def gguf_spec(path: Path) -> ModelSpec:
    """The specification that a GGUF file describes, named after the file. Raises UserError."""
    family, config, _ = _config(read_header(path))
    return family.from_config(Fields(config, str(path)), path.stem)


def _config(header: GgufHeader) -> tuple[Family, dict[str, Any], Fields]:
    """(family, config.json, all keys that describe no more than the file, of which the first two read theirs)."""
    where = str(header.path)
    families = {cls.gguf: cls for cls in (FAMILIES[name] for name in FAMILIES) if cls.gguf}
    general = Fields(header.keys, where, "general.")
    architecture = general.text("architecture", choices=families)
    general.neutral("type", "model")
    family = families[architecture]()
    descriptive = ("general.", "split.", "quantize.", "imatrix.")
    fields = Fields({key: value for key, value in header.keys.items() if not key.startswith(descriptive)}, where)
    keys = fields.under(f"{architecture}.")
    names = ("attention.head_count", "embedding_length", "attention.key_length")
    heads, hidden, head_dim = read_heads(keys, *names, None)
    for key in ("attention.value_length", *(() if family.partial_rotation else ("rope.dimension_count",))):
        keys.neutral(key, head_dim)
    keys.neutral("attention.causal", True)
    for key in ("rope.scaling.finetuned", "rope.scaling.original_context_length"):
        keys.raw(key)
    scale = keys.number("attention.scale", None)
    if scale is not None and abs(scale * head_dim**0.5 - 1) > 1e-5:
        raise keys.wrong("attention.scale", f"1 / sqrt({head_dim}), the only one supported")
    tokens = fields.items("tokenizer.ggml.tokens", str) or []
    keys.neutral("vocab_size", len(tokens))
    own = family.gguf_config(keys, header)
    config = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "num_hidden_layers": keys.integer("block_count", most=4096),
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length", most=1 << 24),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": len(tokens),
        "max_position_embeddings": keys.integer("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "rope_scaling": None if "rope_scaling" in own else _rope_scaling(keys),
        # Stored as fp32: 9.99999974e-06 is the 1e-5 of the original configuration.
        "rms_norm_eps": float(f"{keys.number('attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **own,
    }
    fields.finish(key for key in fields.data if key.startswith("tokenizer."))
    return family, config, fields


def _rope_scaling(keys: Fields) -> dict[str, Any] | None:
    """As llama.cpp reads it: a factor scales linearly unless a type says otherwise."""
    for key in ("rope.scale_linear", "rope.scaling.attn_factor"):
        keys.neutral(key, 1.0, 0.0)
    kind = keys.text("rope.scaling.type", "linear", ("none", "linear"))
    factor = keys.raw("rope.scaling.factor")
    if kind == "none" or factor in (None, 0, 1):
        return None
    return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}


def _values(header: GgufHeader, family: Family, config: dict[str, Any]) -> Iterator[np.ndarray]:
    for tensor in header.tensors.values():
        if tensor.name not in family.gguf_unused:
            for _, values in family.from_gguf(tensor.name, read_tensor(tensor), config):
                yield values


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], values: Iterator[np.ndarray]) -> None:
    """Writes fp32 tensors of these names and shapes one after the other, so that one at a time is in memory."""
    import numpy as np

    start, header = 0, {}
    for name, shape in shapes.items():
        end = start + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in values:
            file.write(np.ascontiguousarray(tensor, dtype="<f4").data)
