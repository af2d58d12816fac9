"""What a run was trained with, without loading it, and the data type that follows for its further stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def choose_dtype(name: str, device: str) -> str:
    """A data type that was given, else the faster one of fp32 and bf16 on a torch device. Raises UserError."""
    from nasbench.core.dtypes import check_dtype
    from nasbench.devices.dtype import faster_dtype

    return check_dtype(name) if name else faster_dtype(device)


def trained_with(run: Path) -> dict[str, Any]:
    """The settings that a run's supernet was trained with, its dtype among them; {} before there is one."""
    from nasbench.supernet import checkpoint

    saved = checkpoint.latest(run / "supernet")
    settings = {} if saved is None else saved.state.get("settings", {})
    return settings if isinstance(settings, dict) else {}


def run_dtype(run: Path, name: str, device: str) -> str:
    """A data type that was given, else that in which the run was trained, else as `choose_dtype`. Raises UserError."""
    from nasbench.core.dtypes import dtype_name

    trained = "" if name else trained_with(run).get("dtype", "")
    return dtype_name(trained) if trained else choose_dtype(name, device)
