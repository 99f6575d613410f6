"""Attention of some tokens over all: the others' keys and values are those of their last evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class KeyValueMemory:
    """Keys and values [B, heads, S, d] of every declared attention module, by its number."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def clear(self) -> None:
        self._held.clear()

    def holds(self, modules: range) -> bool:
        return all(module in self._held for module in modules)

    def length(self, module: int) -> int:
        return self._held[module][0].shape[2]

    def keep(self, module: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._held[module] = (key.detach(), value.detach())

    def update(
        self, module: int, places: torch.Tensor, offset: int, others: slice, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put fresh keys and values among the remembered ones, which are changed in place, and return all of them.

        The tokens at ``places`` [B, k] stand at ``offset`` among the fresh ones and among the remembered ones; those
        in ``others`` (text, if any) come along whole.
        """
        remembered = self._held[module]
        for whole, fresh in zip(remembered, (key, value), strict=True):
            count = places.shape[1]
            chosen = fresh[:, :, offset : offset + count]
            index = (places + offset)[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
            whole.scatter_(2, index, chosen)
            if others.start != others.stop:
                begin = count if offset == 0 else 0
                whole[:, :, others] = fresh[:, :, begin : begin + others.stop - others.start]
        return remembered

    def tensors(self) -> Iterator[torch.Tensor]:
        for pair in self._held.values():
            yield from pair


class RememberedAttention(TorchFunctionMode):
    """While entered through `block`, attention in declared modules reads and updates a `KeyValueMemory`.

    Only calls of `scaled_dot_product_attention` inside a declared module are touched: neither the length nor the
    shape tells self attention from cross attention. A declared module that runs without exactly one such call is an
    error, since its tokens would silently attend to the chosen ones alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory: KeyValueMemory | None = None
        self._module: int | None = None
        self._places: torch.Tensor | None = None
        self._text_first = False
        self._calls = 0

    @contextmanager
    def block(self, memory: KeyValueMemory, places: torch.Tensor | None, text_first: bool) -> Iterator[None]:
        """Run a block: on all tokens (``places`` is ``None``), or on those at places [B, k]."""
        self._memory, self._places, self._text_first = memory, places, text_first
        try:
            yield
        finally:
            self._memory = self._places = None

    def wrap(self, number: int, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A wrapper for the forward of a declared attention module."""

        def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self._memory is None:
                    return original(*args, **kwargs)
                self._module, self._calls = number, 0
                try:
                    with self:
                        output = original(*args, **kwargs)
                finally:
                    self._module = None
                if self._calls != 1:
                    raise RuntimeError(
                        f"{name} called scaled_dot_product_attention {self._calls} times, expected once; token "
                        "reduction needs the default attention backend"
                    )
                return output

            return forward

        return wrapper

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not _ATTENTION or self._module is None or self._memory is None:
            return func(*args, **kwargs)
        self._calls += 1
        named = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        if named.get("attn_mask") is not None:
            raise RuntimeError("token reduction cannot run with an attention mask on image tokens; switch it off")
        if self._places is None:
            self._memory.keep(self._module, named["key"], named["value"])
            return func(*args, **kwargs)
        named["key"], named["value"] = self._merge(named["key"], named["value"])
        return func(**named)

    def _merge(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._memory is not None and self._module is not None and self._places is not None
        text = key.shape[2] - self._places.shape[1]
        whole = self._memory.length(self._module)
        others = slice(0, text) if self._text_first else slice(whole - text, whole)
        return self._memory.update(self._module, self._places, text if self._text_first else 0, others, key, value)
