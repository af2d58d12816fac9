"""What a family of checkpoints is: config.json <-> ModelSpec, and names and values of tensors both ways.

The base class reads and writes Llama's form; a family overrides where it differs. Imports no torch. Third parties
register a subclass under the entry-point group `nasbench.families`, its model_type as the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any, ClassVar

from nasbench.checkpoints.families.rope import own_context, read_rope, write_scaling
from nasbench.checkpoints.fields import Fields, token_ids
from nasbench.core.errors import UserError
from nasbench.core.registry import Registry
from nasbench.model.shapes import ModelSpec
from nasbench.spaces.placement import Placement, format_placement

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from nasbench.checkpoints.gguf_header import GgufHeader

_INERT = (
    "architectures auto_map dtype torch_dtype transformers_version use_cache cache_implementation initializer_range "
    "attention_dropout hidden_dropout bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id name_or_path "
    "output_attentions output_hidden_states output_router_logits router_aux_loss_coef return_dict torchscript "
    "tokenizer_class task_specific_params id2label label2id problem_type transformers.js_config is_llama_config "
    "max_sequence_length max_length unsloth_fixed unsloth_version nasbench_source model_type _name_or_path "
    "_attn_implementation _attn_implementation_autoset _commit_hash"
)
INERT = frozenset(_INERT.split())
"""Fields that do not change what a model computes."""

MOST_PARAMETERS = 1 << 50

ACTIVATIONS = {"swish": "silu", "silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYER = re.compile(r"(model\.layers\.\d+\.)(\w+)(\..+)")

GGUF_MODULES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    **{f"attn_{name}_norm": f"self_attn.{name}_norm" for name in "qk"},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint goes: the part `index` of our tensor `name`, as (tensor + shift) * scale. An index
    begins with a number."""

    name: str
    index: tuple[Any, ...] = ()
    shift: float = 0.0
    scale: float = 1.0


