"""Importing this makes `nasbench_kernels` importable from a bare checkout, where it lies in `kernels/`.

Wheels and editable installs carry it as a top-level package already, and then this does nothing.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("nasbench_kernels") is None:
    sys.path.append(str(Path(__file__).parents[2] / "kernels"))
