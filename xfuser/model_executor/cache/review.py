"""The seam between a base method and what corrects it: proposals in, plans out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from xfuser.model_executor.cache.adacorrection.offset import OffsetRow
from xfuser.model_executor.cache.plan import StepPlan
from xfuser.model_executor.cache.steps import Call


@dataclass(frozen=True)
class StepContext:
    """What is known when a step is planned; the same numbers on every rank.

    Attributes:
        call: The step's place in its generation.
        proposals: Per block, the share of its tokens that the base method wants evaluated: 0 skips it.
        nodes: Per unit, the steps at which it was evaluated, newest first, as far as they are remembered.
        blocks: Blocks of the transformer; a unit is one of them or a stack that is remembered as a whole.
        probed: Leading units, each a block, that have been evaluated already.
        offset: Offset score S of the input of the first unit that may be skipped, against the last whole evaluation;
            NaN where there is none.
        offset_lag: Steps since that evaluation.
        measured: Per unit, the step of its last evaluation on all tokens, where evaluations are measured.
    """

    call: Call
    proposals: tuple[float, ...]
    nodes: tuple[tuple[int, ...], ...]
    blocks: int
    probed: int
    offset: float = math.nan
    offset_lag: int = 0
    measured: tuple[int | None, ...] = ()

    @property
    def units(self) -> int:
        return len(self.nodes)

    @property
    def proposed_share(self) -> float:
        """The base method's proposal for the blocks behind the probed ones, as a share of them."""
        asked = self.proposals[self.probed :]
        return sum(asked) / len(asked) if asked else 1.0

    def proposed(self, unit: int) -> bool:
        """Whether the base method wants any of the unit; the last unit may be all blocks behind the probed ones."""
        if self.units == self.blocks or unit < self.probed:
            return self.proposals[unit] > 0
        return any(share > 0 for share in self.proposals[unit:])


@dataclass(frozen=True)
class Observation:
    """What an evaluated step showed of one block, or (``is_run``) of the run of all blocks behind the probed ones.

    ``remainder`` is the lag's part of the stand-in's error, ``order`` the order that its history allowed, ``lag`` the
    steps since the last evaluation, ``reference_spatial`` the sum of the spatial variation then.
    """

    block: int
    row: OffsetRow
    remainder: float
    order: int
    lag: int = 1
    reference_spatial: float = math.nan
    channels: int = 1
    is_run: bool = False


@dataclass(frozen=True)
class Review:
    """A plan and, per block, the relative error predicted for its stand-in (NaN where nothing is known yet)."""

    plan: StepPlan
    predicted: tuple[float, ...]


class Reviewer:
    """Takes the base method's proposals as they are. AdaCorrection's modes derive from it.

    Attributes:
        obeys: Whether the base method's choice of tokens is obeyed; what corrects it refreshes whole blocks.
        measures: Whether evaluated blocks are measured (offsets, true errors).
        whole_steps: Whether all blocks behind the probed ones are always decided alike, and need not be remembered
            one by one.
        needs_num_steps: Rules that are off while nobody knows how many steps a generation has.
        blends: Whether every unit is evaluated and blended with what stands in for it.
        shadows_base: Whether the base method goes on as if its proposals were obeyed, so that their number is what it
            would spend alone.
    """

    obeys: ClassVar[bool] = True
    measures: ClassVar[bool] = False
    whole_steps: ClassVar[bool] = False
    blends: ClassVar[bool] = False
    shadows_base: ClassVar[bool] = False
    needs_num_steps: ClassVar[tuple[str, ...]] = ()

    def new_state(self, units: int) -> Any:
        """Fresh state of one branch of one generation."""
        return None

    def learn(self, state: Any, observations: list[Observation]) -> None:
        """Take in what the step before showed."""

    def error_weight(self, state: Any, block: int) -> float:
        """The correction weight by which a block's true error is reported."""
        return 1.0

    def review(self, state: Any, context: StepContext) -> Review:
        """The plan of a step in which every unit has something that can stand in."""
        evaluate = tuple(context.proposed(unit) for unit in range(context.units))
        return Review(StepPlan(evaluate, (1.0,) * context.units), (math.nan,) * context.blocks)