class Family:
    """A family in Llama's form: pre-norms, gated FFN, grouped-query attention with rotary positions.

    Attributes:
        modules: our name -> the family's, of modules of a layer that are called otherwise.
        norm_shift: what the family adds to its stored norm weights; ours are stored with it.
        gguf: `general.architecture` of the family's GGUF files, "" if they are not read.
        gguf_modules: names in GGUF files beyond GGUF_MODULES.
        gguf_unused: tensors in GGUF files that are no weights.
        partial_rotation: whether a part of each head may be rotated alone.
        gguf_interleaved: GGUF files hold query and key rows of both halves of a rotation in turn.
        tied, head_dim, kv_heads, rms_eps, rope_theta, activation: what absent fields mean; no number of key/value heads
            is that of queries; the activation with the name of its field.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    modules: ClassVar[dict[str, str]] = {}
    norm_shift: ClassVar[float] = 0.0
    gguf: ClassVar[str] = ""
    gguf_modules: ClassVar[dict[str, str]] = {}
    gguf_unused: ClassVar[tuple[str, ...]] = ()
    gguf_interleaved: ClassVar[bool] = False
    tied: ClassVar[bool] = False
    head_dim: ClassVar[int | None] = None
    kv_heads: ClassVar[int | None] = None
    rms_eps: ClassVar[float] = 1e-6
    rope_theta: ClassVar[float] = 10_000.0
    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")
    partial_rotation: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False

    def from_config(self, fields: Fields, name: str) -> ModelSpec:
        """The specification that a config.json describes, its published placement included. Raises UserError."""
        heads, hidden, head_dim = read_heads(fields, "num_attention_heads", "hidden_size", "head_dim", self.head_dim)
        layers = fields.integer("num_hidden_layers", most=4096)
        absent = (heads if "num_key_value_heads" in fields.data else self.kv_heads) or heads
        sizes: dict[str, Any] = {
            "num_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": fields.integer("intermediate_size", most=1 << 24),
            "num_heads": heads,
            "num_kv_heads": fields.integer("num_key_value_heads", absent, most=1 << 16),
            "head_dim": head_dim,
            "vocab_size": fields.integer("vocab_size", most=1 << 26),
            "max_context": fields.integer("max_position_embeddings"),
            "rms_eps": fields.number("rms_norm_eps", self.rms_eps),
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
            "tie_embeddings": fields.flag("tie_word_embeddings", self.tied),
            "activation": ACTIVATIONS[fields.text(*self.activation, ACTIVATIONS)],
        }
        fields.neutral("quantization_config")
        token_ids(fields, "bos_token_id")  # the tokenizer decides; a wrong type is refused all the same
        sizes |= self.rope(fields, sizes)
        spec = ModelSpec(name=name, family=self.model_type, **sizes | self.details(fields, sizes))
        fields.finish(INERT)
        if heads % spec.num_kv_heads or head_dim % 2:
            sizes_text = f"{heads} query heads and {spec.num_kv_heads} key/value heads of {head_dim}"
            raise UserError(f"{fields.where}: {sizes_text} do not fit")
        try:
            spec.parse(spec.published_placement or f"{layers}A")
            if spec.parameters() > MOST_PARAMETERS:
                raise UserError(f"{spec.parameters():.1e} parameters are beyond any model")
        except UserError as error:
            raise UserError(f"{fields.where}: {error}") from None
        return spec

    def details(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        """Attributes of the specification beyond the common ones; reads or refuses the family's own fields."""
        return {}

    def rope(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        """Rotary base, scaling and the context that it gives, from `rope_scaling`, else from `rope_parameters`: of two,
        transformers takes the first."""
        fields.neutral("rope_interleaved", False)
        used = "rope_scaling" if fields.raw("rope_scaling") else "rope_parameters"
        fields.raw("rope_parameters")
        return read_rope(
            fields.object(used), fields, self.rope_theta, sizes["head_dim"] if self.partial_rotation else 0
        )

    def to_config(self, spec: ModelSpec, placement: Placement) -> dict[str, Any]:
        """config.json of a model; special token ids are left to the caller. Inverse of `from_config`.

        Raises:
            UserError: what the family's format has no place for.
        """
        config = self.own_config(spec, placement)
        again = self.from_config(Fields(config, f"the {self.model_type} format"), spec.name)
        for layer, (one, other) in enumerate(
            zip(_layers(spec, placement), _layers(again, again.placement), strict=True)
        ):
            if one != other:
                raise self.no_place(spec, f"layer {layer}, {placement[layer]}")
        for field in dataclass_fields(ModelSpec):
            value, back = getattr(spec, field.name), getattr(again, field.name)
            added = field.name == "qkv_bias" and back  # biases that a model lacks are written as zeros
            if field.compare and value != back and not added and field.name not in _IN_LAYERS:
                raise self.no_place(spec, f"{field.name} = {value!r}")
        return config

    def no_place(self, spec: ModelSpec, what: str) -> UserError:
        """The error for what the format cannot express."""
        return UserError(f"the {self.model_type} format has no place for {what} of {spec.name}: export as hf")

    def own_config(self, spec: ModelSpec, placement: Placement) -> dict[str, Any]:
        """The config.json without a check that it says all. The rotary base stands in the old and the new place."""
        scaling = write_scaling(spec.rope_scaling)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            self.activation[0]: {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(spec.activation),
            "max_position_embeddings": own_context(spec),
            "rms_norm_eps": spec.rms_eps,
            "rope_theta": spec.rope_theta,
            "rope_scaling": scaling or None,
            "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": spec.rope_theta},
            **({"partial_rotary_factor": spec.rotary_dim / spec.head_dim} if spec.rotary_dim else {}),
            "tie_word_embeddings": spec.tie_embeddings,
            "pad_token_id": None,  # absent, some families take one that a small vocabulary may not have
            "torch_dtype": "float32",
        }

    def unpack(self, name: str, tensor: Tensor, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
        """The (name, values) that a tensor of a checkpoint is to `place`: several where the file packs them."""
        yield name, _by_pairs(name, tensor, spec, back=False)

    def pack(self, tensors: dict[str, Tensor], spec: ModelSpec, placement: Placement) -> dict[str, Tensor]:
        """The checkpoint's tensors from those of `split`. Inverse of `unpack`."""
        return {name: _by_pairs(name, tensor, spec, back=True) for name, tensor in tensors.items()}

    def place(self, name: str, spec: ModelSpec) -> Place | None:
        """Where an unpacked tensor goes; None for one that repeats other data, as old rotary tables."""
        if name.endswith("rotary_emb.inv_freq"):
            return None
        ours = _renamed(name, {theirs: ours for ours, theirs in self.modules.items()})
        return Place(ours, shift=self.norm_shift if ours.endswith("norm.weight") else 0.0)

    def split(self, name: str, tensor: Tensor, spec: ModelSpec, placement: Placement) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors that hold one of ours. Inverse of `place`."""
        shift = self.norm_shift if name.endswith("norm.weight") else 0.0
        yield _renamed(name, self.modules), tensor - shift if shift else tensor

    def gguf_config(self, keys: Fields, header: GgufHeader) -> dict[str, Any]:
        """Fields of config.json beyond the common ones, from a GGUF header; `keys` are those of the architecture."""
        for name in ("attention.sliding_window", "expert_count", "expert_used_count"):
            keys.neutral(name, 0)
        return {}

    def from_gguf(self, name: str, values: np.ndarray, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """The checkpoint's (name, values) of a GGUF tensor; nothing for a name that the family does not have."""
        module, _, leaf = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        ours = (GGUF_MODULES | self.gguf_modules).get(layer[2] if layer else module)
        if ours is None or leaf not in ("weight", "bias"):
            return
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(layer[2] if layer else "")
        if heads and self.gguf_interleaved and values.shape[0] % (2 * config[heads]) == 0:
            values = _half_split_rows(values, config[heads])
        if self.norm_shift and module.endswith("norm"):
            values = values - self.norm_shift
        yield f"model.layers.{layer[1]}.{ours}.{leaf}" if layer else f"{ours}.{leaf}", values


FAMILIES: Registry[type[Family]] = Registry("model_type", group="nasbench.families")

_IN_LAYERS = ("name", "family", "published_placement", "defaults", "ffn", "window_rope_theta", "no_rope")


def _layers(spec: ModelSpec, placement: Placement) -> list[tuple[object, ...]]:
    """What each layer computes: its mixer, with the rotary base where it has one, and its FFN."""
    return [
        (mixer.kind, mixer.args, mixer.shape.rotary if mixer.kind in "AW" else None, ffn.kind, ffn.args)
        for mixer, ffn in zip(spec.mixers(placement), spec.ffns(), strict=True)
    ]


def _renamed(name: str, modules: dict[str, str]) -> str:
    match = _LAYER.fullmatch(name)
    return f"{match[1]}{modules.get(match[2], match[2])}{match[3]}" if match else name


_ROTATED = re.compile(r"model\.layers\.(\d+)\.self_attn\.[qk]_(proj|norm)\.(weight|bias)")


def _by_pairs(name: str, tensor: Tensor, spec: ModelSpec, back: bool) -> Tensor:
    """Query and key channels of a partial rotation in the order of our tables: the halves of the rotated channels first
    and in the middle, so that the two channels of a pair always stand half a head apart. `back`: in the file's."""
    match, rotated, dim = _ROTATED.fullmatch(name), spec.rotary_dim, spec.head_dim
    if not match or not rotated or len(tensor) % dim or int(match[1]) >= spec.num_layers:
        return tensor
    if not spec.mixers(spec.placement)[int(match[1])].is_attention:
        return tensor
    middle = (rotated + dim) // 2
    order = [*range(rotated // 2), *range(rotated, middle), *range(rotated // 2, rotated), *range(middle, dim)]
    order = sorted(range(dim), key=order.__getitem__) if back else order
    return tensor.unflatten(0, (-1, dim))[:, order].flatten(0, 1)


def _half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [heads * D, ..], from GGUF's order to the checkpoint's: GGUF puts the two
    channels that a rotation turns next to each other, checkpoints the first ones of all pairs before the second."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def read_heads(fields: Fields, heads: str, hidden: str, dim: str, default: int | None) -> tuple[int, int, int]:
    """(query heads, hidden size, head size) from the fields of these names; an absent head size is the quotient."""
    count, size = fields.integer(heads, most=1 << 16), fields.integer(hidden, most=1 << 20)
    found = fields.integer(dim, default, most=1 << 16)
    if found is None and size % count:
        raise UserError(f"{fields.where}: {hidden} = {size} is no multiple of {heads} = {count}: set {dim}")
    return count, size, found or size // count


_KINDS = {"full_attention": "A", "sliding_attention": "W"}


def layer_kinds(layers: int, window: int | None, first: int = 0) -> list[str]:
    """Windows from layer `first` on, if there is a window."""
    return ["full_attention" if window is None or i < first else "sliding_attention" for i in range(layers)]


def placed(fields: Fields, kinds: list[str], window: int | None) -> dict[str, Any]:
    """The published placement of layers of these kinds. Raises UserError."""
    for kind in kinds:
        if kind not in _KINDS or (kind == "sliding_attention" and window is None):
            reason = f"choose from {', '.join(_KINDS)}" if kind not in _KINDS else "the model has no sliding_window"
            raise UserError(f"{fields.where}: layer_types holds {kind!r}: {reason}")
    if "sliding_attention" not in kinds:
        return {}
    names = tuple("A" if kind == "full_attention" else f"W{window}" for kind in kinds)
    return {"published_placement": format_placement(names), "defaults": (("W", str(window)),)}


def read_window(fields: Fields, used: bool = True) -> int | None:
    """Mistral's and Qwen's `sliding_window`: 4096 where it is absent, none where it is null or not to be used."""
    window: int | None = fields.integer("sliding_window", None if "sliding_window" in fields.data else 4096)
    return window if fields.flag("use_sliding_window", used) else None


def write_windows(family: Family, spec: ModelSpec, placement: Placement) -> tuple[list[str], int | None]:
    """(`layer_types`, window) of a placement of full attention and windows of one size. Raises UserError."""
    types, mixers = {letter: kind for kind, letter in _KINDS.items()}, spec.mixers(placement)
    windows = sorted({mixer.args for mixer in mixers if mixer.kind == "W"})
    other = [mixer.kind for mixer in mixers if mixer.kind not in types]
    if other or len(windows) > 1:
        raise family.no_place(spec, f"layers {other[0]}" if other else f"windows of {' and '.join(windows)}")
    return [types[mixer.kind] for mixer in mixers], int(windows[0]) if windows else None
