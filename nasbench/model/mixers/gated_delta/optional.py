"""Chunked recurrences of fla-core (the extra `fla`), where it is installed and runs."""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor


def fla_chunks(module: str, name: str, like: Tensor) -> Any:
    """`fla.ops.<module>.<name>` with the arguments and results of `naive_gated_delta`, or None where rows like these
    cannot have it. Its products of fp32 are tf32's, so that it serves half precision alone."""
    return _operation(module, name) if like.is_cuda and like.element_size() == 2 else None


@cache
def _operation(module: str, name: str) -> Any:
    if find_spec("fla") is None:
        return None
    return partial(_call, getattr(import_module(f"fla.ops.{module}"), name))


def _call(
    operation: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    further = {} if beta is None else {"beta": beta}
    return operation(q=q, k=k, v=v, g=g, **further, initial_state=state, output_final_state=True)
