"""Rotary parameters of configurations, as transformers reads them <-> those of nasbench.model.rotary."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nasbench.checkpoints.fields import Fields
from nasbench.core.errors import UserError, unknown

if TYPE_CHECKING:
    from nasbench.model.shapes import ModelSpec

_TRAINED = "original_max_position_embeddings"
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _TRAINED),
    "yarn": ("attention_factor", "factor", "beta_fast", "beta_slow", _TRAINED, "truncate"),
    "longrope": ("attention_factor", _TRAINED),
}
_LISTS = ("short_factor", "long_factor")


def read_rope(rope: Fields, fields: Fields, default: float, head_dim: int = 0) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling`, `rotary_dim` and `max_context` of a specification.

    Args:
        rope: one object of rotary parameters.
        fields: those around it, with their older places.
        default: rotary base where none is given.
        head_dim: of a family that may rotate a part of each head; 0 for others.
    """
    theta = _either(rope, fields, "rope_theta", default)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _SCALINGS:
        raise UserError(f"{rope.where}: {unknown('rope_type', kind, _SCALINGS)}")
    rotated = _rotated(rope, fields, head_dim)
    context = fields.integer("max_position_embeddings")
    numbers: list[float] = []
    outer = fields.number(_TRAINED, None)  # of no effect on other kinds
    if kind in ("llama3", "yarn", "longrope"):
        inner = rope.number(_TRAINED, None)
        original = outer or inner or context
    if kind == "longrope":
        lists = [_factors(rope, name, (rotated or head_dim) // 2) for name in _LISTS]
        stretched = rope.number("factor", None) or context / original
        usual = math.sqrt(1 + math.log(stretched) / math.log(original)) if min(stretched, original) > 1 else 1.0
        numbers = [rope.number("attention_factor", usual), original, *lists[0], *lists[1]]
    elif kind == "yarn":
        if theta <= 1:
            raise UserError(f"{rope.where}: rope_theta = {theta} is too small for yarn: above 1")
        numbers = _yarn(rope, original)
        context = max(context, int(min(original * numbers[1], 1 << 32)))
    elif kind == "llama3":
        numbers = [rope.number(name) for name in _SCALINGS[kind][:3]] + [original]
        if numbers[1] >= numbers[2]:
            raise rope.wrong("high_freq_factor", f"above low_freq_factor = {numbers[1]}")
    elif kind != "default":
        numbers = [rope.number("factor")] + ([float(context)] if kind == "dynamic" else [])
        context = int(min(context * numbers[0], 1 << 32))
    rope.finish(())
    scaling = (kind, *map(float, numbers)) if numbers else ()
    if not 1 <= context <= 1 << 31:
        raise rope.wrong("factor", "a sensible factor for this context")
    return {"rope_theta": theta, "rope_scaling": scaling, "max_context": context, "rotary_dim": rotated}


def _either(rope: Fields, fields: Fields, name: str, default: float) -> float:
    inner, outer = rope.number(name, None), fields.number(name, default)
    return float(outer if inner is None else inner)


def _rotated(rope: Fields, fields: Fields, head_dim: int) -> int:
    """Channels of a head that are rotated, 0 for all."""
    name = "partial_rotary_factor"
    if not head_dim:
        rope.neutral(name, 1.0, 1)
        fields.neutral(name, 1.0, 1)
    part = _either(rope, fields, name, 1.0)
    rotated = int(head_dim * min(part, 2.0))
    if rotated > head_dim or rotated % 2 or (head_dim and not rotated):
        where = fields if rope.raw(name) is None else rope
        raise where.wrong(name, f"a share of {head_dim} channels that is an even number of them")
    return rotated if rotated < head_dim else 0


def _yarn(rope: Fields, original: float) -> list[float]:
    factor = rope.number("factor")
    scales = [rope.number(name, None) for name in ("mscale", "mscale_all_dim")]
    above, below = (0.1 * (scale or 1.0) * math.log(max(factor, 1.0)) + 1.0 for scale in scales)
    usual = above / below if all(scales) else 0.1 * math.log(max(factor, 1.0)) + 1.0
    ends = [rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)]
    return [rope.number("attention_factor", usual), factor, *ends, original, float(rope.flag("truncate", True))]


def _factors(rope: Fields, name: str, count: int) -> list[float]:
    values = rope.raw(name)
    if not isinstance(values, list) or len(values) != count:
        raise rope.wrong(name, f"a list of {count} numbers")
    return [Fields({name: value}, rope.where).number(name) for value in values]


def write_scaling(scaling: tuple[str | float, ...]) -> dict[str, Any]:
    """The object of rotary parameters of a scaling, {} for none."""
    if not scaling:
        return {}
    kind, numbers = str(scaling[0]), [float(number) for number in scaling[1:]]
    names = _SCALINGS[kind]
    found: dict[str, Any] = {"rope_type": kind} | dict(zip(names, numbers, strict=False))
    if kind == "longrope":
        lists = numbers[len(names) :]
        found |= {name: lists[i * len(lists) // 2 :][: len(lists) // 2] for i, name in enumerate(_LISTS)}
    whole = {_TRAINED: int, "truncate": bool}
    return {name: whole[name](value) if name in whole else value for name, value in found.items()}


def own_context(spec: ModelSpec) -> int:
    """`max_position_embeddings` of a specification: its context before a factor that multiplies it."""
    kind, *numbers = spec.rope_scaling or ("default",)
    if kind == "dynamic":
        return int(numbers[1])
    return round(spec.max_context / float(numbers[0])) if kind == "linear" else spec.max_context
