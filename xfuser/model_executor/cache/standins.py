"""What stands in for the units of a step that are not evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.linear import LinearMaps
from xfuser.model_executor.cache.memory import BranchMemory
from xfuser.model_executor.cache.plan import StepPlan


@dataclass(frozen=True)
class StandIn:
    """Weights on the remembered residuals of the linked units ``first`` … ``last``."""

    first: int
    last: int
    weights: tuple[float, ...]


def stand_ins(
    plan: StepPlan,
    step: int,
    memory: BranchMemory,
    approximation: Extrapolation,
    run: int,
    probed: int,
    merge: bool,
    cuts: frozenset[int] = frozenset(),
) -> dict[int, StandIn]:
    """Every unit that is not evaluated, by the first of those that one stand-in covers.

    Neighbours that share nodes and correction weight become one run where ``merge`` allows it: always with weights that
    all blocks share, else where the run is all units behind the probed ones, which has weights of its own (row
    ``run``). No run goes on at a unit in ``cuts``, which other ranks hold.
    """
    found: dict[int, StandIn] = {}
    units = len(plan.evaluate)
    unit = 0
    while unit < units:
        last = unit
        if not plan.evaluate[unit]:
            while merge and last + 1 < units and last + 1 not in cuts and _joins(plan, memory, unit, last):
                last += 1
            is_run = unit == probed and last == units - 1
            if last > unit and not is_run and not approximation.shared:
                last = unit
            row = run if is_run else unit
            weights = approximation.weights(row, step, memory.nodes(unit), plan.weights[unit])
            found[unit] = StandIn(unit, last, weights)
        unit = last + 1
    return found


def _joins(plan: StepPlan, memory: BranchMemory, unit: int, last: int) -> bool:
    return not plan.evaluate[last + 1] and plan.weights[last + 1] == plan.weights[unit] and memory.linked(last)


def stand_in_outputs(
    each: StandIn,
    inputs: Streams,
    memory: BranchMemory,
    maps: LinearMaps | None,
    take: Callable[[Streams], Streams] | None = None,
) -> Streams:
    """The outputs that the stand-in gives for these inputs; ``take`` picks their part of whole streams."""
    if maps is not None:
        return maps.stand_in(each.first, inputs, memory.references[each.first][0], take)
    return memory.stand_in(each.first, each.last, inputs, each.weights, take)


def cut_units(blocks: int, probed: int, one_by_one: bool) -> list[tuple[int, int]]:
    """First and last block of every unit: each block, or the probed ones and the whole rest."""
    if one_by_one:
        return [(index, index) for index in range(blocks)]
    units = [(index, index) for index in range(min(probed, blocks))]
    return units + ([(probed, blocks - 1)] if probed < blocks else [])
