"""From the arguments and returns of a block to the model's streams (image first, then text) and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xfuser.core.tokens import Streams
from xfuser.model_executor.adapters.spec import BlockGroup, TokenArgument


class StreamForm:
    """Translates between one group of blocks and the model's streams.

    A group whose one argument joins all streams takes and gives views of it. The latest joined tensor is known by its
    parts, so that passing streams through such blocks copies nothing, and neighbours still share theirs.
    """

    def __init__(self) -> None:
        self._latest: tuple[torch.Tensor, Streams] | None = None

    def read(self, group: BlockGroup, values: Sequence[torch.Tensor], like: Streams) -> Streams:
        """The streams, from the values of the arguments that carry them.

        Args:
            group: The block's.
            values: In the order of ``group.takes``.
            like: Streams of the same lengths; not looked at where each has an argument of its own.
        """
        return tuple(values) if not group.joins else self._split(group, values[0], like)

    def write(self, group: BlockGroup, streams: Streams) -> dict[str, torch.Tensor]:
        """The arguments that carry these streams, by name."""
        if group.joins:
            return {group.takes[0]: self._join(group, streams)}
        return dict(zip(group.takes, streams, strict=True))

    def pack(self, group: BlockGroup, streams: Streams) -> Any:
        """What a block returns, from its streams."""
        by_name = self.write(group, streams)
        return by_name[group.returns[0]] if len(by_name) == 1 else tuple(by_name[name] for name in group.returns)

    def unpack(self, group: BlockGroup, output: Any, inputs: Streams) -> Streams:
        """The streams, from what a block returned and what it was given.

        A stream that comes back as ``None`` (the text, from SD3's last block) counts as unchanged: nobody reads it any
        more, so whatever `pack` hands on in its place will do.
        """
        if len(group.takes) == 1:
            return self.read(group, (output[0] if isinstance(output, tuple) else output,), inputs)
        by_name = dict(zip(group.returns, output, strict=True))
        return tuple(
            before if by_name[name] is None else by_name[name] for name, before in zip(group.takes, inputs, strict=True)
        )

    def forget(self) -> None:
        """Let go of the latest joined tensor."""
        self._latest = None

    def _split(self, group: BlockGroup, whole: torch.Tensor, like: Streams) -> Streams:
        if self._latest is None or self._latest[0] is not whole:
            parts = whole.split([like[stream].shape[1] for stream in group.joins], dim=1)
            self._latest = whole, tuple(parts[group.joins.index(stream)] for stream in range(len(parts)))
        return self._latest[1]

    def _join(self, group: BlockGroup, streams: Streams) -> torch.Tensor:
        if self._latest is None or any(a is not b for a, b in zip(self._latest[1], streams, strict=True)):
            self._latest = torch.cat([streams[stream] for stream in group.joins], dim=1), streams
        return self._latest[0]


def lists_tokens(argument: TokenArgument, value: Any) -> bool:
    """Whether an argument's value has one entry a token."""
    return isinstance(value, tuple) or (value is not None and argument.dims in (None, value.dim()))


def take_spans(argument: TokenArgument, value: Any, spans: Sequence[slice], lengths: Sequence[int]) -> Any:
    """Those entries of a per-token argument that belong to spans of the streams, which are so long in all."""
    if isinstance(value, tuple):
        return tuple(take_spans(argument, each, spans, lengths) for each in value)
    if not lists_tokens(argument, value):
        return value
    parts, begin = [], 0
    for stream in argument.streams:
        span = spans[stream]
        parts.append(value.narrow(argument.dim, begin + span.start, span.stop - span.start))
        begin += lengths[stream]
    return torch.cat(parts, dim=argument.dim)


def take_places(argument: TokenArgument, value: Any, places: torch.Tensor, lengths: Sequence[int]) -> Any:
    """Those entries of a per-token argument that belong to image tokens at places [k], and to all text tokens."""
    if isinstance(value, tuple):
        return tuple(take_places(argument, each, places, lengths) for each in value)
    if not lists_tokens(argument, value):
        return value
    rows, begin = [], 0
    for stream in argument.streams:
        chosen = places if stream == 0 else torch.arange(lengths[stream], device=places.device)
        rows.append(chosen + begin)
        begin += lengths[stream]
    return value.index_select(argument.dim, torch.cat(rows))
