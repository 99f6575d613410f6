"""What the engine holds: of a branch from step to step, and of a call while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.adacorrection.offset import Sample
from xfuser.model_executor.cache.memory import BranchMemory
from xfuser.model_executor.cache.statistics import StepRecord
from xfuser.model_executor.cache.steps import Call


@dataclass
class Pending:
    """What the last step measured and has not told yet: one row of sums per measured unit."""

    record: StepRecord
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    notes: dict[int, tuple[float, int]] = field(default_factory=dict)


@dataclass
class Branch:
    """Everything that is remembered of one conditioning branch of one generation."""

    memory: BranchMemory
    policy_state: Any
    review_state: Any
    pending: Pending | None = None
    samples: dict[int, deque[tuple[int, Sample]]] = field(default_factory=dict)
    spatial: dict[int, float] = field(default_factory=dict)


@dataclass
class Active:
    """One call of the transformer, while it runs."""

    call: Call
    branch: Branch
    record: StepRecord
    pending: Pending
    first_arguments: Mapping[str, Any] = field(default_factory=dict)
    first_inputs: Streams = ()
    unit_inputs: Streams = ()
    run_inputs: Streams = ()
    stand_ins: dict[int, tuple[int, tuple[float, ...]]] = field(default_factory=dict)
    skip_until: int = -1
    block_flops: list[float] | None = None
    signal_flops: float = 0.0
