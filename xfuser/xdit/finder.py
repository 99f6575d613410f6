"""Finds the modules of xDiT that have no file here, and says what to use instead of those that are not carried over."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from xfuser.lazy import fallbacks, lazy_attributes
from xfuser.xdit.table import MODULES, NOT_CARRIED_OVER, PIPELINE_MODULES, REFUSING_PIPELINES


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last of Python's finders: it is asked only for what has no file."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module that stands for one of xDiT's; ``None`` for what is not xDiT's either.

        Raises:
            ImportError: xDiT has it, and it is not carried over.
        """
        if not fullname.startswith("xfuser."):
            return None
        if fullname in MODULES:
            inside = (*MODULES, *NOT_CARRIED_OVER)
            is_package = any(name.startswith(f"{fullname}.") for name in inside)
            return importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)
        refuse(fullname)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave it to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Let its names be looked up where they live."""
        names = MODULES[module.__name__]
        if isinstance(names, str):
            own = vars(importlib.import_module(names))
            names = {each: names for each in own if not each.startswith("_") and _is_ours(own[each])}
        found: Any = module
        found.__all__ = list(names)
        found.__getattr__ = lazy_attributes(module.__name__, names)


def _is_ours(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("xfuser.") or isinstance(value, tuple)


def install() -> None:
    """Let Python ask the finder for modules, and modules ask `placeholder` for names; once."""
    if not any(isinstance(each, Finder) for each in sys.meta_path):
        sys.meta_path.append(Finder())
        fallbacks.append(placeholder)


def placeholder(module: str, name: str) -> type | None:
    """Return the class that stands for a pipeline that is not carried over; ``None`` for what is not xDiT's.

    Raises:
        ImportError: xDiT has the name, and it is not carried over. (After an AttributeError the importer would say
            "cannot import name", without the reason.)
    """
    if module in PIPELINE_MODULES and name in REFUSING_PIPELINES:
        from xfuser.xdit.refusing import refusing

        return refusing(name, REFUSING_PIPELINES[name])
    refuse(f"{module}.{name}")
    return None


def refuse(name: str) -> None:
    """Say of a dotted name what to use instead (ImportError), where xDiT has it and it is not carried over."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        instead = NOT_CARRIED_OVER.get(".".join(parts[:length]))
        if instead is not None:
            raise ImportError(f"xDiT's {name} is not carried over: {instead}")
