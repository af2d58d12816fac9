"""The one reader of numbers, flags, texts and lists in a configuration: checks type and range, and names the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nasbench.core.errors import UserError, unknown
from nasbench.core.files import read_json

MOST = 1 << 31
"""Largest whole number that a size may be."""

_REQUIRED: Any = object()


class Fields:
    """The fields of one JSON object or GGUF header, called `where` in messages. A null field counts as absent."""

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "", read: set[str] | None = None) -> None:
        self.data = data
        self.where = where
        self._prefix = prefix
        self._read: set[str] = set() if read is None else read

    def under(self, prefix: str) -> Fields:
        """The same fields, for names that lack the prefix."""
        return Fields(self.data, self.where, prefix, self._read)

    def raw(self, name: str) -> Any:
        """The value as it stands, or None; counts as read."""
        self._read.add(self._prefix + name)
        return self.data.get(self._prefix + name)

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise UserError(f"{self.where} lacks the field {self._prefix}{name}")
        return default

    def wrong(self, name: str, expected: str) -> UserError:
        """The error for a field whose value is not what is `expected`."""
        return UserError(f"{self.where}: {self._prefix}{name} = {_short(self.raw(name))} is not {expected}")

    def integer(self, name: str, default: Any = _REQUIRED, *, least: int = 1, most: int = MOST) -> Any:
        """A whole number from `least` to `most`, or the default."""
        value = self._get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, "a positive whole number" if least == 1 else f"a whole number from {least} on")
        if value > most:
            raise self.wrong(name, f"a sensible size: at most {most}")
        return value

    def number(self, name: str, default: Any = _REQUIRED, *, text: bool = False) -> Any:
        """A positive finite number, or the default. `text` also takes a number written as text ("1e-5")."""
        value = self._get(name, default)
        if value is default:
            return value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            result = float(value) if number or (text and isinstance(value, str)) else 0.0
        except (ValueError, OverflowError):
            result = 0.0
        if not 0 < result < float("inf"):
            raise self.wrong(name, "a positive number")
        return result

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false, or the default."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED, choices: Iterable[str] = ()) -> Any:
        """A text, or the default; one of `choices` if there are any."""
        value = self._get(name, default)
        if value is default:
            return value
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        if choices and value not in choices:
            raise UserError(f"{self.where}: {unknown(self._prefix + name, value, choices)}")
        return value

    def items(self, name: str, kind: type, length: int | None = None) -> list[Any] | None:
        """A list of values of one type, of `length` if given; None where it is absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.wrong(name, f"a list of {'texts' if kind is str else 'whole numbers'}")
        if length is not None and len(value) != length:
            raise UserError(f"{self.where}: {name} has {len(value)} entries, the model has {length} layers")
        return value

    def object(self, name: str) -> Fields:
        """The fields of a nested object; empty where it is absent."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def neutral(self, name: str, *legal: Any) -> None:
        """Refuses the field by name unless it is absent or one of the `legal` values, which change nothing."""
        value = self.raw(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in legal):
            only = f"only {legal[0]!r} or absent" if legal else "leave it out"
            raise UserError(f"{self.where}: {self._prefix}{name} = {_short(value)} is not supported: {only}")

    def finish(self, inert: Iterable[str]) -> None:
        """Refuses by name every field that nobody read, unless it is one of the `inert` ones, null or false."""
        known = {*inert, *self._read}
        for name, value in self.data.items():
            if name not in known and value is not None and value is not False:
                raise UserError(f"{self.where}: the field {name} = {_short(value)} is not supported: leave it out")


def refuse_pointer(path: Path) -> None:
    """Raises UserError for a file that Git LFS has not fetched."""
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError naming the file."""
    if path.is_file():
        refuse_pointer(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def token_ids(fields: Fields, name: str) -> tuple[int, ...]:
    """Ids of a field that holds one id or a list of them; () where it is absent."""
    value = fields.raw(name)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if any(isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < MOST for one in ids):
        raise fields.wrong(name, "a token id or a list of them")
    return ids
