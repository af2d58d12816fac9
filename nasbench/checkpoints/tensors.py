"""Writes safetensors files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nasbench.core.files import atomic_path, usual_mode


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file into a folder that nobody else has: the library makes another one beside it, which a kill leaves.

    Raises OSError, as other writers do, where the library has an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        known = re.search(r"\(os error (\d+)\)", str(error))
        raise (OSError(int(known[1]), os.strerror(int(known[1]))) if known else OSError(str(error))) from None
    usual_mode(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file atomically. Raises MachineError where the disk refuses."""
    with atomic_path(path, scratch=True) as temporary:
        save_tensors(temporary, tensors)
