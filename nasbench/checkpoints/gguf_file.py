"""GGUF files of the llama architecture, converted once into an ordinary model folder in the cache.

Reading a GGUF takes seconds (its vocabulary is parsed in Python, its tensors are dequantised), so the result is kept:
fp32 safetensors, because a dequantised value (scale x integer + minimum) has more bits than bf16 or fp16 hold.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasbench.checkpoints.hf_folder import hf_config
from nasbench.core.errors import UserError
from nasbench.core.files import machine_errors, write_json
from nasbench.core.sizes import cache_dir
from nasbench.model.shapes import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def file_sha256(path: Path) -> str:
    """Hex digest of a file. Raises UserError if it is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no such file: {path}") from None


def converted_folder(sha256: str) -> Path:
    """Where the model folder made from the GGUF of this digest is kept. The suffix changes with the conversion."""
    return cache_dir() / "converted" / f"{sha256[:32]}-v1"


def convert(path: Path, sha256: str | None = None) -> Path:
    """The model folder of a GGUF file, made now if the cache does not hold it.

    Args:
        sha256: the file's digest if it is known already.

    Raises:
        UserError: the file is not a GGUF of the llama architecture, or corrupt.
        MachineError: the cache cannot be written.
    """
    from filelock import FileLock

    folder = converted_folder(sha256 or file_sha256(path))
    if folder.is_dir():
        return folder
    with machine_errors(f"writing {folder.parent}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if folder.is_dir():
                return folder
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                _write_folder(path, temporary)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_folder(path: Path, folder: Path) -> None:
    import safetensors.numpy

    from nasbench.checkpoints.tokenizer import byte_level_bpe

    reader = _open(path)
    shape = _shape(reader, path)
    tensors = _tensors(reader, shape, path)
    try:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    kind = _field(reader, "tokenizer.ggml.model", path)
    if kind != "gpt2":
        raise UserError(f"{path}: tokenizer kind {kind!r} is not supported: only gpt2 (byte-level BPE)")
    bos_id = _field(reader, "tokenizer.ggml.bos_token_id", path, None)
    backend = byte_level_bpe(
        _field(reader, "tokenizer.ggml.tokens", path),
        _field(reader, "tokenizer.ggml.token_type", path),
        _field(reader, "tokenizer.ggml.merges", path),
        _field(reader, "tokenizer.ggml.pre", path),
        # A model that was trained without a begin-of-text token must not be given one, and its file may name one still.
        bos_id if _field(reader, "tokenizer.ggml.add_bos_token", path, False) else None,
    )
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    config = hf_config(shape, shape.placement) | {
        "bos_token_id": bos_id,
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id", path, None),
        "nasbench_source": f"{path.name}, dequantised to fp32",
    }
    write_json(folder / "config.json", config)


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole GGUF file: {error or type(error).__name__}") from None


_REQUIRED = object()


def _field(reader: GGUFReader, key: str, path: Path, default: Any = _REQUIRED) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise UserError(f"{path} lacks the field {key}")
    return default


def gguf_shape(path: Path) -> ModelSpec:
    """The shape that a GGUF file describes, named after the file. Raises UserError."""
    return _shape(_open(path), path)


def _shape(reader: GGUFReader, path: Path) -> ModelSpec:
    architecture = _field(reader, "general.architecture", path)
    if architecture != "llama":
        raise UserError(f"{path}: architecture {architecture!r} is not supported: only llama")
    for key in ("llama.expert_count", "llama.rope.scaling.type"):
        if _field(reader, key, path, None) not in (None, 0, "none"):
            raise UserError(f"{path}: {key} = {_field(reader, key, path)!r} is not supported")
    names = {tensor.name for tensor in reader.tensors}
    if "rope_freqs.weight" in names:
        raise UserError(f"{path}: scaled rotary embeddings (rope_freqs) are not supported in GGUF: use the HF folder")
    heads = int(_field(reader, "llama.attention.head_count", path))
    hidden = int(_field(reader, "llama.embedding_length", path))
    head_dim = int(_field(reader, "llama.attention.key_length", path, hidden // heads))
    if int(_field(reader, "llama.rope.dimension_count", path, head_dim)) != head_dim:
        raise UserError(f"{path}: llama.rope.dimension_count differs from the head size {head_dim}: not supported")
    return ModelSpec(
        name=path.stem,
        family="llama",
        num_layers=int(_field(reader, "llama.block_count", path)),
        hidden_size=hidden,
        intermediate_size=int(_field(reader, "llama.feed_forward_length", path)),
        num_heads=heads,
        num_kv_heads=int(_field(reader, "llama.attention.head_count_kv", path, heads)),
        head_dim=head_dim,
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        max_context=int(_field(reader, "llama.context_length", path)),
        rope_theta=float(_field(reader, "llama.rope.freq_base", path, 10_000.0)),
        # Stored as fp32: 9.99999974e-06 is the 1e-5 of the original configuration.
        rms_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon', path):.6g}"),
        tie_embeddings="output.weight" not in names,
    )


def _tensors(reader: GGUFReader, shape: ModelSpec, path: Path) -> dict[str, np.ndarray]:
    """Every tensor in fp32 under its checkpoint name."""
    import numpy as np
    from gguf.quants import dequantize

    result = {}
    for tensor in reader.tensors:
        name = _checkpoint_name(tensor.name)
        if name is None:
            raise UserError(f"{path} has a tensor {tensor.name} that the llama architecture does not have")
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            values = _half_split_rows(values, shape.num_heads if "attn_q." in tensor.name else shape.num_kv_heads)
        result[name] = np.ascontiguousarray(values)
    return result


def _checkpoint_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None for a name that is not known."""
    if not name.endswith(".weight"):
        return None
    parts = name.removesuffix(".weight").split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
    return f"{_OUTSIDE[parts[0]]}.weight" if len(parts) == 1 and parts[0] in _OUTSIDE else None


def _half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [heads * D, C], from GGUF's order to the checkpoint's.

    GGUF puts the two channels that a rotation turns next to each other (0, D/2, 1, D/2 + 1, ...); the rotate-half
    form of the checkpoints has the first channels of all pairs, then the second ones.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
