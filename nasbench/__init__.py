"""nasbench: search hybrid-attention placements of a pre-trained LLM by what the target device really does.

    import nasbench as nb

    nb.read_profiles("nvidia-h200")                        rows of a device
    nb.cost("28A", "qwen3-1.7b", "64k")                    what a placement costs
    nb.search("runs/mine", full_attention=(4, 8))
    nb.trials("runs/mine")  nb.front("runs/mine")  nb.recommend("runs/mine")
    nb.plot.front("runs/mine")                             matplotlib axes

`nasbench.api` explains every function. They are imported when first used, so that importing nasbench costs nothing.
"""

import sys as _sys
from importlib import import_module as _import
from types import ModuleType as _Module
from typing import Any as _Any

__version__ = "0.1.0"
_ROOMS = ("cost", "devices", "report", "search")
_API = (
    "cost_model", "front", "models", "read_profiles", "recommend", "scores", "trials", "validation",
)  # fmt: skip


class _Room(_Module):
    """A package that has the name of a function of nasbench.api, and can be called as that function."""

    def __call__(self, *args: _Any, **kwargs: _Any) -> _Any:
        return getattr(_import("nasbench.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(_Module):
    def __setattr__(self, name: str, value: _Any) -> None:
        # The import system binds every package here once it is loaded.
        if name in _ROOMS and type(value) is _Module:
            value.__class__ = _Room
        super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> _Any:
    if name in _ROOMS:
        return _import(f"nasbench.{name}")
    if name == "plot":
        return _import("nasbench.report.plot")
    if name in _API:
        return getattr(_import("nasbench.api"), name)
    raise AttributeError(f"module 'nasbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API, *_ROOMS, "plot"})


from nasbench.runtime.on_import import watch as _watch  # noqa: E402

_watch()
