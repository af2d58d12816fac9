"""GGUF files of the llama architecture, converted once into an ordinary model folder in the cache.

Reading a GGUF takes seconds (its vocabulary is parsed in Python, its tensors are dequantised), so the result is kept:
fp32 safetensors, because a dequantised value (scale x integer + minimum) has more bits than bf16 or fp16 hold.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.checkpoints.fields import Fields
from nasbench.checkpoints.gguf_header import GgufHeader, read_header, read_tensor
from nasbench.checkpoints.hf_folder import hf_config
from nasbench.core.errors import UserError
from nasbench.core.files import machine_errors, write_json
from nasbench.core.sizes import cache_dir
from nasbench.model.shapes import ModelSpec

if TYPE_CHECKING:
    import numpy as np

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
    return cache_dir() / "converted" / f"{sha256[:32]}-v2"


def parts_sha256(path: Path) -> str:
    """Digest of a GGUF model: of the file, or of the digests of all its parts. Raises UserError."""
    parts = read_header(path).parts
    digests = [file_sha256(part) for part in parts]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def convert(path: Path, sha256: str | None = None) -> Path:
    """The model folder of a GGUF file, made now if the cache does not hold it.

    Args:
        sha256: the model's digest if it is known already.

    Raises:
        UserError: the file is not a GGUF of the llama architecture, or corrupt.
        MachineError: the cache cannot be written.
    """
    from filelock import FileLock

    folder = converted_folder(sha256 or parts_sha256(path))
    if folder.is_dir():
        return folder
    with machine_errors(f"writing {folder.parent}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if folder.is_dir():
                return folder
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                _write_folder(read_header(path), temporary)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_folder(header: GgufHeader, folder: Path) -> None:
    import safetensors.numpy

    from nasbench.checkpoints.tokenizer import gguf_tokenizer

    shape, fields = _shape(header)
    tokenizer = gguf_tokenizer(fields)
    fields.finish(_INERT)
    tensors = _tensors(header, shape)
    try:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    tokenizer.save(folder / "tokenizer.json")
    config = hf_config(shape, shape.placement) | {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
        "nasbench_source": f"{header.path.name}, dequantised to fp32",
    }
    write_json(folder / "config.json", config)


_INERT = ("llama.rope.scaling.finetuned", "llama.rope.scaling.original_context_length")


def gguf_shape(path: Path) -> ModelSpec:
    """The shape that a GGUF file describes, named after the file. Raises UserError."""
    return _shape(read_header(path))[0]


def _shape(header: GgufHeader) -> tuple[ModelSpec, Fields]:
    """The shape, and the keys with those read that the shape needs."""
    descriptive = ("general.", "split.", "quantize.")
    keys = {key: value for key, value in header.keys.items() if not key.startswith(descriptive)}
    fields = Fields(keys, str(header.path))
    architecture = Fields(header.keys, str(header.path)).text("general.architecture")
    if architecture != "llama":
        raise UserError(f"{header.path}: architecture {architecture!r} is not supported: only llama")
    for key in ("expert_count", "attention.sliding_window", "rope.scaling.attn_factor", "logit_scale"):
        fields.neutral(f"llama.{key}", 0)
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        fields.neutral(f"llama.{key}", 1.0, 0.0)
    fields.neutral("llama.rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors:
        raise UserError(
            f"{header.path}: scaled rotary embeddings (rope_freqs) are not supported in GGUF: use the HF folder"
        )
    heads = fields.integer("llama.attention.head_count", most=1 << 16)
    hidden = fields.integer("llama.embedding_length", most=1 << 20)
    head_dim = fields.integer("llama.attention.key_length", None, most=1 << 16)
    if head_dim is None:
        head_dim = hidden // heads
        if hidden % heads:
            raise UserError(f"{header.path}: embedding_length {hidden} is no multiple of head_count {heads}")
    for key in ("rope.dimension_count", "attention.value_length"):
        fields.neutral(f"llama.{key}", head_dim)
    scale = fields.number("llama.attention.scale", None)
    if scale is not None and abs(scale * head_dim**0.5 - 1) > 1e-5:
        raise fields.wrong("llama.attention.scale", f"1 / sqrt({head_dim}), the only one supported")
    tokens = fields.items("tokenizer.ggml.tokens", str) or []
    fields.neutral("llama.vocab_size", len(tokens))
    shape = ModelSpec(
        name=header.path.stem,
        family="llama",
        num_layers=fields.integer("llama.block_count", most=4096),
        hidden_size=hidden,
        intermediate_size=fields.integer("llama.feed_forward_length", most=1 << 24),
        num_heads=heads,
        num_kv_heads=fields.integer("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=len(tokens),
        max_context=fields.integer("llama.context_length"),
        rope_theta=fields.number("llama.rope.freq_base", 10_000.0),
        # Stored as fp32: 9.99999974e-06 is the 1e-5 of the original configuration.
        rms_eps=float(f"{fields.number('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        tie_embeddings="output.weight" not in header.tensors,
    )
    if heads % shape.num_kv_heads or head_dim % 2 or not tokens:
        raise UserError(
            f"{header.path}: {heads} heads, {shape.num_kv_heads} key/value heads of {head_dim} and "
            f"{len(tokens)} tokens do not fit"
        )
    return shape, fields


def _tensors(header: GgufHeader, shape: ModelSpec) -> dict[str, np.ndarray]:
    """Every tensor in fp32 under its checkpoint name."""
    import numpy as np

    from nasbench.checkpoints.load import check_tensors

    names = {}
    for tensor in header.tensors.values():
        name = _checkpoint_name(tensor.name)
        if name is None:
            raise UserError(f"{tensor.path} has a tensor {tensor.name} that the llama architecture does not have")
        names[name] = tensor
    check_tensors({name: tensor.shape for name, tensor in names.items()}, shape, str(header.path))
    result = {}
    for name, tensor in names.items():
        values = read_tensor(tensor)
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
