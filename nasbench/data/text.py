"""Reading text: the default corpus, files and folders of them, hub data sets `hf:NAME[:SPLIT[:SIZE]]`.

A hub data set is read file by file until there is enough of it, and kept in the user's cache: a run that is continued
sees the same text, also offline.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from nasbench.core.errors import MachineError, UserError, unknown
from nasbench.core.files import atomic_path, machine_errors
from nasbench.core.sizes import cache_dir, parse_size

PREFIX = "hf:"
CHARACTERS = 256 << 20
"""Read of a hub data set unless a size is given: about sixty million tokens of English."""
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise UserError(f'{path}:{number}: not a JSON object with a string "text"')
            yield text


def _parquet_texts(source: Path | IO[bytes], name: str) -> Iterator[str]:
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
    ".parquet": lambda path: _parquet_texts(path, str(path)),
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


def _cached_file(data: str) -> Path:
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
                for text in _parquet_texts(file, f"{PREFIX}{path}"):
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


def data_files(data: str) -> list[Path]:
    """The files of `--data`; none of the default corpus, or of a hub data set, before it is fetched. Raises UserError
    for what is not there or has a wrong name."""
    if not data or data.startswith(PREFIX):
        return []
    path = Path(data)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if _format(file) in READERS and file.is_file())
    if not path.is_file():
        raise UserError(f"no such data: {data}: give a file ({', '.join(READERS)}) or a folder of them")
    if _format(path) not in READERS:
        raise unknown(f"data format of {path}", _format(path), READERS)
    return [path]


def read_documents(data: str) -> list[str]:
    """The documents of `--data`: a .txt (one document), .jsonl or .parquet (one per `text`), a .txt or .jsonl packed as
    .gz or .xz, a folder of these, `hf:NAME[:SPLIT[:SIZE]]` of the hub, or "" for the default corpus. Raises UserError
    for what cannot be read or holds no text."""
    if not data:
        return default_documents()
    files = [_cached_file(data)] if data.startswith(PREFIX) else data_files(data)
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
