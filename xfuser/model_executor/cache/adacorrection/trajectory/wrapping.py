"""Stand before every call of a pipeline or a denoiser, outside of compiled graphs, hooks and whatever else is attached.

Python looks ``__call__`` up on the class, so the object is given a subclass of its own class, of the same name. Its
attributes, its ``forward`` among them, stay as they are, and giving the old class back leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class CallWrapper:
    """Routes an object's calls through ``handle(original, args, kwargs)``.

    Args:
        owner: A pipeline or a module.
        handle: Called in place of it; ``original`` is the call itself.
    """

    def __init__(self, owner: Any, handle: Handler) -> None:
        self.owner = owner
        self._class = type(owner)
        original = self._class.__call__

        def __call__(wrapped: Any, *args: Any, **kwargs: Any) -> Any:
            return handle(original.__get__(wrapped), args, kwargs)

        __call__.__wrapped__ = original  # type: ignore[attr-defined]
        namespace = {
            "__call__": __call__,
            "__module__": self._class.__module__,
            "__qualname__": self._class.__qualname__,
            "__doc__": self._class.__doc__,
            "called_through_xfuser": True,
        }
        object.__setattr__(owner, "__class__", type(self._class.__name__, (self._class,), namespace))

    def undo(self) -> None:
        object.__setattr__(self.owner, "__class__", self._class)


def is_wrapped(owner: Any) -> bool:
    """Whether a `CallWrapper` stands before the object."""
    return "called_through_xfuser" in vars(type(owner))
