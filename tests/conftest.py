"""Fixtures that every folder of tests shares."""

import os
import sys
from pathlib import Path

import torch

# Triton reads it when it is first imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))
