"""Hugging Face model folders: config.json <-> shape and placement, and the tensors of safetensors files.

Only importing the tensors needs torch; the configuration part does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasbench.checkpoints.fields import Fields, token_ids
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
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "pretraining_tp": (1, 0),
    "partial_rotary_factor": (1.0, 1),
    "quantization_config": (),
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder as a dictionary. Raises UserError naming the file."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a model configuration: not a JSON object")
    return config


def folder_shape(folder: Path) -> ModelSpec:
    """The shape of a model folder, named after it. Raises UserError naming the file and the field."""
    shape = shape_from_config(read_config(folder), folder.resolve().name, str(folder / "config.json"))
    return replace(shape, tie_embeddings=shape.tie_embeddings and not _has_other_head(folder))


def shape_from_config(config: dict[str, Any], name: str, where: str) -> ModelSpec:
    """The shape that a config.json describes; its published placement included.

    Args:
        name: the shape's name.
        where: what error messages call the configuration, usually its path.
    """
    model_type = config.get("model_type")
    fields = Fields(config, where)
    model_type = fields.text("model_type")
    family = fields.text("base_model_type") if model_type == "nasbench" else model_type
    if family not in FAMILIES:
        raise UserError(f"{where}: {unknown('model_type', family, FAMILIES)}")
    for field, legal in _FIXED.items():
        fields.neutral(field, *legal)
    _check_attention(fields, family)
    heads = fields.integer("num_attention_heads", most=1 << 16)
    hidden = fields.integer("hidden_size", most=1 << 20)
    theta, scaling = _rope(fields)
    head_dim = fields.integer("head_dim", 128 if family == "qwen3" else None, most=1 << 16)
    if head_dim is None:
        head_dim = hidden // heads
        if hidden % heads:
            raise UserError(
                f"{where}: hidden_size = {hidden} is no multiple of num_attention_heads = {heads}: set head_dim"
            )
    shape = ModelSpec(
        name=name,
        family=family,
        num_layers=fields.integer("num_hidden_layers", most=4096),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", most=1 << 24),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size", most=1 << 26),
        max_context=fields.integer("max_position_embeddings"),
        rope_theta=theta,
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        qkv_bias=family in ("qwen2", "jet_nemotron"),
        qk_norm=family == "qwen3",
        tie_embeddings=fields.flag("tie_word_embeddings"),
        rope_scaling=scaling,
        **_layers(fields, family),
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


def _check_attention(fields: Fields, family: str) -> None:
    """Refuses attention details that change the result: biases where the family has none, windows in plain models."""
    if family == "qwen2":
        fields.neutral("attention_bias", True)
    else:
        fields.neutral("attention_bias", False)
    if family != "jet_nemotron":
        types = fields.items("layer_types", str) or []
        if set(types) - {"full_attention"}:
            found = sorted(set(types) - {"full_attention"})
            raise UserError(f"{fields.where}: layer_types holds {found}: only full_attention")


def _rope(fields: Fields) -> tuple[float, tuple[str | float, ...]]:
    """(theta, scaling) from `rope_scaling`, else `rope_parameters`: of two, transformers takes the scaling."""
    field = "rope_scaling" if fields.raw("rope_scaling") else "rope_parameters"
    rope = fields.object(field)
    theta = rope.number("rope_theta", None) or fields.number("rope_theta", 10_000.0)
    kind = rope.text("rope_type", rope.text("type", "default"), ("default", "llama3"))
    if kind == "default":
        return theta, ()
    original = fields.number("original_max_position_embeddings", None)
    if original is None:
        original = rope.number("original_max_position_embeddings", fields.number("max_position_embeddings"))
    return theta, (kind, *(rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")), original)


def _layers(fields: Fields, family: str) -> dict[str, Any]:
    """`published_placement` and `defaults` of the shape, for families that have layers of several kinds."""
    if fields.raw("model_type") == "nasbench":
        return {"published_placement": fields.text("placement")}
    if family != "jet_nemotron":
        return {}
    types = fields.items("layer_types", str, fields.integer("num_hidden_layers", most=4096))
    if types is None:
        raise UserError(f"{fields.where}: layer_types must list one of {', '.join(_JET_KINDS)} per layer")
    if set(types) - set(_JET_KINDS):
        wrong = sorted(set(types) - set(_JET_KINDS))[0]
        raise UserError(f"{fields.where}: {unknown('layer type', wrong, _JET_KINDS)}")
    efficient = fields.object("efficient_attention_config")
    args = {"A": ""}
    if "swa" in types:
        args["W"] = str(efficient.object("swa").integer("window_size"))
    if "jet" in types:
        args["J"] = _jet_args(efficient.object("jet"))
    names = [_JET_KINDS[kind] + ("@" if kind == "jet" else "") + args[_JET_KINDS[kind]] for kind in types]
    defaults = tuple((letter, value) for letter, value in args.items() if value)
    return {"published_placement": format_placement(tuple(names)), "defaults": defaults}


def _jet_args(jet: Fields) -> str:
    """`headsxkey_dimxvalue_dim`; refuses what the J kind has no argument for."""
    jet.neutral("conv_size", 4)
    jet.neutral("dconv_generator_reduction", 8)
    if jet.number("norm_eps", 1e-5, text=True) != 1e-5:  # the published files write "1e-5"
        raise jet.wrong("norm_eps", "1e-05, the only one supported")
    key_dim = jet.integer("head_dim", most=1 << 16)
    value_dim = int(key_dim * jet.number("expand_v", 2.0))
    return f"{jet.integer('num_heads', most=1 << 16)}x{key_dim}x{value_dim}"


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


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Ids that end a text, of config.json and then of generation_config.json. Raises UserError naming the field."""
    found = token_ids(Fields(read_config(folder), str(folder / "config.json")), "eos_token_id")
    path = folder / "generation_config.json"
    if path.is_file():
        generation = read_json(path)
        if not isinstance(generation, dict):
            raise UserError(f"{path} is not a JSON object")
        found += token_ids(Fields(generation, str(path)), "eos_token_id")
    return tuple(dict.fromkeys(found))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the whole file, which transformers prefers too, else an index's shards.

    Raises:
        UserError: none there, only pickles, a shard missing.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [whole]
    if index.is_file() and not whole.is_file():
        content = read_json(index)
        names = content.get("weight_map") if isinstance(content, dict) else None
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


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of a safetensors file, one at a time. Raises UserError naming a corrupt file."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 -- not a dictionary
                yield name, file.get_tensor(name)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def _has_other_head(folder: Path) -> bool:
    """Whether the weights hold an output matrix that differs from the embedding: transformers then unties the two."""
    places = {}
    for path in _existing_files(folder):
        for name, entry in _safetensors_header(path).items():
            if name in ("lm_head.weight", "model.embed_tokens.weight"):
                places[name] = (path, entry)
    if len(places) < 2:
        return False
    (head_path, head), (path, embedding) = places["lm_head.weight"], places["model.embed_tokens.weight"]
    if (head["dtype"], head["shape"]) != (embedding["dtype"], embedding["shape"]):
        return True
    return _bytes_differ(head_path, head["start"], path, embedding["start"], head["size"])


def _existing_files(folder: Path) -> list[Path]:
    """The weight files if they are all there; a folder may hold its configuration alone."""
    try:
        return weight_files(folder)
    except UserError:
        return []


def _safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """By tensor: dtype, shape, and the bytes it takes in the file. Empty for a damaged file: reading it will tell."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(path.stat().st_size, 100_000_000):
                return {}
            entries = json.loads(file.read(length))
        result = {}
        for name, entry in entries.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                result[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "start": 8 + length + first}
                result[name]["size"] = last - first
        return result
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _bytes_differ(path: Path, start: int, other: Path, other_start: int, size: int) -> bool:
    with path.open("rb") as one, other.open("rb") as two:
        one.seek(start)
        two.seek(other_start)
        while size > 0:
            step = min(size, 1 << 22)
            first = one.read(step)
            if first != two.read(step):
                return True
            if not first:
                return False
            size -= step
    return False
