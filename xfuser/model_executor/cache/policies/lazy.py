"""LazyDiT (arXiv 2412.12444): a learned gate before every attention and MLP says whether its last output will do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from xfuser.config.settings import check_values, choice, count, number
from xfuser.model_executor.cache.policies.base import Learning, Policy, Section, attentions_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xfuser.config import CacheConfig
    from xfuser.model_executor.adapters import ModelSpec, Streams
    from xfuser.model_executor.cache.calibration.recorder import Samples
    from xfuser.model_executor.cache.steps import BranchKey, Call

FEED_FORWARD = ("ff", "ff_context", "proj_mlp")  # what diffusers' blocks call their MLPs
SAMPLED = 8  # tokens of each image whose drift is recorded, at most
MEMORY_BYTES = 512 << 20  # of them, a branch


def gated_modules(spec: ModelSpec, block: nn.Module) -> tuple[str, ...]:
    """Name the attention and MLP modules of a block, as far as it has them."""
    feed_forward = (name for name in FEED_FORWARD if getattr(block, name, None) is not None)
    return (*attentions_of(spec, block), *feed_forward)


@dataclass
class GateRecord:
    """What one module showed in one generation's branch, per step: the mean of its input over each image's tokens
    [B, D], and a sample of its output [B, n].
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


