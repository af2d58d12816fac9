"""The header of GGUF files: keys, tensor table, parts of a split model. Reads no weights and takes milliseconds.

Every read checks its bounds, so a damaged file ends in one line that names it.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nasbench.checkpoints.fields import Fields, refuse_pointer
from nasbench.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ITEMS = 1 << 24
"""Most entries of an array: sixty times the largest vocabulary."""


class GgufTensor(NamedTuple):
    """One entry of a tensor table: `shape` in torch's order, `start` bytes into the file `path`."""

    name: str
    shape: tuple[int, ...]
    kind: int
    path: Path
    start: int


class GgufHeader(NamedTuple):
    """Keys and tensors of a GGUF model, all of its parts together."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]
    parts: tuple[Path, ...]


def read_header(path: Path) -> GgufHeader:
    """Reads a GGUF file, or all parts of a split one from its first part.

    Raises:
        UserError: not a whole GGUF file, or a part is not beside it.
    """
    keys, tensors = _read_part(path)
    count = Fields(keys, str(path)).integer("split.count", 1)
    if count == 1:
        return GgufHeader(path, keys, tensors, (path,))
    stem = path.stem.removesuffix(f"-00001-of-{count:05}")
    if keys.get("split.no") != 0 or stem == path.stem:
        first = f"NAME-00001-of-{count:05}.gguf"
        raise UserError(f"{path} is one of {count} parts (split.count): give the first one, under its name {first}")
    parts = [path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, min(count, 99_999) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{path} is part 1 of {count}, and {missing[0]}{more} must lie beside it")
    for number, part in enumerate(parts[1:], start=1):
        others, more_tensors = _read_part(part)
        if (others.get("split.count"), others.get("split.no")) != (count, number):
            raise UserError(f"{part} is not part {number + 1} of {count} of {path.name}")
        if twice := tensors.keys() & more_tensors.keys():
            raise UserError(f"{part}: the tensor {min(twice)} stands in an earlier part, too")
        tensors |= more_tensors
    if keys.get("split.tensors.count", len(tensors)) != len(tensors):
        raise UserError(f"{path} and its parts hold {len(tensors)} tensors, not {keys['split.tensors.count']}")
    return GgufHeader(path, keys, tensors, tuple(parts))


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a whole GGUF file: it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data, path).header()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no such file: {path}") from None
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, IndexError) as error:
        raise UserError(f"{path} is not a whole GGUF file: {type(error).__name__}: {error}") from None


class _Cursor:
    """Reads values one after the other. struct.error at the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 4

    def header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version, tensor_count, key_count = self.unpack("IQQ")
        if version not in (2, 3):
            raise self.broken(f"version {version} is not supported: only 2 and 3")
        if max(tensor_count, key_count) > len(self.data) // 8:
            raise self.broken("it ends before its tables do")
        keys: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.string()
            if key in keys:
                raise self.broken(f"the key {key} stands twice")
            keys[key] = self.value(self.unpack("I")[0])
        table = []
        for _ in range(tensor_count):
            name, rank = self.string(), self.unpack("I")[0]
            if rank > 4:
                raise self.broken(f"tensor {name!r} has {rank} dimensions")
            sizes = self.unpack(f"{rank}Q")
            if not 0 < math.prod(sizes) <= 8 * len(self.data):
                raise self.broken(f"tensor {name!r} has the shape {sizes}")
            table.append((name, sizes, *self.unpack("IQ")))
        align = keys.get("general.alignment", 32)
        if not isinstance(align, int) or not 1 <= align <= 1 << 20:
            raise self.broken(f"general.alignment = {align!r}")
        first = -(-self.at // align) * align
        tensors = {}
        for name, sizes, kind, offset in table:
            if name in tensors:
                raise self.broken(f"the tensor {name} stands twice")
            tensors[name] = GgufTensor(name, tuple(reversed(sizes)), kind, self.path, first + offset)
        return keys, tensors

    def broken(self, reason: str) -> UserError:
        return UserError(f"{self.path} is not a whole GGUF file: {reason}")

    def unpack(self, codes: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + codes, self.data, self.at)
        self.at += struct.calcsize("<" + codes)
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        end = self.at + length
        if end > len(self.data):
            raise self.broken("it ends within a text")
        text = self.data[self.at : end].decode("utf-8")
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.unpack(_SCALARS[kind])[0]
        item, count = self.unpack("IQ")
        if count > min(_MOST_ITEMS, len(self.data)):
            raise self.broken(f"an array of {count} entries")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        return list(self.unpack(f"{count}{_SCALARS[item]}"))


def read_tensor(tensor: GgufTensor) -> np.ndarray:
    """The tensor in fp32. Raises UserError for a type that cannot be dequantised and for a file that ends before it."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    def refuse(reason: str) -> UserError:
        return UserError(f"{tensor.path}: tensor {tensor.name} {reason}")

    try:
        kind = GGMLQuantizationType(tensor.kind)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise refuse(f"has the unknown type {tensor.kind}") from None
    columns = tensor.shape[-1] if tensor.shape else 1
    if columns % block:
        raise refuse(f"has rows of {columns}, {kind.name} takes multiples of {block}")
    rows, row_bytes = math.prod(tensor.shape[:-1]), columns // block * size
    if rows * row_bytes > tensor.path.stat().st_size - tensor.start:
        raise refuse("is cut off: this is not a whole GGUF file")
    data = np.fromfile(tensor.path, np.uint8, rows * row_bytes, offset=tensor.start).reshape(rows, row_bytes)
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    try:
        values = dequantize(data if plain is None else data.view(plain), kind)
    except NotImplementedError:
        raise refuse(f"has the type {kind.name}, which is no weight type") from None
    values = values.astype(np.float32, copy=False).reshape(tensor.shape)
    if not np.isfinite(values).all():
        raise refuse("holds values that are not finite")
    return values
