"""The plan of a step: which blocks are evaluated, on which tokens, and what is predicted in place of the others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from xfuser.model_executor.cache.blocks.token_choice import TokenChoice


@dataclass(frozen=True, order=True)
class Span:
    """Blocks ``first`` to ``last``, which are remembered, measured or predicted together."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last + 1 - self.first

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)


def cut(blocks: int, probed: int, one_by_one: bool) -> tuple[Span, ...]:
    """Cut the blocks into the spans that are remembered: each block, or the probed ones and the whole rest.

    All but the last are single blocks, so the number of a span is that of its first block.
    """
    if one_by_one:
        return tuple(Span(index, index) for index in range(blocks))
    spans = [Span(index, index) for index in range(min(probed, blocks))]
    return (*spans, Span(probed, blocks - 1)) if probed < blocks else tuple(spans)


@dataclass(frozen=True)
class Segment:
    """What is done with a span in one step.

    Attributes:
        span: Its blocks.
        evaluate: Whether they run. Otherwise a prediction stands in for them.
        correction: How much of the prediction's highest term is believed, 0 to 1.
        coefficients: Of the remembered residuals, newest first; empty where nothing is predicted.
        tokens: Those that alone are evaluated, where they are not all; the others are predicted.
    """

    span: Span
    evaluate: bool
    correction: float = 1.0
    coefficients: tuple[float, ...] = ()
    tokens: TokenChoice | None = None


@dataclass(frozen=True)
class Plan:
    """One step of one branch, as all ranks that share the image decide it.

    Attributes:
        segments: What is done with the blocks, in their order.
        predicted: Per block, the relative error expected of its prediction; NaN where nothing is known.
        asked: Per block, the share of its tokens that the base method wanted evaluated; 0 skips it.
        by_block: Whether each segment is decided anew when its inputs are known (``sync="layer"``).
    """

    segments: tuple[Segment, ...]
    predicted: tuple[float, ...] = ()
    asked: tuple[float, ...] = ()
    by_block: bool = False

    @classmethod
    def of(
        cls,
        spans: Iterable[Span],
        evaluate: Iterable[bool] | bool,
        correction: float = 1.0,
        predicted: tuple[float, ...] | None = None,
    ) -> Plan:
        """Plan each span by itself, or all of them alike."""
        spans = tuple(spans)
        decided = (evaluate,) * len(spans) if isinstance(evaluate, bool) else tuple(evaluate)
        blocks = spans[-1].last + 1
        return cls(
            tuple(Segment(span, each, correction) for span, each in zip(spans, decided, strict=True)),
            (math.nan,) * blocks if predicted is None else predicted,
        )

    def at(self, block: int) -> Segment:
        """Find the segment that a block lies in."""
        return self._by_block[block]

    @cached_property
    def _by_block(self) -> dict[int, Segment]:
        return {block: each for each in self.segments for block in each.span.blocks}

    def on(self, blocks: range) -> Plan:
        """The same plan for some of the blocks, between which no segment goes on."""
        return replace(self, segments=tuple(each for each in self.segments if each.span.first in blocks))

    def with_segment(self, segment: Segment) -> Plan:
        """The same plan with another decision for a segment's span."""
        changed = (segment if each.span == segment.span else each for each in self.segments)
        return replace(self, segments=tuple(changed))

    def with_evaluated(self, blocks: int) -> Plan:
        """The same plan with its first blocks evaluated, as they have been already."""
        changed = (replace(each, evaluate=True) if each.span.first < blocks else each for each in self.segments)
        return replace(self, segments=tuple(changed))

    @property
    def evaluate(self) -> tuple[bool, ...]:
        """Per segment, whether it is evaluated."""
        return tuple(each.evaluate for each in self.segments)

    @property
    def digest(self) -> tuple[float, ...]:
        """One number a segment, by which ranks compare their plans: its correction, or -1 where it is evaluated."""
        return tuple(-1.0 if each.evaluate else each.correction for each in self.segments)
