"""Lets transformers know our model classes once both packages are imported, in either order. Imports nothing itself:
`import nasbench` stays cheap where transformers is not used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TABLES = {
    "transformers.models.auto.configuration_auto": "nasbench.runtime.auto_config",
    "transformers.models.auto.modeling_auto": "nasbench.runtime.auto_model",
}
"""A module of transformers, and ours whose `register` adds to it."""


def _register(table: str) -> None:
    try:
        import_module(TABLES[table]).register()
    except ImportError as error:  # of another version: transformers must still import
        import logging

        told = "transformers will not load hybrids of nasbench, which needs its version 5: %s"
        logging.getLogger("nasbench").warning(told, error)


class _Then:
    """A module's own loader, and then ours."""

    def __init__(self, name: str, loader: Loader) -> None:
        self.name, self.loader = name, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(self.name)


class _Finder:
    """On `sys.meta_path`. The base classes of finders and loaders cost more to import than all of this."""

    def __init__(self) -> None:
        self.left = set(TABLES)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.left:
            return None
        self.left.discard(fullname)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(fullname, spec.loader)  # type: ignore[assignment]
        return spec


def watch() -> None:
    """Registers now what transformers has loaded, the rest when it will be."""
    for table in TABLES:
        if table in sys.modules:
            _register(table)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
