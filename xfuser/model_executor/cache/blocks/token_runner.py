"""Runs blocks on some of their tokens, which attend to what is remembered of the others, or is on other ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from xfuser.config import CacheConfig
from xfuser.core.attention import AttentionContext
from xfuser.core.tokens import TokenView
from xfuser.model_executor.adapters import BoundArguments, ModelSpec, Streams
from xfuser.model_executor.adapters.streams import StreamForm, take_places
from xfuser.model_executor.cache.blocks.state import CallState
from xfuser.model_executor.cache.blocks.token_choice import TokenChoice
from xfuser.model_executor.cache.patching import Replacement


class TokenRunner:
    """Runs blocks within the attention context.

    Args:
        spec: Of the model.
        transformer: The model.
        form: Translates between its blocks and streams.
        attention: The context.
        remembers: Whether to keep keys and values of every evaluation, so that later ones may be of some tokens only.
    """

    def __init__(
        self, spec: ModelSpec, transformer: nn.Module, form: StreamForm, attention: AttentionContext, remembers: bool
    ) -> None:
        self.attention, self._form, self._remembers = attention, form, remembers
        self._groups = spec.groups_of(transformer)
        self._modules: list[tuple[str, nn.Module]] = []
        self._numbers: list[range] = []
        for index, (block, group) in enumerate(zip(spec.blocks(transformer), self._groups, strict=True)):
            found = [(f"block {index}'s {name}", getattr(block, name, None)) for name in group.self_attention]
            found = [(name, module) for name, module in found if module is not None]
            if not found:
                expected = " or ".join(group.self_attention)
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
        spec: ModelSpec,
        transformer: nn.Module,
        form: StreamForm,
        attention: AttentionContext | None,
        displaces: bool,
    ) -> TokenRunner | None:
        """A runner where the settings may evaluate some tokens only, or where ranks share them (``attention``)."""
        reduces = (bool(config.motion_threshold) and config.mode is None) or config.granularity == "token"
        if attention is None and not reduces and not displaces:
            return None
        return cls(spec, transformer, form, attention or AttentionContext(spec.text_first), reduces or displaces)

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
        self, active: CallState, original: Callable[..., Any], named: dict[str, Any], view: TokenView, batch: int
    ) -> Any:
        """A block on a view of a batch of that size; the other patches' keys and values are the remembered ones."""
        with self.attention.block(active.branch.keys if self._remembers else None, view=view, batch=batch):
            return original(**named)

    def evaluate_some(
        self,
        active: CallState,
        unit: int,
        tokens: TokenChoice,
        streams: Streams,
        arguments: BoundArguments,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[TokenChoice, Streams]:
        """The tokens evaluated, at least the chosen ones, and the outputs of these and of all text."""
        group, lengths = self._groups[unit], [stream.shape[1] for stream in streams]
        new: dict[str, Any] = {}
        if group.per_token:
            tokens = tokens.shared()
            for argument in group.per_token:
                value = arguments.read(argument.name, args, kwargs)
                new[argument.name] = take_places(argument, value, tokens.places[0], lengths)
        chosen = (tokens.take(streams[0]), *streams[1:])
        new |= self._form.write(group, chosen)
        args, kwargs = arguments.replaced(args, kwargs, new)
        with self.attention.block(active.branch.keys, tokens.places):
            output = original(*args, **kwargs)
        return tokens, self._form.unpack(group, output, chosen)
