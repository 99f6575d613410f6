"""Names that a package looks up on first use, and names of xDiT that it does not carry over."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def looked_up(module: str, public: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__``.

    Of xDiT's names that are not carried over a pipeline is found, and refuses when it is used; any other is an
    ImportError that says what to use instead.

    Args:
        module: The module's name.
        public: Where each public name lives that is not in the module itself.
    """

    def __getattr__(name: str) -> Any:
        if name in public:
            return getattr(importlib.import_module(public[name]), name)
        if name.startswith("__"):  # Python asks every module for some of these, and goes on without
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        from xfuser.xdit.finder import refuse, refusing_pipeline

        pipeline = refusing_pipeline(module, name)
        if pipeline is not None:
            return pipeline
        # An AttributeError would reach the importer as "cannot import name", without the reason.
        refuse(f"{module}.{name}")
        known = f"; it has {', '.join(public)}" if public else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}{known}")

    return __getattr__
