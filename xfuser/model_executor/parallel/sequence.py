"""Sequence parallelism: between the first and the last block, every rank holds some of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad

from xfuser.config import ParallelConfig
from xfuser.core.attention import AttentionContext
from xfuser.core.distributed.clock import Clock
from xfuser.core.shards import Layout, part
from xfuser.model_executor.adapters import BoundArguments, ModelDeclaration
from xfuser.model_executor.cache.attach import Replacement
from xfuser.model_executor.pipefusion import Placement


class SequenceShards:
    """Cuts the streams of block 0 and the per-token arguments of all blocks, and joins the last block's output.

    Text tokens are shared like image tokens: attention does not ask for the order of its keys, and a text that every
    rank held would be counted as often as there are ranks.
    """

    def __init__(
        self,
        config: ParallelConfig,
        declaration: ModelDeclaration,
        placement: Placement,
        attention: AttentionContext,
        group: dist.ProcessGroup | None,
        index: int,
        clock: Clock,
    ) -> None:
        self.config, self.declaration, self.placement, self.attention = config, declaration, placement, attention
        self._group, self._parts, self._index, self._clock = group, config.sequence_degree, index, clock
        self._cut: dict[str, tuple[Any, Any]] = {}
        self._whole: torch.Tensor | None = None

    def attach(self, blocks: Sequence[nn.Module]) -> list[Replacement]:
        """Wrap the blocks, outside of what has wrapped them already."""
        return [
            Replacement(block, "forward", self._wrapper(index, index == len(blocks) - 1))
            for index, block in enumerate(blocks)
        ]

    def _wrapper(self, index: int, is_last: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            arguments = BoundArguments(original)

            def forward(*args: Any, **kwargs: Any) -> Any:
                named = arguments.named(args, kwargs)
                if index == 0:
                    self._cut_streams(named)
                for name in self.declaration.per_token:
                    if named.get(name) is not None:
                        named[name] = self._cut_argument(name, named[name])
                output = original(**named)
                return self._joined(output) if is_last else output

            return forward

        return wrap

    def _cut_streams(self, named: dict[str, Any]) -> None:
        streams = tuple(named[name] for name in self.declaration.streams)
        lengths = tuple(stream.shape[1] for stream in streams)
        self.config.check_tokens(lengths[0])
        if min(lengths) < self._parts:
            raise ValueError(
                f"--ulysses_degree {self.config.ulysses_degree} x --ring_degree {self.config.ring_degree}: the text "
                f"has only {min(lengths)} tokens"
            )
        layout = self.placement.layout = self.attention.layout = Layout(lengths, self._parts, self._index)
        self._whole, self._cut = streams[0], {}
        named |= dict(zip(self.declaration.streams, layout.take(streams), strict=True))

    def _cut_argument(self, name: str, value: Any) -> Any:
        layout = self.placement.layout
        assert layout is not None
        if name not in self._cut or self._cut[name][0] is not value:
            spans = [layout.span(stream) for stream in range(len(layout.lengths))]
            self._cut[name] = (value, self.declaration.take_tokens(value, spans, layout.lengths))
        return self._cut[name][1]

    def _joined(self, output: Any) -> Any:
        """The last block's output with all image tokens; a stage that is not the last one has none to join."""
        whole, self._whole = self._whole, None
        assert whole is not None
        streams = self.declaration.unpack(output, (whole,) * len(self.declaration.streams))
        if self.placement.stage.is_last:
            whole = self._gather(streams[0]) if self._parts > 1 else streams[0]
        return self.declaration.pack((whole, *streams[1:]))

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        layout = self.placement.layout
        assert layout is not None
        longest = layout.longest(0)
        padded = pad(local, (0, 0, 0, longest - local.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self._parts)]
        with self._clock("attention exchange"):
            dist.all_gather(parts, padded, group=self._group)
        spans = [part(layout.lengths[0], self._parts, index) for index in range(self._parts)]
        return torch.cat([each[:, : span.stop - span.start] for each, span in zip(parts, spans, strict=True)], dim=1)
