"""How a diffusers denoiser is described to the engine: names and facts. Needs no torch until a model is at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class TokenArgument:
    """An argument of a block that holds one entry a token: a tensor, or a tuple of tensors.

    Attributes:
        name: Its name.
        dim: The dimension that counts the tokens.
        streams: Whose tokens it lists, by their places in the model's streams, one stream after the other.
        dims: How many dimensions it has where it does so; with any other number it holds nothing of single tokens.
        is_made_of_tokens: Whether the model makes it from blocks' outputs, so that a rank's holds its own tokens only.
    """

    name: str
    dim: int = 0
    streams: tuple[int, ...] = (0,)
    dims: int | None = None
    is_made_of_tokens: bool = False


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of one form, in the order in which they run.

    Attributes:
        path: Where the lists of them are, from the denoiser on; ``*`` stands for each of a list.
            ``"down_blocks.*.attentions.*.transformer_blocks"`` finds nothing in what has no ``attentions``.
        takes: Names of the block arguments that carry tokens, the image's first: one a stream of the model, or one that
            holds several streams (``joins``).
        returns: The same names in the order in which a block returns them.
        joins: Where one argument holds all streams, one after the other: their order in it.
        self_attention: Names, within a block, of the attention modules in which image tokens attend to each other; one
            that a block does not have is passed over.
        per_token: Its arguments that hold one entry a token.
    """

    path: str
    takes: tuple[str, ...] = ("hidden_states",)
    returns: tuple[str, ...] = ("hidden_states",)
    joins: tuple[int, ...] = ()
    self_attention: tuple[str, ...] = ()
    per_token: tuple[TokenArgument, ...] = ()

    def blocks(self, transformer: nn.Module) -> Iterator[nn.Module]:
        """Find the blocks."""
        yield from _found(transformer, [*self.path.split("."), "*"])


def _found(part: Any, path: list[str]) -> Iterator[Any]:
    if not path:
        yield part
    elif path[0] == "*":
        for each in part:
            yield from _found(each, path[1:])
    elif getattr(part, path[0], None) is not None:
        yield from _found(getattr(part, path[0]), path[1:])


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
class ModelSpec:
    """One model family, cut into blocks.

    Attributes:
        transformer_class: Name of the diffusers class.
        groups: Its blocks, in the order in which they run. The first group's arguments are the model's streams.
        conditioning: Arguments of the denoiser that stay the same for all steps of a branch; when they change, a new
            generation has begun.
        modulated_input: From the first block and its bound arguments, what TeaCache compares: the input after the first
            norm's scale and shift, of shape [B, P, D].
        contiguous: Whether each block takes what the one before gave, and nobody else reads it. Where not (long skips,
            a UNet), blocks are remembered one by one, and PipeFusion is refused.
        same_tokens: Whether a token is the same place of the image in all blocks. Where not (a UNet's convolutions mix
            and resample them), sequence parallelism and token reduction are refused.
        sample: Name of the denoiser's argument that holds the noisy latents.
        timestep: Name of the one that holds their timestep.
        components: Parts of a pipeline that may be such a denoiser, in the order in which they are used.
        tea_coefficients: TeaCache's polynomial for this family, highest degree first; ``None`` where none is published
            and the identity stands in, named as such.
        between_blocks: Arguments of the denoiser that add something between blocks (ControlNet). When one is given,
            blocks are remembered one by one, since a residual of the whole stack would count the addition twice.
        skips_blocks: Arguments of the denoiser that leave some of its blocks out (skip-layer guidance). A call with
            one goes past the cache and is not counted: what is remembered and planned speaks of all blocks.
        layer_counts: Settings of the denoiser that say how many blocks it has.
        per_image: Arguments of the denoiser and of its blocks, and entries of dicts among them, that hold one row an
            image of the batch.
        guidance: How pipelines evaluate the two branches of classifier-free guidance: ``"batch"``, side by side in one
            call, or ``"calls"``, one call after the other.
        tail_needs: Parts of block 0 that the denoiser reads outside of it.
        packs: Side of the square of latents that its pipelines put into one channel vector, before the denoiser's own
            patches.
        text_first: Whether text tokens come before the image's in joint attention.
        timestep_direction: -1 where the timestep that the denoiser sees falls during a generation, +1 where it rises.
        thresholds: The family's default ``rel_l1_thresh`` for each base method that has one.
        known_models: Models of the family with thresholds of their own.
    """

    transformer_class: str
    groups: tuple[BlockGroup, ...]
    conditioning: tuple[str, ...]
    modulated_input: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]
    contiguous: bool = True
    same_tokens: bool = True
    sample: str = "hidden_states"
    timestep: str = "timestep"
    components: tuple[str, ...] = ("transformer",)
    tea_coefficients: tuple[float, ...] | None = None
    between_blocks: tuple[str, ...] = ()
    skips_blocks: tuple[str, ...] = ()
    layer_counts: tuple[str, ...] = ("num_layers",)
    per_image: tuple[str, ...] = ()
    guidance: str = "batch"
    tail_needs: tuple[str, ...] = ()
    packs: int = 1
    text_first: bool = False
    timestep_direction: int = -1
    thresholds: Mapping[str, float] = field(default_factory=dict)
    known_models: tuple[KnownModel, ...] = ()

    @property
    def streams(self) -> int:
        """How many streams of tokens there are: the image's, and texts' that are transformed along."""
        return len(self.groups[0].takes)

    def threshold(self, method: str | None, transformer: nn.Module) -> float | None:
        """The default ``rel_l1_thresh`` of a base method for this transformer, without unit; ``None`` where the
        family names none.
        """
        own = [known.thresholds for known in self.known_models if known.describes(transformer)]
        tables = (*own, self.thresholds)
        return next((each[method] for each in tables if method in each), None)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """All blocks in the order in which they run."""
        return [block for group in self.groups for block in group.blocks(transformer)]

    def groups_of(self, transformer: nn.Module) -> list[BlockGroup]:
        """Each block's group, in the order in which they run."""
        return [group for group in self.groups for _ in group.blocks(transformer)]

    def heads(self, transformer: nn.Module) -> int:
        """Attention heads, which Ulysses splits; 1 where blocks have different numbers of them."""
        return int(transformer.config.num_attention_heads or 1)

    def check_return_order(self, hidden_states_first: bool | None) -> None:
        """Refuse a claim about the return order that this family contradicts (ValueError)."""
        returns = self.groups[0].returns
        if hidden_states_first is None or len(returns) == 1:
            return
        if hidden_states_first != (returns[0] == "hidden_states"):
            raise ValueError(
                f"return_hidden_states_first={hidden_states_first} does not fit {self.transformer_class}, "
                f"whose blocks return ({', '.join(returns)}); leave it out or turn it round"
            )
