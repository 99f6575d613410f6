"""Reads and replaces the arguments of a call by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


class BoundArguments:
    """Reads a forward call's arguments by name, whether they came by position or by keyword."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._positions = {name: index for index, name in enumerate(inspect.signature(forward).parameters)}

    def read(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The argument's value, ``None`` where the caller left it out."""
        if name in kwargs:
            return kwargs[name]
        position = self._positions.get(name, len(args))
        return args[position] if position < len(args) else None

    def replaced(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], new: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with other values for some names."""
        by_position = {self._positions[name]: value for name, value in new.items() if name not in kwargs}
        return (
            tuple(by_position.get(index, value) for index, value in enumerate(args)),
            {name: new.get(name, value) for name, value in kwargs.items()},
        )

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return dict(zip(self._positions, args, strict=False)) | dict(kwargs)
