"""Data types by the names that commands and tables use. Imports torch only where a torch type is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nasbench.core.errors import unknown

if TYPE_CHECKING:
    import torch

_TABLE = {"fp32": ("float32", 4), "bf16": ("bfloat16", 2), "fp16": ("float16", 2)}
"""Name: (torch's name, bytes)."""
DTYPES = tuple(_TABLE)


def check_dtype(name: str) -> str:
    """Returns the name. Raises UserError for an unknown one."""
    if name not in _TABLE:
        raise unknown("dtype", name, DTYPES)
    return name


def dtype_bytes(name: str) -> int:
    """Bytes of one number. Raises UserError for an unknown name."""
    return _TABLE[check_dtype(name)][1]


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a name. Raises UserError for an unknown one."""
    import torch

    kind: torch.dtype = getattr(torch, _TABLE[check_dtype(name)][0])
    return kind


def dtype_name(dtype: torch.dtype | str) -> str:
    """The name of a torch type, or of torch's own name for it. Raises UserError for one that has none."""
    text = str(dtype).removeprefix("torch.")
    for name, (torchs, _) in _TABLE.items():
        if torchs == text:
            return name
    raise unknown("dtype", text, [torchs for torchs, _ in _TABLE.values()])
