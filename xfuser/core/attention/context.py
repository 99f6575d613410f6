"""The attention context: where the keys and values of the tokens that a block is not run on come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from xfuser.core.attention.key_values import KeyValueMemory
from xfuser.core.tokens import Layout, TokenView

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Exchange(Protocol):
    """Attention over the keys and values of several ranks (`SequenceAttention`)."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        padded: tuple[int, int] | None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class _Running:
    """What is known of the block that runs."""

    memory: KeyValueMemory | None
    places: torch.Tensor | None
    view: TokenView
    batch: int


class AttentionContext(TorchFunctionMode):
    """While entered through `block`, attention in declared modules sees more tokens than the block is run on.

    Those of other ranks are exchanged, where there is an ``exchange``; those of this rank that the block is not run on
    are remembered from their last evaluation. Only calls of `scaled_dot_product_attention` inside a declared module are
    touched: neither the length nor the shape tells self attention from cross attention. A declared module that runs
    without exactly one such call is an error, since its tokens would silently attend to their own few alone.

    Attributes:
        layout: How the streams of the call that runs are shared among ranks; set by whoever cuts them.
    """

    def __init__(self, text_first: bool, exchange: Exchange | None = None) -> None:
        super().__init__()
        self.layout: Layout | None = None
        self._text_first, self._exchange = text_first, exchange
        self._running: _Running | None = None
        self._module: int | None = None
        self._calls = 0

    @contextmanager
    def block(
        self,
        memory: KeyValueMemory | None,
        places: torch.Tensor | None = None,
        view: TokenView | None = None,
        batch: int = 0,
    ) -> Iterator[None]:
        """Run a block: on all tokens, on those at places [B, k] and all text, or on a view of a batch of that size.

        Without a memory nothing is remembered, and all tokens of this rank must be there.
        """
        self._running = _Running(memory, places, view or TokenView(), batch)
        try:
            yield
        finally:
            self._running = None

    def wrap(self, number: int, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A wrapper for the forward of a declared attention module."""

        def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
            @torch.compiler.disable
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self._running is None:
                    return original(*args, **kwargs)
                self._module, self._calls = number, 0
                try:
                    with self:
                        output = original(*args, **kwargs)
                finally:
                    self._module = None
                if self._calls != 1:
                    raise RuntimeError(
                        f"{name} called scaled_dot_product_attention {self._calls} times, expected once; tokens on "
                        "other ranks, and remembered ones, are only seen with the default attention backend"
                    )
                return output

            return forward

        return wrapper

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not _ATTENTION or self._module is None or self._running is None:
            return func(*args, **kwargs)
        self._calls += 1
        named = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        if named.get("attn_mask") is not None:
            raise RuntimeError(
                "an attention mask on image tokens does not go with token reduction, PipeFusion or sequence "
                "parallelism; switch one of them off"
            )
        named["key"], named["value"] = self._remember(self._running, named["key"], named["value"])
        if self._exchange is None:
            return func(**named)
        key, view = named["key"], self._running.view
        return self._exchange(named["query"], key, named["value"], named.get("scale"), self._padded(key, view))

    def _remember(self, running: _Running, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of this rank."""
        assert self._module is not None
        memory, view = running.memory, running.view
        if memory is None:
            return key, value
        if running.places is not None:
            return self._put(memory, running.places, key, value)
        if view.takes_all_tokens:
            memory.keep_rows(self._module, running.batch, view.images, key, value)
            return key, value
        whole = memory.length(self._module)
        spans, begin = [], 0
        for length in self._lengths(whole):
            span = view.span(length)
            spans.append(slice(begin + span.start, begin + span.stop))
            begin += length
        return memory.update_spans(self._module, spans, key, value)

    def _put(
        self, memory: KeyValueMemory, places: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._module is not None
        text = key.shape[2] - places.shape[1]
        whole = memory.length(self._module)
        others = slice(0, text) if self._text_first else slice(whole - text, whole)
        return memory.update(self._module, places, text if self._text_first else 0, others, key, value)

    def _lengths(self, whole: int) -> list[int]:
        """This rank's tokens of every stream that a module attends over, in its order; ``whole`` is their sum."""
        return self._each_stream(whole, self._local)

    def _local(self, stream: int) -> int:
        assert self.layout is not None
        return self.layout.local(stream)

    def _each_stream(self, whole: int, measure: Callable[[int], int]) -> list[int]:
        """A measure of the image, or of image and text where the module joins them."""
        assert self.layout is not None
        streams = [0]
        if whole != self._local(0):
            text = list(range(1, len(self.layout.lengths)))
            streams = [*text, 0] if self._text_first else [0, *text]
        return [measure(stream) for stream in streams]

    def _padded(self, key: torch.Tensor, view: TokenView) -> tuple[int, int] | None:
        """What queries and keys are padded to, where not all ranks hold equally many."""
        assert self.layout is not None
        if self.layout.even:
            return None
        longest = self._each_stream(key.shape[2], self.layout.longest)
        asked = [view.span(length) for length in longest]
        return sum(span.stop - span.start for span in asked), sum(longest)
