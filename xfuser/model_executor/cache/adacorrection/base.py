"""The seam between a base method and what corrects it: proposals in, plans out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.adacorrection.offset import OffsetRow
from xfuser.model_executor.cache.blocks.history import BlockHistory
from xfuser.model_executor.cache.blocks.plan import Plan, Span
from xfuser.model_executor.cache.blocks.token_choice import TokenChoice
from xfuser.model_executor.cache.steps import Call


@dataclass(frozen=True)
class StepContext:
    """What is known when a step is planned; the same numbers on every rank.

    Attributes:
        call: The step's place in its generation.
        proposals: Per block, the share of its tokens that the base method wants evaluated: 0 skips it.
        spans: What is remembered: blocks, or a stack of them as a whole.
        nodes: Per span, the steps at which it was evaluated, newest first, as far as they are remembered.
        probed: Leading blocks that have been evaluated already, each of them a span.
        offset: Offset score S of the input of the first span that may be skipped, against the last whole evaluation;
            NaN where there is none.
        offset_lag: Steps since that evaluation.
        measured: Per span, the step of its last evaluation on all tokens, where evaluations are measured.
    """

    call: Call
    proposals: tuple[float, ...]
    spans: tuple[Span, ...]
    nodes: tuple[tuple[int, ...], ...]
    probed: int
    offset: float = math.nan
    offset_lag: int = 0
    measured: tuple[int | None, ...] = ()

    @property
    def blocks(self) -> int:
        return len(self.proposals)

    @property
    def proposed_share(self) -> float:
        """The base method's proposal for the blocks behind the probed ones, as a share of them."""
        asked = self.proposals[self.probed :]
        return sum(asked) / len(asked) if asked else 1.0

    def proposed(self, span: Span) -> bool:
        """Whether the base method wants any of a span."""
        return any(self.proposals[block] > 0 for block in span.blocks)


@dataclass(frozen=True)
class Observation:
    """What an evaluated step showed of one block, or (``is_stack``) of all blocks behind the probed ones together.

    ``remainder`` is the lag's part of the prediction's error, ``order`` the order that its history allowed, ``lag`` the
    steps since the last evaluation, ``reference_spatial`` the sum of the spatial variation then.
    """

    block: int
    row: OffsetRow
    remainder: float
    order: int
    lag: int = 1
    reference_spatial: float = math.nan
    channels: int = 1
    is_stack: bool = False


@dataclass(frozen=True)
class Finished:
    """An evaluated span as it goes on: its outputs, and the weight and offset score that they were blended with."""

    outputs: Streams
    weight: float = math.nan
    score: float = math.nan


class Corrector:
    """Takes the base method's proposals as they are. AdaCorrection's modes derive from it.

    Attributes:
        obeys: Whether the base method's choice of tokens is obeyed; what corrects it refreshes whole blocks.
        measures: Whether evaluated blocks are measured (offsets, true errors).
        whole_steps: Whether all blocks behind the probed ones are always decided alike, and need not be remembered
            one by one; the base method then goes on as if its proposals were obeyed, so that their number is what it
            would spend alone.
        exchanges_per_block: Whether ranks exchange sums between blocks, beside the step's own.
        chooses_tokens: Whether `choose_tokens` has single tokens of a predicted block evaluated.
        needs_num_steps: Rules that are off while nobody knows how many steps a generation has.
    """

    obeys: ClassVar[bool] = True
    measures: ClassVar[bool] = False
    whole_steps: ClassVar[bool] = False
    needs_num_steps: ClassVar[tuple[str, ...]] = ()
    exchanges_per_block: bool = False
    chooses_tokens: bool = False

    def new_state(self, spans: int) -> Any:
        """Return a fresh state for one branch of one generation."""
        return None

    def learn(self, state: Any, observations: list[Observation]) -> None:
        """Take in what the step before showed."""

    def correction(self, state: Any) -> float:
        """Return how much of a prediction's highest term is believed, 0 to 1."""
        return 1.0

    def plan(self, state: Any, context: StepContext) -> Plan:
        """Plan a step in which every span has something that can be predicted from."""
        return Plan.of(context.spans, (context.proposed(span) for span in context.spans))

    def evaluates(self, state: Any, block: int, score: float, nodes: Sequence[int], asked: float) -> bool:
        """Decide one block anew from its own offset score, where ``sync="layer"``."""
        return asked > 0

    def choose_tokens(self, state: Any, block: int, asked: float, inputs: Streams, seen: Streams) -> TokenChoice | None:
        """Choose the tokens of a predicted block that are evaluated all the same; ``seen`` were its last inputs."""
        return None

    def finish(
        self,
        state: Any,
        block: int,
        step: int,
        inputs: Streams,
        outputs: Streams,
        memory: BlockHistory,
        agree: Callable[[torch.Tensor], list[float]],
    ) -> Finished:
        """Change what an evaluated block hands on; ``agree`` adds sums up over the ranks that share the image."""
        return Finished(outputs)
