"""Hugging Face model folders: config.json <-> shape and placement, and the tensors of safetensors files.

Only importing the tensors needs torch; the configuration part does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasbench.core.errors import UserError, unknown
from nasbench.core.files import read_json
from nasbench.model.mixers.gated_delta.spec import JetBlockSpec
from nasbench.model.mixers.sliding_window.spec import SlidingWindowSpec
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement, format_placement, kind_of

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "jet_nemotron": "JetNemotronForCausalLM",
}
"""model_type -> architecture. A hybrid of another family is written as model_type `nasbench`, its family beside it."""

_JET_KINDS = {"attn": "A", "swa": "W", "jet": "J"}
# What the decoder would silently compute otherwise, so that a configuration may not ask for it: field -> legal values.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu"),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "pretraining_tp": (None, 0, 1),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder as a dictionary. Raises UserError naming the file."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a model configuration: not a JSON object")
    return config


def folder_shape(folder: Path) -> ModelSpec:
    """The shape of a model folder, named after it. Raises UserError naming the file and the field."""
    return shape_from_config(read_config(folder), folder.resolve().name, str(folder / "config.json"))


def shape_from_config(config: dict[str, Any], name: str, where: str) -> ModelSpec:
    """The shape that a config.json describes; its published placement included.

    Args:
        name: the shape's name.
        where: what error messages call the configuration, usually its path.
    """
    model_type = config.get("model_type")
    family = config.get("base_model_type") if model_type == "nasbench" else model_type
    if family not in FAMILIES:
        raise UserError(f"{where}: {unknown('model_type', family, FAMILIES)}")
    for field, legal in _FIXED.items():
        if config.get(field) not in legal:
            raise UserError(f"{where}: {field} = {config[field]!r} is not supported: only {legal[-1]!r} or absent")
    _check_attention(config, family, where)
    heads = _integer(config, "num_attention_heads", where)
    hidden = _integer(config, "hidden_size", where)
    theta, scaling = _rope(config, where)
    shape = ModelSpec(
        name=name,
        family=family,
        num_layers=_integer(config, "num_hidden_layers", where),
        hidden_size=hidden,
        intermediate_size=_integer(config, "intermediate_size", where),
        num_heads=heads,
        num_kv_heads=_integer(config, "num_key_value_heads", where, heads),
        head_dim=_integer(config, "head_dim", where, 128 if family == "qwen3" else hidden // heads),
        vocab_size=_integer(config, "vocab_size", where),
        max_context=_integer(config, "max_position_embeddings", where),
        rope_theta=theta,
        rms_eps=_number(config, "rms_norm_eps", where, 1e-6),
        qkv_bias=family in ("qwen2", "jet_nemotron"),
        qk_norm=family == "qwen3",
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_scaling=scaling,
        **_layers(config, family, where),
    )
    if heads % shape.num_kv_heads or shape.head_dim % 2:
        raise UserError(
            f"{where}: {heads} query heads and {shape.num_kv_heads} key/value heads of {shape.head_dim} do not fit"
        )
    try:
        shape.parse(shape.published_placement or f"{shape.num_layers}A")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return shape


def _integer(config: dict[str, Any], field: str, where: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {field} = {value!r} is not a positive whole number")
    return value


def _number(config: dict[str, Any], field: str, where: str, default: float) -> float:
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserError(f"{where}: {field} = {value!r} is not a positive number")
    return float(value)


def _check_attention(config: dict[str, Any], family: str, where: str) -> None:
    """Refuses attention details that change the result: biases where the family has none, windows in plain models."""
    if family != "qwen2" and config.get("attention_bias"):
        raise UserError(f"{where}: attention_bias = true is not supported for {family}: its o_proj would have a bias")
    if family == "qwen2" and config.get("attention_bias") is False:
        raise UserError(f"{where}: attention_bias = false is not supported for qwen2: its q, k and v have biases")
    types = config.get("layer_types")
    if family != "jet_nemotron" and types is not None and set(types) - {"full_attention"}:
        raise UserError(f"{where}: layer_types holds {sorted(set(types) - {'full_attention'})}: only full_attention")


def _rope(config: dict[str, Any], where: str) -> tuple[float, tuple[str | float, ...]]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(field) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: {field} = {rope!r} is not an object")
    theta = _number(
        {"rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0))}, "rope_theta", where, 0.0
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, ()
    if kind != "llama3":
        raise UserError(f"{where}: {field}.rope_type = {kind!r} is not supported: choose from default, llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, ("llama3", *(_number(rope, name, f"{where}: {field}", 0.0) for name in names))


def _layers(config: dict[str, Any], family: str, where: str) -> dict[str, Any]:
    """`published_placement` and `defaults` of the shape, for families that have layers of several kinds."""
    if config.get("model_type") == "nasbench":
        placement = config.get("placement")
        if not isinstance(placement, str):
            raise UserError(f"{where}: placement = {placement!r} is not a placement string")
        return {"published_placement": placement}
    if family != "jet_nemotron":
        return {}
    types = config.get("layer_types")
    if not isinstance(types, list) or len(types) != config.get("num_hidden_layers"):
        raise UserError(f"{where}: layer_types must list one of {', '.join(_JET_KINDS)} per layer")
    if set(types) - set(_JET_KINDS):
        raise UserError(f"{where}: {unknown('layer type', sorted(set(types) - set(_JET_KINDS))[0], _JET_KINDS)}")
    efficient = config.get("efficient_attention_config") or {}
    args = {"A": ""}
    if "swa" in types:
        args["W"] = str(_integer(efficient.get("swa") or {}, "window_size", f"{where}: swa"))
    if "jet" in types:
        args["J"] = _jet_args(efficient.get("jet") or {}, f"{where}: jet")
    names = [_JET_KINDS[kind] + ("@" if kind == "jet" else "") + args[_JET_KINDS[kind]] for kind in types]
    defaults = tuple((letter, value) for letter, value in args.items() if value)
    return {"published_placement": format_placement(tuple(names)), "defaults": defaults}


def _jet_args(jet: dict[str, Any], where: str) -> str:
    """`headsxkey_dimxvalue_dim`; refuses what the J kind has no argument for."""
    for field, legal in (("conv_size", 4), ("dconv_generator_reduction", 8), ("norm_eps", 1e-5)):
        if jet.get(field, legal) != legal:
            raise UserError(f"{where}: {field} = {jet[field]!r} is not supported: only {legal!r}")
    key_dim = _integer(jet, "head_dim", where)
    value_dim = int(key_dim * _number(jet, "expand_v", where, 2.0))
    return f"{_integer(jet, 'num_heads', where)}x{key_dim}x{value_dim}"


def hf_config(shape: ModelSpec, placement: Placement) -> dict[str, Any]:
    """config.json of this model: the family's own where every layer is full attention, Jet-Nemotron's for its family,
    and for other hybrids model_type `nasbench` with the family beside it, which no other engine mistakes for its own.

    Special token ids are left to the caller. Inverse of shape_from_config.
    """
    if shape.family == "jet_nemotron":
        return jet_nemotron_config(shape, placement)
    config: dict[str, Any] = {"architectures": [FAMILIES[shape.family]], "model_type": shape.family}
    if any(kind_of(name) != "A" for name in placement):
        complete = tuple(_complete(shape, name) for name in placement)
        config = {
            "architectures": ["NasbenchForCausalLM"],
            "model_type": "nasbench",
            "base_model_type": shape.family,
            "placement": format_placement(complete),
        }
    return config | _common(shape)


def jet_nemotron_config(shape: ModelSpec, placement: Placement) -> dict[str, Any]:
    """config.json of the published format. Its attention has biases on q, k and v (zeros where the family has none).

    Raises:
        UserError: what the format has no place for: kinds beyond A, W and J, windows or J sizes that differ between
            layers, query and key norms, scaled rotary embeddings.
    """
    if shape.qk_norm or shape.rope_scaling:
        reason = "query and key norms" if shape.qk_norm else "scaled rotary embeddings"
        raise UserError(f"the jet-nemotron format has no place for the {reason} of {shape.name}: export as hf")
    letters = {letter: kind for kind, letter in _JET_KINDS.items()}
    configs = shape.mixers(placement)
    for letter in dict.fromkeys(kind_of(name) for name in placement):
        if letter not in letters:
            raise UserError(f"the jet-nemotron format has no layer kind {letter}: it has A, W and J")
        sizes = sorted({config.args for config in configs if config.kind == letter})
        if len(sizes) > 1:
            raise UserError(f"the jet-nemotron format has one size for all {letter} layers, not {' and '.join(sizes)}")
    efficient: dict[str, Any] = {}
    for config in configs:
        if isinstance(config, SlidingWindowSpec):
            efficient["swa"] = {"window_size": config.window}
        if isinstance(config, JetBlockSpec):
            efficient["jet"] = _jet_config(config)
    return {
        "architectures": [FAMILIES["jet_nemotron"]],
        "model_type": "jet_nemotron",
        "layer_types": [letters[kind_of(name)] for name in placement],
        "efficient_attention_config": efficient,
    } | _common(shape)


def _jet_config(config: JetBlockSpec) -> dict[str, Any]:
    expand_v = config.value_dim / config.key_dim
    # A reader takes int(head_dim * expand_v): nudge a quotient that would round down to one less.
    while int(config.key_dim * expand_v) < config.value_dim:
        expand_v += 1e-10
    return {
        "mode": "chunk",
        "num_heads": config.num_heads,
        "head_dim": config.key_dim,
        "expand_v": expand_v,
        "conv_size": config.conv_size,
        "dconv_generator_reduction": config.generator_reduction,
        "dconv_implementation": "triton",
        "norm_eps": 1e-5,
    }


def _complete(shape: ModelSpec, name: str) -> str:
    """The layer name with its arguments written out, so that it means the same without the model's defaults."""
    args = shape.mixer(name).args
    return f"{kind_of(name)}{'@' if 'x' in args else ''}{args}"


def _common(shape: ModelSpec) -> dict[str, Any]:
    """The fields that every family has. The rotary base is written in both the old and the new place."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if shape.rope_scaling:
        names = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope = dict(zip(names, shape.rope_scaling, strict=True))
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_context,
        "rms_norm_eps": shape.rms_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": rope if shape.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tie_embeddings,
        "torch_dtype": "float32",
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises UserError: none there, only pickles, a shard missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index} has no weight_map of tensor names to files")
        # Only plain names: an index must not reach outside of its folder.
        files = [folder / Path(name).name for name in sorted(set(names.values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [path.name for path in files if not path.is_file()]
    if not missing:
        return files
    pickles = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0]}: pickle can run code and is refused, use safetensors"
        )
    raise UserError(f"{folder} lacks {', '.join(missing)}")


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of a safetensors file, one at a time. Raises UserError naming a corrupt file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 -- not a dictionary
                yield name, file.get_tensor(name)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
