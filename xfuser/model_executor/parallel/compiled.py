"""Compiled blocks: each block's own forward, so that nothing that decides is inside a compiled region."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from xfuser.model_executor.cache.patching import Replacement


def compile_blocks(blocks: Sequence[nn.Module]) -> list[Replacement]:
    """Put a compiled forward on every block; to be done before anything else wraps it."""
    return [Replacement(block, "forward", _compiled) for block in blocks]


def _compiled(original: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(_own_code(original))

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Whoever counts FLOPs looks at single operations, and the compiler would give such a call up for good.
        return (original if is_in_torch_dispatch_mode() else compiled)(*args, **kwargs)

    return forward


def _own_code(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method with code of its own.

    The compiler keeps what it made of a piece of code together, and gives up on code that it has met in too many
    forms; all blocks of a model run the same code, each with attention modules that are wrapped differently.
    """
    function = getattr(method, "__func__", None)
    if function is None:
        return method
    copied = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(copied, method.__self__)  # type: ignore[attr-defined]
