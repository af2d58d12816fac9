"""Jet-Nemotron as its authors publish it: Qwen2's names, layers of full attention, windows and JetBlocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from nasbench.checkpoints.families.family import Family
from nasbench.checkpoints.families.qwen import zero_biases
from nasbench.checkpoints.fields import Fields
from nasbench.core.errors import UserError, unknown
from nasbench.model.mixers.gated_delta.spec import CONV_SIZES
from nasbench.model.shapes import ModelSpec
from nasbench.model.spec import Dims
from nasbench.spaces.placement import Placement, format_placement

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = {"attn": "A", "swa": "W", "jet": "J"}
_FIXED = {"dconv_generator_reduction": 8}
_CONV_SIZE = 4
_PUBLISHED = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "sliding_window": None,
    "use_cache": True,
    "use_sliding_window": False,
    "auto_map": {
        "AutoConfig": "configuration_jet_nemotron.JetNemotronConfig",
        "AutoModelForCausalLM": "modeling_jet_nemotron.JetNemotronForCausalLM",
    },
}
"""What the published files say beside what we read."""
_LETTERS = {letter: kind for kind, letter in _KINDS.items()}


class JetNemotron(Family):
    model_type: ClassVar[str] = "jet_nemotron"
    architecture: ClassVar[str] = "JetNemotronForCausalLM"
    qkv_bias: ClassVar[bool] = True

    def details(self, fields: Fields, sizes: dict[str, Any]) -> dict[str, Any]:
        fields.neutral("attention_bias", True)
        fields.neutral("use_sliding_window", False)
        for name in ("sliding_window", "max_window_layers"):  # left from Qwen2's configuration, and without effect
            fields.raw(name)
        types = fields.items("layer_types", str, sizes["num_layers"])
        if types is None:
            raise UserError(f"{fields.where}: layer_types must list one of {', '.join(_KINDS)} per layer")
        if set(types) - set(_KINDS):
            raise UserError(f"{fields.where}: {unknown('layer type', min(set(types) - set(_KINDS)), _KINDS)}")
        efficient = fields.object("efficient_attention_config")
        args = {"A": ""}
        window, jet = efficient.object("swa"), efficient.object("jet")
        if "swa" in types:
            args["W"] = str(window.integer("window_size"))
        if "jet" in types:
            args["J"] = _jet_args(jet)
        window.finish(("window_size",))
        efficient.finish(())
        names = [_KINDS[kind] + ("@" if kind == "jet" else "") + args[_KINDS[kind]] for kind in types]
        defaults = tuple((letter, value) for letter, value in args.items() if value)
        return {"published_placement": format_placement(tuple(names)), "defaults": defaults}

    def own_config(self, spec: ModelSpec, placement: Placement) -> dict[str, Any]:
        mixers = spec.mixers(placement)
        for letter in dict.fromkeys(mixer.kind for mixer in mixers):
            if letter not in _LETTERS:
                raise UserError(f"the jet_nemotron format has no layer kind {letter}: it has A, W and J")
            sizes = sorted({mixer.args for mixer in mixers if mixer.kind == letter})
            if len(sizes) > 1:
                raise self.no_place(spec, f"{letter} layers of {' and '.join(sizes)}, it has one size for all,")
        efficient: dict[str, Any] = {}
        for mixer in mixers:
            if mixer.kind == "W":
                efficient["swa"] = {"window_size": int(mixer.args)}
            if mixer.kind == "J":
                if (dims := mixer.dims) is None or mixer.args != mixer.parse(mixer.shape, _args(dims)).args:
                    raise self.no_place(spec, f"{letter}@{mixer.args}")
                efficient["jet"] = _jet_config(dims)
        return super().own_config(spec, placement) | {
            "layer_types": [_LETTERS[mixer.kind] for mixer in mixers],
            "efficient_attention_config": efficient,
            **_PUBLISHED,
            "max_window_layers": spec.num_layers,
        }

    def split(self, name: str, tensor: Tensor, spec: ModelSpec, placement: Placement) -> Iterator[tuple[str, Tensor]]:
        """Attention and windows have biases on q, k and v: zeros where the model has none."""
        yield from super().split(name, tensor, spec, placement)
        yield from zero_biases(name, tensor, spec, placement)


def _jet_args(jet: Fields) -> str:
    """`headsxkey_dimxvalue_dim`; refuses what the J kind has no argument for."""
    for name, size in _FIXED.items():
        jet.neutral(name, size)
    if jet.number("norm_eps", 1e-5, text=True) != 1e-5:  # the published files write "1e-5"
        raise jet.wrong("norm_eps", "1e-05, the only one supported")
    key_dim = jet.integer("head_dim", most=1 << 16)
    value_dim = int(key_dim * jet.number("expand_v", 2.0))
    heads = jet.integer("num_heads", most=1 << 16)
    conv_size = jet.integer("conv_size", _CONV_SIZE, least=CONV_SIZES[0], most=CONV_SIZES[-1])
    jet.finish(("mode", "dconv_implementation"))
    return _args(Dims(heads, key_dim, value_dim, conv_size))


def _args(dims: Dims) -> str:
    """Of an fp32 state: the format does not say how a state is kept."""
    heads, key_dim, value_dim, conv_size = dims
    return f"{heads}x{key_dim}x{value_dim}" + (f"x32x{conv_size}" if conv_size != _CONV_SIZE else "")


def _jet_config(dims: Dims) -> dict[str, Any]:
    heads, key_dim, value_dim, conv_size = dims
    expand_v = value_dim / key_dim
    # Readers take int(head_dim * expand_v) of a head and of all: nudge a quotient that would round down to one less.
    while int(key_dim * expand_v) < value_dim or int(heads * key_dim * expand_v) < heads * value_dim:
        expand_v += 1e-10
    return {
        "mode": "chunk",
        "num_heads": heads,
        "head_dim": key_dim,
        "expand_v": expand_v,
        "conv_size": conv_size,
        **_FIXED,
        "dconv_implementation": "triton",
        "norm_eps": "1e-5",
    }
