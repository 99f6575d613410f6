"""Sequence parallelism: between the first and the last block, every rank holds some of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad

from xfuser.config import ParallelConfig
from xfuser.core.attention import AttentionContext
from xfuser.core.distributed.clock import Clock
from xfuser.core.tokens import Layout, Streams, part
from xfuser.model_executor.adapters import BlockGroup, BoundArguments, ModelSpec, TokenArgument
from xfuser.model_executor.adapters.streams import StreamForm, take_spans
from xfuser.model_executor.cache.patching import Replacement
from xfuser.model_executor.pipefusion import Partition


class SequenceShards:
    """Cuts the streams of block 0 and the per-token arguments of all blocks, and joins the last block's output.

    Text tokens are shared like image tokens: attention does not ask for the order of its keys, and a text that every
    rank held would be counted as often as there are ranks.
    """

    def __init__(
        self,
        config: ParallelConfig,
        spec: ModelSpec,
        partition: Partition,
        attention: AttentionContext,
        group: dist.ProcessGroup | None,
        index: int,
        clock: Clock,
    ) -> None:
        self.config, self.spec, self.partition, self.attention = config, spec, partition, attention
        self._group, self._parts, self._index, self._clock = group, config.sequence_degree, index, clock
        self._form = StreamForm()
        self._cut: dict[str, tuple[Any, Any]] = {}
        self._whole: Streams | None = None

    def attach(self, transformer: nn.Module) -> list[Replacement]:
        """Wrap the blocks, outside of what has wrapped them already."""
        blocks, groups = self.spec.blocks(transformer), self.spec.groups_of(transformer)
        return [
            Replacement(block, "forward", self._wrapper(group, index == 0, index == len(blocks) - 1))
            for index, (block, group) in enumerate(zip(blocks, groups, strict=True))
        ]

    def _wrapper(
        self, group: BlockGroup, is_first: bool, is_last: bool
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            arguments = BoundArguments(original)

            def forward(*args: Any, **kwargs: Any) -> Any:
                named = arguments.named(args, kwargs)
                if is_first:
                    self._cut_streams(group, named)
                for argument in group.per_token:
                    if named.get(argument.name) is not None and not argument.is_made_of_tokens:
                        named[argument.name] = self._cut_argument(argument, named[argument.name])
                output = original(**named)
                return self._joined(group, output) if is_last else output

            return forward

        return wrap

    def _cut_streams(self, group: BlockGroup, named: dict[str, Any]) -> None:
        streams = tuple(named[name] for name in group.takes)
        lengths = tuple(stream.shape[1] for stream in streams)
        self.config.check_tokens(lengths[0])
        if min(lengths) < self._parts:
            raise ValueError(
                f"--ulysses_degree {self.config.ulysses_degree} x --ring_degree {self.config.ring_degree}: the text "
                f"has only {min(lengths)} tokens"
            )
        layout = self.partition.layout = self.attention.layout = Layout(lengths, self._parts, self._index)
        self._whole, self._cut = streams, {}
        named |= dict(zip(group.takes, layout.take(streams), strict=True))

    def _cut_argument(self, argument: TokenArgument, value: Any) -> Any:
        layout, name = self.partition.layout, argument.name
        assert layout is not None
        if name not in self._cut or self._cut[name][0] is not value:
            spans = [layout.span(stream) for stream in range(len(layout.lengths))]
            self._cut[name] = (value, take_spans(argument, value, spans, layout.lengths))
        return self._cut[name][1]

    def _joined(self, group: BlockGroup, output: Any) -> Any:
        """The last block's output with all image tokens; a stage that is not the last one has none to join."""
        whole, self._whole = self._whole, None
        layout = self.partition.layout
        assert whole is not None and layout is not None
        streams = self._form.unpack(group, output, layout.take(whole) if group.joins else whole)
        image = whole[0]
        if self.partition.stage.is_last:
            image = self._gather(streams[0]) if self._parts > 1 else streams[0]
        joined = self._form.pack(group, (image, *streams[1:]))
        self._form.forget()
        return joined

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        layout = self.partition.layout
        assert layout is not None
        longest = layout.longest(0)
        padded = pad(local, (0, 0, 0, longest - local.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self._parts)]
        with self._clock("attention exchange"):
            dist.all_gather(parts, padded, group=self._group)
        spans = [part(layout.lengths[0], self._parts, index) for index in range(self._parts)]
        return torch.cat([each[:, : span.stop - span.start] for each, span in zip(parts, spans, strict=True)], dim=1)
