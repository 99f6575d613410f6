"""Runs blocks on some of their tokens, which attend to what is remembered of the others, or is on other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.attention import AttentionContext
from xfuser.core.shards import View
from xfuser.model_executor.adapters import BoundArguments, ModelDeclaration, Streams
from xfuser.model_executor.cache.attach import Replacement
from xfuser.model_executor.cache.state import CallState
from xfuser.model_executor.cache.tokens import TokenChoice


class TokenRunner:
    """Runs blocks within the attention context.

    Args:
        declaration: Of the model.
        blocks: All its blocks.
        attention: The context.
        remembers: Whether to keep keys and values of every evaluation, so that later ones may be of some tokens only.
    """

    def __init__(
        self, declaration: ModelDeclaration, blocks: Sequence[nn.Module], attention: AttentionContext, remembers: bool
    ) -> None:
        self.declaration = declaration
        self.attention, self._remembers = attention, remembers
        self._modules: list[tuple[str, nn.Module]] = []
        self._numbers: list[range] = []
        for index, block in enumerate(blocks):
            found = [(f"block {index}'s {name}", getattr(block, name, None)) for name in declaration.self_attention]
            found = [(name, module) for name, module in found if module is not None]
            if not found:
                expected = " or ".join(declaration.self_attention)
                raise TypeError(
                    f"block {index} has no attention module {expected}; token reduction, PipeFusion and sequence "
                    "parallelism need one"
                )
            self._numbers.append(range(len(self._modules), len(self._modules) + len(found)))
            self._modules += found

    @classmethod
    def where_needed(
        cls,
        config: CacheConfig,
        declaration: ModelDeclaration,
        blocks: Sequence[nn.Module],
        attention: AttentionContext | None,
        displaces: bool,
    ) -> TokenRunner | None:
        """A runner where the settings may evaluate some tokens only, or where ranks share them (``attention``)."""
        reduces = (bool(config.motion_threshold) and config.mode is None) or config.granularity == "token"
        if attention is None and not reduces and not displaces:
            return None
        return cls(declaration, blocks, attention or AttentionContext(declaration.text_first), reduces or displaces)

    def attach(self) -> list[Replacement]:
        return [
            Replacement(module, "forward", self.attention.wrap(number, name))
            for number, (name, module) in enumerate(self._modules)
        ]

    def ready(self, active: CallState, unit: int) -> bool:
        """Whether a block (units are blocks here) was evaluated on all tokens before."""
        return active.branch.memory.usable(unit) and active.branch.keys.holds(self._numbers[unit])

    def evaluate_all(
        self, active: CallState, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with self.attention.block(active.branch.keys if self._remembers else None):
            return original(*args, **kwargs)

    def evaluate_view(
        self, active: CallState, original: Callable[..., Any], named: dict[str, Any], view: View, batch: int
    ) -> Any:
        """A block on a view of a batch of that size; the other patches' keys and values are the remembered ones."""
        with self.attention.block(active.branch.keys if self._remembers else None, view=view, batch=batch):
            return original(**named)

    def evaluate_some(
        self,
        active: CallState,
        tokens: TokenChoice,
        streams: Streams,
        arguments: BoundArguments,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[TokenChoice, Streams]:
        """The tokens evaluated, at least the chosen ones, and the outputs of these and of all text."""
        text = sum(stream.shape[1] for stream in streams[1:])
        new: dict[str, Any] = {}
        if self.declaration.per_token:
            tokens = tokens.shared()
            rows = self._rows(tokens.places[0], text, tokens.tokens)
            for name in self.declaration.per_token:
                new[name] = _rows_of(arguments.read(name, args, kwargs), rows)
        chosen = (tokens.take(streams[0]), *streams[1:])
        new |= dict(zip(self.declaration.streams, chosen, strict=True))
        args, kwargs = arguments.replaced(args, kwargs, new)
        with self.attention.block(active.branch.keys, tokens.places):
            output = original(*args, **kwargs)
        return tokens, self.declaration.unpack(output, chosen)

    def _rows(self, places: torch.Tensor, text: int, image: int) -> torch.Tensor:
        """Places of text and chosen image tokens in the order of joint attention."""
        if self.declaration.text_first:
            return torch.cat([torch.arange(text, device=places.device), places + text])
        return torch.cat([places, torch.arange(image, image + text, device=places.device)])


def _rows_of(value: Any, rows: torch.Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_rows_of(each, rows) for each in value)
    return value if value is None else value[rows]
