"""What the engine holds: of a branch from step to step, and of a call while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from xfuser.core.attention import KeyValueMemory
from xfuser.model_executor.adapters import Streams
from xfuser.model_executor.cache.blocks.flops import FlopCount
from xfuser.model_executor.cache.blocks.history import BlockHistory, ModuleHistory
from xfuser.model_executor.cache.blocks.plan import Plan
from xfuser.model_executor.cache.blocks.probe import Measured, TokenProbe
from xfuser.model_executor.cache.calibration.linear import LinearMaps
from xfuser.model_executor.cache.statistics import StepRecord
from xfuser.model_executor.cache.steps import Call


@dataclass
class Pending:
    """What the last step measured and has not told yet."""

    record: StepRecord
    measured: Measured


@dataclass
class Branch:
    """Everything that is remembered of one conditioning branch of one generation."""

    memory: BlockHistory
    policy_state: Any
    corrector_state: Any
    probe: TokenProbe
    keys: KeyValueMemory
    maps: LinearMaps | None
    modules: ModuleHistory = field(default_factory=ModuleHistory)
    pending: Pending | None = None
    spatial: dict[int, float] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop every activation: one of them is not finite."""
        self.memory.clear()
        self.keys.clear()
        self.modules.outputs.clear()
        self.probe.discard()
        self.spatial.clear()

    def others(self) -> Iterator[torch.Tensor]:
        """Activations that are kept elsewhere than in ``memory``."""
        yield from self.keys.tensors()
        yield from self.modules.tensors()
        if self.maps is not None:
            yield from self.maps.tensors()

    def bytes(self) -> int:
        """Memory of the activations kept."""
        return self.memory.bytes(self.others())


@dataclass(frozen=True)
class BlockCall:
    """A block as the model calls it: its own forward, its arguments, and the streams among them."""

    index: int
    original: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    streams: Streams


@dataclass
class CallState:
    """One call of the transformer, while it runs.

    Attributes:
        plan: What is decided of the step, once it is.
        span_inputs: What the span that runs was given.
        stack_inputs: What the blocks behind the probed ones were given.
        modules_kept: Places of the modules within blocks that were left out.
        calls: The blocks' calls, where they run later than they are called (PipeFusion).
        counter: Counts this call's FLOPs, where they are not known yet.
    """

    call: Call
    branch: Branch
    record: StepRecord
    first_arguments: Mapping[str, Any] = field(default_factory=dict)
    first_inputs: Streams = ()
    span_inputs: Streams = ()
    stack_inputs: Streams = ()
    stack_outputs: Streams = ()
    plan: Plan | None = None
    modules_kept: list[int] = field(default_factory=list)
    calls: list[BlockCall] = field(default_factory=list)
    counter: FlopCount | None = None
    block_flops: list[float] = field(default_factory=list)
    signal_flops: float = 0.0
    recorder_flops: float = 0.0

    def counted(self) -> float:
        """FLOPs of this call until now; 0 where nobody counts."""
        return 0.0 if self.counter is None else float(self.counter.total)
