"""What is predicted in place of the blocks that a step does not evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.blocks.history import BlockHistory
from xfuser.model_executor.cache.blocks.plan import Plan, Segment, Span
from xfuser.model_executor.cache.calibration.linear import LinearMaps


def with_coefficients(
    plan: Plan,
    step: int,
    memory: BlockHistory,
    approximation: Extrapolation,
    stack: Span,
    merge: bool,
    cuts: frozenset[int] = frozenset(),
) -> Plan:
    """Give every segment that is predicted its coefficients, neighbours together where they are predicted alike.

    Neighbours that were evaluated at the same steps and share their correction become one segment where ``merge``
    allows it: always with coefficients that all blocks share, else where they are the whole ``stack`` behind the probed
    blocks, which has coefficients of its own. No segment goes on at a block in ``cuts``, which other ranks hold.
    """
    found: list[Segment] = []
    units = plan.segments
    at = 0
    while at < len(units):
        last = at
        if not units[at].evaluate:
            while merge and last + 1 < len(units) and _joins(plan, memory, at, last, cuts):
                last += 1
            span = Span(units[at].span.first, units[last].span.last)
            if last > at and span != stack and not approximation.shared:
                last, span = at, units[at].span
            found.append(with_own_coefficients(replace(units[at], span=span), step, memory, approximation, stack))
        else:
            found.append(units[at])
        at = last + 1
    return replace(plan, segments=tuple(found))


def with_own_coefficients(
    segment: Segment, step: int, memory: BlockHistory, approximation: Extrapolation, stack: Span
) -> Segment:
    """Give one segment its coefficients, whether or not it is evaluated."""
    nodes, row = memory.nodes(segment.span.first), row_of(segment.span, stack)
    return replace(segment, coefficients=approximation.weights(row, step, nodes, segment.correction))


def row_of(span: Span, stack: Span) -> int:
    """Number a span among everything that is measured: a block by itself, the stack one past the last block."""
    return stack.last + 1 if span == stack else span.first


def predict(
    segment: Segment,
    inputs: Streams,
    memory: BlockHistory,
    maps: LinearMaps | None,
    take: Callable[[Streams], Streams] | None = None,
) -> Streams:
    """Predict a segment's outputs for these inputs; ``take`` picks their part of whole streams."""
    first = segment.span.first
    if maps is not None:
        return maps.predict(first, inputs, memory.references[first][0], take)
    return memory.predict(segment.span, inputs, segment.coefficients, take)


def _joins(plan: Plan, memory: BlockHistory, at: int, last: int, cuts: frozenset[int]) -> bool:
    this, following = plan.segments[at], plan.segments[last + 1]
    alike = not following.evaluate and following.correction == this.correction
    return alike and following.span.first not in cuts and memory.linked(last)
