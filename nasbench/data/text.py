"""Reading text: the default corpus, files and folders of them, data sets of the hub."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from nasbench.core.errors import UserError, unknown
from nasbench.core.files import machine_errors
from nasbench.data.hub import PREFIX, cached_file


def default_documents() -> list[str]:
    """The text that every Python installation has: the topics of `help()`, about 0.4 MB once repeats are gone.

    Topics repeat sections of each other; a paragraph is kept where it comes first (longest topic first), so that
    nothing held out was also trained on.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for text in sorted(topics.values(), key=lambda text: (-len(text), text)):
        fresh = []
        for part in re.split(r"\n\s*\n", text):
            if part.strip() not in seen:
                seen.add(part.strip())
                fresh.append(part)
        documents.append("\n\n".join(fresh))
    return [text for text in documents if len(text) > 200]


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where its name says that it is packed."""
    if path.suffix == ".xz":
        return cast("IO[bytes]", lzma.open(path))
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _read_txt(path: Path) -> Iterator[str]:
    with _open(path) as file:
        yield file.read().decode()


def _read_jsonl(path: Path) -> Iterator[str]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except UnicodeDecodeError:
                raise
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise UserError(f'{path}:{number}: not a JSON object with a string "text"')
            yield text


def parquet_texts(source: Path | IO[bytes], name: str) -> Iterator[str]:
    """The column `text` of a Parquet file, a part at a time. Raises UserError naming the file as `name`."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise UserError(f"{name} has no column 'text', only: {', '.join(names)}")
            for batch in file.iter_batches(columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} is not a readable Parquet file: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": lambda path: parquet_texts(path, str(path)),
}


def _format(path: Path) -> str:
    """`.jsonl` of a.jsonl, and of b.jsonl.xz, whose reader unpacks."""
    name = path.with_suffix("") if path.suffix in (".gz", ".xz") else path
    return name.suffix if name is path or name.suffix != ".parquet" else path.suffix


def _unpacked(path: Path) -> Iterator[str]:
    try:
        yield from READERS[_format(path)](path)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} cannot be unpacked: {error}") from None


def read_documents(data: str) -> list[str]:
    """The documents of `--data`: a .txt (one document), .jsonl or .parquet (one per `text`), a .txt or .jsonl packed as
    .gz or .xz, a folder of these, `hf:NAME[:SPLIT[:SIZE]]` of the hub, or "" for the default corpus. Raises UserError
    for what cannot be read or holds no text."""
    if not data:
        return default_documents()
    path = cached_file(data) if data.startswith(PREFIX) else Path(data)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _format(file) in READERS and file.is_file())
    elif path.is_file():
        if _format(path) not in READERS:
            raise unknown(f"data format of {path}", _format(path), READERS)
        files = [path]
    else:
        raise UserError(f"no such data: {data}: give a file ({', '.join(READERS)}) or a folder of them")
    documents: list[str] = []
    for file in files:
        try:
            with machine_errors(f"reading {file}"):
                documents.extend(_unpacked(file))
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: {error}") from None
    documents = list(dict.fromkeys(text for text in documents if text.strip()))
    if not documents:
        raise UserError(f"{data} holds no text: give {', '.join(READERS)} with some")
    return documents
