"""Text of a hub data set, `hf:NAME[:SPLIT[:SIZE]]`, read file by file until there is enough of it.

What was read is kept in the user's cache: a run that is continued sees the same text, also offline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nasbench.core.errors import MachineError, UserError
from nasbench.core.files import atomic_path
from nasbench.core.sizes import cache_dir, parse_size

PREFIX = "hf:"
CHARACTERS = 256 << 20
"""Read unless a size is given: about sixty million tokens of English."""
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def cached_file(data: str) -> Path:
    """The .jsonl in the user's cache that holds a hub data set's text, read from the hub now where it is not there.

    Raises:
        UserError: a bad name, no such data set or split, or no text in it.
        MachineError: the hub cannot be reached, or the cache cannot be written.
    """
    name, _, rest = data.removeprefix(PREFIX).partition(":")
    split, _, size = rest.partition(":")
    if not _NAME.fullmatch(name):
        raise UserError(f"bad hub data set {data!r}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:64MiB")
    split, characters = split or "train", parse_size(size) if size else CHARACTERS
    slug = re.sub(r"[^\w.-]", "--", f"{name}:{split}:{characters}")
    path = cache_dir() / "hub-data" / f"{slug}.jsonl"
    if not path.is_file():
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for text in _documents(name, split, characters):
                file.write(json.dumps({"text": text}) + "\n")
    return path


def _file_system(name: str) -> Any:
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise MachineError(f"hub data set {name!r} needs huggingface-hub: pip install 'nasbench[hub]'") from None
    return HfFileSystem()


def _split_files(paths: list[str], split: str) -> list[str]:
    """The files of a split: those whose name begins with it or that lie in a folder of that name, as hub data sets are
    laid out. Raises UserError naming the splits that there seem to be."""
    words = {}
    for path in sorted(paths):
        *folders, file = path.split("/")[3:] or [path]
        words[path] = [*folders, re.split(r"[-_.]", file)[0]]
    chosen = [path for path in words if split in words[path]]
    if not chosen:
        names = sorted({word for found in words.values() for word in found if word.isalpha()})
        raise UserError(f"no files of split {split!r}: the files speak of {', '.join(names) or 'none'}")
    return chosen


def _documents(name: str, split: str, characters: int) -> Iterator[str]:
    """Texts until there are `characters` of them."""
    from nasbench.data.text import parquet_texts

    files = _file_system(name)
    left = characters
    try:
        paths = files.glob(f"datasets/{name}/**.parquet")
        if not paths:
            # The hub's own copy of data sets in other formats.
            paths = files.glob(f"datasets/{name}@refs/convert/parquet/**.parquet")
        if not paths:
            raise UserError(f"hub data set {name!r} has no Parquet files")
        for path in _split_files(paths, split):
            with files.open(path, "rb") as file:
                for text in parquet_texts(file, f"{PREFIX}{path}"):
                    yield text
                    left -= len(text)
                    if left <= 0:
                        return
    except (UserError, MachineError, GeneratorExit):
        raise
    except Exception as error:  # the hub's client raises its own, HTTP and OS errors
        if isinstance(error, FileNotFoundError) or "NotFound" in type(error).__name__:
            raise UserError(f"no such hub data set: {name!r}") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MachineError(f"hub data set {name!r} cannot be read: {reason}") from error
