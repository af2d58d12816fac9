"""A named table of things that third parties can extend through an entry-point group."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from nasbench.core.errors import UserError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects. Entry points of `group` are read on the first look-up that needs them, so that
    importing a registry costs nothing.

    Args:
        what: what an entry is called in error messages, e.g. "layer kind".
        group: entry-point group that adds entries, e.g. "nasbench.blocks"; None for a closed table.
    """

    def __init__(self, what: str, group: str | None = None) -> None:
        self.what = what
        self.group = group
        self._items: dict[str, T] = {}
        self._discovered = group is None

    def register(self, name: str, item: T) -> T:
        """Adds `item`; raises UserError if `name` already means something else."""
        if self._items.get(name, item) is not item:
            raise UserError(f"{self.what} {name!r} is already registered as {self._items[name]!r}")
        self._items[name] = item
        return item

    def discover(self) -> None:
        """Loads the entry points of the group once; a broken one is reported with its name."""
        if self._discovered:
            return
        self._discovered = True
        for point in entry_points(group=self.group or ""):
            try:
                item = point.load()
            except Exception as error:
                raise UserError(f"entry point {point.name!r} ({point.value}) of {self.group} fails: {error}") from error
            self.register(point.name, item)

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            self.discover()
        if name not in self._items:
            raise unknown(self.what, name, self._items)
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        self.discover()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self.discover()
        return iter(sorted(self._items))

    def __len__(self) -> int:
        self.discover()
        return len(self._items)
