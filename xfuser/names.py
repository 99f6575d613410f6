"""Names that a package looks up on first use, and names of xDiT that it does not carry over."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def looked_up(
    package: str, public: Mapping[str, str], not_carried_over: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """A module's ``__getattr__``.

    Args:
        package: The module's name.
        public: Where each public name lives.
        not_carried_over: What to use instead of each name that xDiT has and this engine does not.
    """

    def __getattr__(name: str) -> Any:
        if name in public:
            return getattr(importlib.import_module(public[name]), name)
        if not_carried_over and name in not_carried_over:
            # An AttributeError would reach the importer as "cannot import name", without the reason.
            raise ImportError(f"xDiT's {package}.{name} is not carried over: {not_carried_over[name]}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(public)}")

    return __getattr__