class LazySection(Section):
    """Learns the gates: per module a tensor [steps, D] of weights on the mean of its input over the tokens.

    ``logistic``: a module's evaluation counts as needless where its output has drifted, since it was last computed, by
    less than a limit, the same for all modules, at which so many evaluations are needless as ``lazy_ratio`` says. A
    logistic regression a module and step tells these from the inputs. ``published``: `lazy_training.train_gates`.
    """

    @dataclass(frozen=True)
    class Config:
        lazy_fit: str = choice(
            "logistic", ("logistic", "published"), "learn the gates by logistic regression, or by the published loss"
        )
        lazy_ratio: float = number(0.5, "logistic: the share of modules' evaluations that is to be left out", 0, 1)
        lazy_penalty: float = number(1e-3, "published: ρ, what a module's score of 1 costs beside the squared error")
        lazy_updates: int = count(500, "published: updates of the weights, each from two steps of one generation")

        def __post_init__(self) -> None:
            check_values(self)

    def __init__(self, learning: Learning) -> None:
        super().__init__(learning)
        self._running: dict[BranchKey, dict[str, GateRecord]] = {}
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._drifts: dict[str, list[torch.Tensor]] = {}
        self._calls: list[list[tuple[Any, ...]]] = []
        self._running_calls: dict[BranchKey, list[tuple[Any, ...]]] = {}

    def modules(self, index: int, block: nn.Module) -> tuple[str, ...]:
        return gated_modules(self.learning.spec, block)

    def called(self, branch: BranchKey, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.settings.lazy_fit == "published":
            self._running_calls.setdefault(branch, []).append((args, dict(kwargs)))

    def sees_module(self, branch: BranchKey, block: int, name: str, inputs: torch.Tensor, outputs: Any) -> None:
        record = self._running.setdefault(branch, {}).setdefault(f"{block}.{name}", GateRecord())
        record.inputs.append(inputs.detach().float().mean(1))
        output = (outputs[0] if isinstance(outputs, tuple) else outputs).detach()
        images, tokens, channels = output.shape
        places = len(self.learning.blocks) * 2 * self.learning.steps
        affordable = MEMORY_BYTES // (places * images * channels * 4)
        stride = max(1, tokens // min(max(affordable, 1), SAMPLED))
        record.outputs.append(output[:, ::stride].float().flatten(1))

    def ends(self, branches: Mapping[BranchKey, Samples]) -> None:
        for branch in branches:
            for place, record in self._running.get(branch, {}).items():
                if len(record.inputs) == self.learning.steps:
                    self._inputs.setdefault(place, []).append(_stacked(record.inputs))
                    self._drifts.setdefault(place, []).append(_drifts(_stacked(record.outputs)))
            if branch in self._running_calls:
                self._calls.append(self._running_calls[branch])
        self._running.clear()
        self._running_calls.clear()

    def tensors(self) -> dict[str, torch.Tensor]:
        import torch

        from xfuser.model_executor.cache.policies.lazy_training import fit_gates, needed_evaluations, train_gates

        if not self._inputs:
            return {}
        if self.settings.lazy_fit == "published":
            return train_gates(self.learning, self._calls, self.settings.lazy_updates, self.settings.lazy_penalty)
        drifts = {place: torch.cat(known, 2) for place, known in self._drifts.items()}
        needed = needed_evaluations(drifts, self.settings.lazy_ratio)
        return {place: fit_gates(torch.cat(known, 1), needed[place]) for place, known in self._inputs.items()}


@dataclass
class LazyState:
    """Per module: the step of its newest evaluation, the sum of its input over images and tokens [D], their number."""

    seen: dict[str, tuple[int, torch.Tensor, int]] = field(default_factory=dict)
    step: int = -1


class LazyPolicy(Policy):
    """Evaluates every block, and within it the modules whose gate opens: σ(w·z) ≥ ``lazy_threshold``.

    z is the mean over the tokens of the module's modulated input, w the gate's weights for this step; all images of a
    batch are decided together, by the mean of w·z. A closed gate takes the module's last output, which the block goes
    on to scale with its own gate as ever. Under AdaCorrection whole blocks are decided instead: a block's proposal is
    the share of its modules that would be evaluated, by this step's weights and the newest input that was seen.
    """

    @dataclass(frozen=True)
    class Config:
        lazy_threshold: float = number(0.5, "a module is evaluated where its gate's score is at least this", 0, 1)

    Section: ClassVar[type[Section] | None] = LazySection
    reads_calibration: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    watches_modules: ClassVar[bool] = True
    skips_modules: ClassVar[bool] = True
    sweep: ClassVar[tuple[str, tuple[float, ...]]] = ("lazy_threshold", (0.1, 0.3, 0.5, 0.7, 0.9))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places: dict[int, list[str]] = {}  # by block
        self._gates: dict[tuple[str, Any], torch.Tensor] = {}
        self._gates_of: Any = None

    @classmethod
    def refused_where_shared(cls, config: CacheConfig) -> str | None:
        if config.mode is not None:
            return None
        return "use_cache='Lazy' decides within blocks, from this rank's tokens; add enable_adacorrection=True, or"

    def new_state(self) -> LazyState:
        return LazyState()

    def modules(self, index: int, block: nn.Module) -> tuple[str, ...]:
        names = gated_modules(self.spec, block)
        self._places[index] = [f"{index}.{name}" for name in names]
        return names

    def observe_module(
        self, state: LazyState, block: int, name: str, inputs: torch.Tensor, outputs: Any, call: Call
    ) -> None:
        place = f"{block}.{name}"
        step, total, number_seen = state.seen.get(place, (-1, None, 0))
        added, tokens = inputs.detach().float().sum((0, 1)), inputs.shape[0] * inputs.shape[1]
        if step == call.step and total is not None:
            added, tokens = total + added, number_seen + tokens
        state.seen[place] = (call.step, added, tokens)

    def keeps_module(self, state: LazyState, block: int, name: str, inputs: torch.Tensor, call: Call) -> bool:
        gate = self._gate(f"{block}.{name}", call.step, inputs)
        return gate is not None and not float(inputs.float().mean((0, 1)) @ gate) >= self._limit

    def measure(
        self,
        state: LazyState,
        block: nn.Module,
        arguments: Mapping[str, Any],
        inputs: Streams,
        outputs: Streams | None,
    ) -> torch.Tensor:
        """Per module Σ w·z over the tokens of its newest evaluation, and their number."""
        import torch

        state.step += 1
        if self.config.mode is None:
            return torch.zeros(0, device=inputs[0].device)
        places = [place for block in range(self.blocks) for place in self._places[block]]
        sums = torch.zeros(len(places), 2, device=inputs[0].device)
        for index, place in enumerate(places):
            if place in state.seen:
                _, total, tokens = state.seen[place]
                gate = self._gate(place, state.step, total)
                if gate is not None:
                    sums[index, 0], sums[index, 1] = total @ gate, tokens
        return sums.flatten()

    def propose_blocks(self, state: LazyState, sums: list[float], call: Call) -> tuple[float, ...]:
        if not sums:
            return (1.0,) * self.blocks
        pairs = zip(sums[::2], sums[1::2], strict=True)
        opens = iter([tokens == 0 or not total / tokens < self._limit for total, tokens in pairs])
        by_block = ([next(opens) for _ in self._places[block]] for block in range(self.blocks))
        return tuple(sum(each) / len(each) if each else 1.0 for each in by_block)

    @property
    def _limit(self) -> float:
        """The logit of the threshold."""
        share = self.config.lazy_threshold
        if share in (0, 1):
            return -math.inf if share == 0 else math.inf
        return math.log(share / (1 - share))

    def _gate(self, place: str, step: int, like: torch.Tensor) -> torch.Tensor | None:
        """Look up a module's weights at a step [D], where they are known, on a tensor's device."""
        learned = self.learned
        if learned is not self._gates_of:
            self._gates, self._gates_of = {}, learned
        if learned is None or place not in learned or step >= len(learned[place]):
            return None
        key = (place, like.device)
        if key not in self._gates:
            self._gates[key] = learned[place].float().to(like.device)
        return self._gates[key][step]


def _stacked(steps: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack(steps).cpu()


def _drifts(outputs: torch.Tensor) -> torch.Tensor:
    """Measure the relative L2 change of an output [steps, B, n] from each step to each, [steps, steps, B]."""
    import torch

    by_image = outputs.transpose(0, 1)
    norms = torch.linalg.vector_norm(by_image, dim=2).clamp_min(1e-12)
    return (torch.cdist(by_image, by_image) / norms[:, None, :]).permute(1, 2, 0)
