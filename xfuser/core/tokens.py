"""Which part of the tokens and images a rank, or a patch of PipeFusion, holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Streams = tuple[torch.Tensor, ...]


def part(length: int, parts: int, index: int) -> slice:
    """The index-th of so many parts of 0 … length − 1; the first ones are longer by one where it does not divide."""
    size, longer = divmod(length, parts)
    start = index * size + min(index, longer)
    return slice(start, start + size + (index < longer))


def length_of(span: slice) -> int:
    return span.stop - span.start


@dataclass(frozen=True)
class Extent:
    """Where a rank's part [b, p, D] of an activation [images, tokens, D] lies."""

    images: int
    tokens: int
    first_image: int = 0
    first_token: int = 0

    @classmethod
    def whole(cls, stream: torch.Tensor) -> Extent:
        return cls(stream.shape[0], stream.shape[1])


@dataclass(frozen=True)
class Layout:
    """How the streams of one call (image first, then text) are shared among the ranks of a sequence group.

    Attributes:
        lengths: Tokens of every stream, in all.
        parts: Ranks that share them.
        index: This rank's place.
    """

    lengths: tuple[int, ...]
    parts: int = 1
    index: int = 0

    @property
    def even(self) -> bool:
        """Whether all ranks hold equally many tokens of every stream."""
        return all(length % self.parts == 0 for length in self.lengths)

    def span(self, stream: int) -> slice:
        """This rank's tokens of a stream."""
        return part(self.lengths[stream], self.parts, self.index)

    def local(self, stream: int) -> int:
        return length_of(self.span(stream))

    def longest(self, stream: int) -> int:
        """The most tokens of a stream that any rank holds."""
        return length_of(part(self.lengths[stream], self.parts, 0))

    def take(self, streams: Streams) -> Streams:
        """This rank's part of whole streams."""
        if self.parts == 1:
            return streams
        return tuple(stream[:, self.span(index)].contiguous() for index, stream in enumerate(streams))


@dataclass(frozen=True)
class TokenView:
    """Images or tokens of a rank's streams that go through a stage together.

    Attributes:
        images: Images of the batch; ``None`` takes all.
        patch: Number of this patch of tokens, from 0.
        patches: Patches in all; 1 takes all tokens.
    """

    images: slice | None = None
    patch: int = 0
    patches: int = 1

    @property
    def takes_all_tokens(self) -> bool:
        return self.patches == 1

    def span(self, length: int) -> slice:
        """The patch's tokens among so many."""
        return part(length, self.patches, self.patch)

    def take(self, streams: Streams) -> Streams:
        """The view's part of the rank's streams."""
        if self.images is not None:
            return tuple(stream[self.images] for stream in streams)
        if self.patches == 1:
            return streams
        return tuple(stream[:, self.span(stream.shape[1])] for stream in streams)


def views(batch: int, groups: int, patches: int) -> list[TokenView]:
    """The batch in so many groups of images, or all images in so many patches of tokens."""
    if patches > 1:
        return [TokenView(patch=index, patches=patches) for index in range(patches)]
    if groups > 1:
        return [TokenView(images=part(batch, groups, index)) for index in range(groups)]
    return [TokenView()]


def join(parts: Sequence[Streams], of: Sequence[TokenView]) -> Streams:
    """Whole streams from the parts that the views took."""
    if len(parts) == 1:
        return parts[0]
    dimension = 0 if of[0].takes_all_tokens else 1
    return tuple(torch.cat(pieces, dim=dimension) for pieces in zip(*parts, strict=True))


def narrow_batch(
    named: Mapping[str, Any], per_image: Collection[str], batch: int, images: slice | None
) -> dict[str, Any]:
    """Take some images' rows of a call's arguments; what is not named to have one row an image stays whole.

    Args:
        named: The arguments by name; dicts among them (``added_cond_kwargs``) are looked through by name as well.
        per_image: Names of those that have one row an image: tensors, or tuples and lists of them.
        batch: Images in all.
        images: Those to take; ``None`` takes all.

    Raises:
        ValueError: A named one has neither as many rows as there are images, nor one row for all of them.
    """
    if images is None:
        return dict(named)
    taken = {}
    for name, value in named.items():
        if isinstance(value, Mapping):
            taken[name] = narrow_batch(value, per_image, batch, images)
        else:
            taken[name] = _rows_of(name, value, batch, images) if name in per_image else value
    return taken


def _rows_of(name: str, value: Any, batch: int, rows: slice) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_rows_of(name, each, batch, rows) for each in value)
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if value.shape[0] == batch:
        return value[rows]
    if value.shape[0] == 1:
        return value
    raise ValueError(f"{name} has {value.shape[0]} rows for a batch of {batch} images; give as many, or one for all")
