"""Puts the engine's forward in place of a module's own, on the instance, and takes it away without a trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

_ABSENT = object()


class Replacement:
    """One attribute of one object, replaced by a wrapper that knows the original."""

    def __init__(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._name, self._wrap = name, wrap
        self.put_on(owner)

    def put_on(self, owner: Any) -> None:
        """Replace the same attribute of this object; to be called after `undo`."""
        self.owner = owner
        self._previous = vars(owner).get(self._name, _ABSENT)
        self.original = getattr(owner, self._name)
        wrapper = self._wrap(self.original)
        # inspect.signature follows __wrapped__: pipelines look at the parameters of what they call.
        wrapper.__wrapped__ = self.original  # type: ignore[attr-defined]
        wrapper.attached_by_xfuser = True  # type: ignore[attr-defined]
        setattr(owner, self._name, wrapper)

    def hide(self) -> Any:
        """Give the original its place back for a moment; returns the wrapper, which `show` puts there again."""
        wrapper = vars(self.owner)[self._name]
        self.undo()
        return wrapper

    def show(self, wrapper: Any) -> None:
        """End what `hide` began."""
        setattr(self.owner, self._name, wrapper)

    def undo(self) -> None:
        if self._previous is _ABSENT:
            delattr(self.owner, self._name)
        else:
            setattr(self.owner, self._name, self._previous)


def is_attached(owner: Any, name: str = "forward") -> bool:
    return getattr(vars(owner).get(name), "attached_by_xfuser", False)


def check_transformer_free(transformer: nn.Module) -> None:
    """Refuse a transformer that an engine is attached to already (ValueError)."""
    if is_attached(transformer):
        raise ValueError(
            f"this {type(transformer).__name__} has a cache attached already; call remove() on its engine first"
        )


def check_scheduler_free(scheduler: Any) -> None:
    """Refuse a scheduler whose calls another engine follows (ValueError)."""
    if is_attached(scheduler, "step"):
        raise ValueError(
            "this scheduler belongs to a pipeline with a cache attached; call remove() on its engine first"
        )


def has_registry(module: nn.Module) -> bool:
    """Whether diffusers has put its hook registry on the module."""
    return "_diffusers_hook" in vars(module)


def drop_empty_registry(module: nn.Module) -> None:
    """Take off a registry that holds no hook: diffusers leaves one behind whenever it merely looks for it."""
    if has_registry(module) and not module._diffusers_hook.hooks:
        del module._diffusers_hook


def named_contexts(note: Callable[[str | None], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrapper for diffusers' ``cache_context`` that notes the name of the branch."""

    def wrap(original: Callable[..., AbstractContextManager[None]]) -> Callable[..., AbstractContextManager[None]]:
        @contextmanager
        def cache_context(name: str, **keywords: Any) -> Any:
            note(name)
            try:
                with original(name, **keywords):
                    yield
            finally:
                note(None)

        return cache_context

    return wrap


def scheduler_calls(scheduler: Any, starts: Callable[[], None], steps: Callable[[], None]) -> list[Replacement]:
    """Tells of a scheduler's own calls: ``set_timesteps`` starts a generation, ``step`` ends a step."""

    def telling(tell: Callable[[], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                tell()
                return original(*args, **kwargs)

            return call

        return wrap

    return [
        Replacement(scheduler, "set_timesteps", telling(starts)),
        Replacement(scheduler, "step", telling(steps)),
    ]
