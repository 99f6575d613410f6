"""Blocks that the user compiles, before or after a cache is attached: the decision stays outside of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from xfuser.model_executor.cache.patching import Replacement


def check_compiled(blocks: Sequence[nn.Module], breaks: bool) -> None:
    """Refuse blocks that are compiled and whose graphs cannot be entered beneath a wrapper (ValueError).

    Args:
        blocks: The blocks.
        breaks: As for `CompilableBlock`.
    """
    for block in blocks:
        hooks = len(block._forward_hooks) + len(block._forward_pre_hooks)
        if getattr(block, "_compiled_call_impl", None) is not None and (hooks or breaks):
            why = "has hooks" if hooks else "is to be evaluated on some of its tokens"
            raise ValueError(
                f"a {type(block).__name__} is compiled already and {why}; attach the cache first, then compile"
            )


class CompilableBlock:
    """A block whose ``forward`` is replaced by a wrapper that decides, around a forward that may be compiled.

    ``block.compile()``, which diffusers' ``compile_repeated_blocks`` calls, compiles a module's call and with it
    whatever stands in the place of its forward. While a cache is attached it compiles the block's own forward instead,
    beneath the wrapper. A block that was compiled before keeps its graph, which is entered with the wrapper out of
    sight. Taking the cache off leaves a block compiled as the user asked.

    Args:
        block: The block.
        wrap: Makes the wrapper from the block's own forward.
        breaks: Whether attention modules within the block are wrapped as well, so that there is no full graph of it.
    """

    def __init__(
        self, block: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], breaks: bool
    ) -> None:
        self._block, self._breaks = block, breaks
        self._before = getattr(block, "_compiled_call_impl", None)
        self._asked: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._compiled: Callable[..., Any] | None = None
        if self._before is not None:
            self._compiled = self._enter
            block._compiled_call_impl = None
        self._forward = Replacement(block, "forward", lambda original: wrap(self._evaluating(original)))
        self._compile = Replacement(block, "compile", self._compiling)

    def undo(self) -> None:
        self._compile.undo()
        self._forward.undo()
        if self._before is not None:
            self._block._compiled_call_impl = self._before
        if self._asked is not None:
            args, kwargs = self._asked
            self._block.compile(*args, **kwargs)

    def _evaluating(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            # Whoever counts FLOPs looks at single operations, and the compiler would give such a call up for good.
            compiled = None if is_in_torch_dispatch_mode() else self._compiled
            return (compiled or original)(*args, **kwargs)

        evaluate.__wrapped__ = original  # type: ignore[attr-defined]
        return evaluate

    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        """Call what was compiled before; it looks the block's forward up, and must find its own."""
        assert self._before is not None
        wrapper = self._forward.hide()
        try:
            return self._before(*args, **kwargs)
        finally:
            self._forward.show(wrapper)

    def _compiling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compile(*args: Any, **kwargs: Any) -> None:
            if self._breaks and kwargs.get("fullgraph"):
                raise ValueError(
                    f"a {type(self._block).__name__} that may be evaluated on some of its tokens is no full graph; "
                    "leave fullgraph out, or motion_threshold and granularity='token'"
                )
            self._asked = args, kwargs
            self._compiled = torch.compile(self._forward.original, *args, **kwargs)

        return compile
