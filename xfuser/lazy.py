"""Names that a package looks up on first use, so that importing it does not import torch and diffusers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

# Asked for ``(module, name)`` that a module does not have; returns what stands for it, or raises, or returns None.
fallbacks: list[Callable[[str, str], Any]] = []


def lazy_attributes(module: str, public: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__``.

    Args:
        module: The module's name.
        public: Where each public name lives that is not in the module itself.
    """

    def __getattr__(name: str) -> Any:
        if name in public:
            return getattr(importlib.import_module(public[name]), name)
        if name.startswith("__"):  # Python asks every module for some of these, and goes on without
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        for fallback in fallbacks:
            found = fallback(module, name)
            if found is not None:
                return found
        known = f"; it has {', '.join(public)}" if public else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}{known}")

    return __getattr__
