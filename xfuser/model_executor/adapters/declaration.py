"""How a diffusers transformer is described to the engine: names and facts, no control flow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Streams = tuple[torch.Tensor, ...]

# Of the methods that have a threshold, where a family names none: the default of most implementations.
COMMON_THRESHOLDS = {"Fast": 0.05, "Tea": 0.05, "Fb": 0.05}


@dataclass(frozen=True)
class KnownModel:
    """One model of a family, found by its configuration, whose thresholds differ from the family's."""

    configuration: Mapping[str, Any]
    thresholds: Mapping[str, float]

    def describes(self, transformer: nn.Module) -> bool:
        """Whether a transformer has this model's configuration."""
        found = getattr(transformer, "config", {})
        return all(found.get(name) == value for name, value in self.configuration.items())


@dataclass(frozen=True)
class ModelDeclaration:
    """One model family, cut into blocks.

    Attributes:
        transformer_class: Name of the diffusers class.
        block_lists: Attributes that hold the blocks, in the order in which they run.
        layer_counts: Settings of the transformer that say how many blocks those lists hold.
        streams: Names of the block arguments that carry tokens, ``hidden_states`` (the image) first.
        returns: The same names in the order in which a block returns them.
        conditioning: Arguments of the transformer that stay the same for all steps of a branch; when they change, a new
            generation has begun.
        modulated_input: From the first block and its bound arguments, what TeaCache compares: the input after the first
            norm's scale and shift, of shape [B, P, D].
        tea_coefficients: TeaCache's polynomial for this family, highest degree first; ``None`` where none is published
            and the identity stands in, named as such.
        between_blocks: Arguments of the transformer that add something between blocks (ControlNet). When one is given,
            blocks are remembered one by one, since a residual of the whole stack would count the addition twice.
        skips_blocks: Arguments of the transformer that leave some of its blocks out (skip-layer guidance). A call with
            one goes past the cache and is not counted: what is remembered and planned speaks of all blocks.
        self_attention: Names, within a block, of the attention modules in which image tokens attend to each other; one
            that a block does not have is passed over.
        per_image: Arguments of the transformer and of its blocks, and entries of dicts among them, that hold one row an
            image of the batch.
        per_token: Arguments of a block that hold one entry a token, text and image, in the order of the attention.
        guidance: How pipelines evaluate the two branches of classifier-free guidance: ``"batch"``, side by side in one
            call, or ``"calls"``, one call after the other.
        tail_needs: Parts of block 0 that the transformer reads outside of it.
        packs: Side of the square of latents that its pipelines put into one channel vector, before the transformer's
            own patches.
        text_first: Whether text tokens come before the image's in joint attention.
        thresholds: The family's default ``rel_l1_thresh`` for each base method that has one.
        known_models: Models of the family with thresholds of their own.
        timestep_direction: -1 where the timestep that the transformer sees falls during a generation, +1 where it
            rises.
    """

    transformer_class: str
    block_lists: tuple[str, ...]
    streams: tuple[str, ...]
    returns: tuple[str, ...]
    conditioning: tuple[str, ...]
    modulated_input: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]
    tea_coefficients: tuple[float, ...] | None = None
    between_blocks: tuple[str, ...] = ()
    skips_blocks: tuple[str, ...] = ()
    layer_counts: tuple[str, ...] = ("num_layers",)
    self_attention: tuple[str, ...] = ()
    per_image: tuple[str, ...] = ()
    per_token: tuple[str, ...] = ()
    guidance: str = "batch"
    tail_needs: tuple[str, ...] = ()
    packs: int = 1
    text_first: bool = False
    timestep_direction: int = -1
    thresholds: Mapping[str, float] = field(default_factory=dict)
    known_models: tuple[KnownModel, ...] = ()

    def threshold(self, method: str | None, transformer: nn.Module) -> float | None:
        """The default ``rel_l1_thresh`` of a base method for this transformer, without unit; ``None`` where the method
        has none.
        """
        own = [known.thresholds for known in self.known_models if known.describes(transformer)]
        tables = (*own, self.thresholds, COMMON_THRESHOLDS)
        return next((each[method] for each in tables if method in each), None)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """All blocks in the order in which they run."""
        return [block for name in self.block_lists for block in getattr(transformer, name)]

    def pack(self, streams: Streams) -> Any:
        """What a block returns, from its streams in the declared order."""
        if len(self.streams) == 1:
            return streams[0]
        by_name = dict(zip(self.streams, streams, strict=True))
        return tuple(by_name[name] for name in self.returns)

    def unpack(self, output: Any, inputs: Streams) -> Streams:
        """The streams in the declared order, from what a block returned and what it was given.

        A stream that comes back as ``None`` (the text, from SD3's last block) counts as unchanged: nobody reads it any
        more, so whatever `pack` hands on in its place will do.
        """
        if len(self.streams) == 1:
            return (output[0] if isinstance(output, tuple) else output,)
        by_name = dict(zip(self.returns, output, strict=True))
        return tuple(
            before if by_name[name] is None else by_name[name]
            for name, before in zip(self.streams, inputs, strict=True)
        )

    def take_tokens(self, value: Any, spans: Sequence[slice], lengths: Sequence[int]) -> Any:
        """Those entries of a per-token argument that belong to spans of the streams, image first, of these lengths."""
        if isinstance(value, tuple):
            return tuple(self.take_tokens(each, spans, lengths) for each in value)
        if value is None:
            return None
        order = [*range(1, len(lengths)), 0] if self.text_first else list(range(len(lengths)))
        parts, begin = [], 0
        for stream in order:
            parts.append(value[begin + spans[stream].start : begin + spans[stream].stop])
            begin += lengths[stream]
        return torch.cat(parts)

    def heads(self, transformer: nn.Module) -> int:
        """Attention heads, which Ulysses splits."""
        return int(transformer.config.num_attention_heads)

    def check_return_order(self, hidden_states_first: bool | None) -> None:
        """Refuse a claim about the return order that this family contradicts."""
        if hidden_states_first is None or len(self.streams) == 1:
            return
        if hidden_states_first != (self.returns[0] == "hidden_states"):
            raise ValueError(
                f"return_hidden_states_first={hidden_states_first} does not fit {self.transformer_class}, "
                f"whose blocks return ({', '.join(self.returns)}); leave it out or turn it round"
            )


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
