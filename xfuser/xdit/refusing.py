"""Stands for pipelines that are not carried over: a script may import and name them, but not use them."""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn


class _Refusing(type):
    """Refuses whatever is done with the class, but to compare and to print it."""

    instead: str

    def __call__(cls, *args: Any, **keywords: Any) -> NoReturn:
        raise NotImplementedError(_reason(cls))

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # what Python and inspection ask every class for
        raise NotImplementedError(_reason(cls))


def _reason(of: _Refusing) -> str:
    return f"xDiT's {of.__name__} is not carried over: {of.instead}"


@cache
def refusing(name: str, instead: str) -> type:
    """A class of this name; calling it, or asking it for an attribute, is a NotImplementedError of one line."""
    return _Refusing(name, (), {"__doc__": f"Not carried over: {instead}", "instead": instead})
