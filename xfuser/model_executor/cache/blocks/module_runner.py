"""Modules within blocks (an attention, an MLP): methods see what they do, and may let one stand as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xfuser.model_executor.cache.blocks.state import CallState
from xfuser.model_executor.cache.calibration.learning import Calibrator
from xfuser.model_executor.cache.patching import Replacement
from xfuser.model_executor.cache.policies import Policy

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass
class ModuleRunner:
    """Stands before the modules that a method watches within blocks, or that a recording has to see.

    A module is left out where the method skips modules (`Policy.skips_modules`), nothing reviews it and nothing is
    recorded, and the method says so (`Policy.keeps_module`): then its last output stands for it.

    Attributes:
        watched: Block, name and module, by place.
        flops: Of each module, where a call was counted.
    """

    policy: Policy
    calibrator: Calibrator
    obeys: bool
    watched: list[tuple[int, str, nn.Module]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)

    def attach(
        self, blocks: Sequence[nn.Module], names: Callable[[int, nn.Module], Sequence[str]], active: Callable[[], Any]
    ) -> list[Replacement]:
        """Wrap those of the named modules that are not wrapped yet; ``active`` tells the call that runs, if any."""
        known = {(block, name) for block, name, _ in self.watched}
        replaced = []
        for index, block in enumerate(blocks):
            for name in names(index, block):
                if (index, name) not in known:
                    self.watched.append((index, name, block.get_submodule(name)))
                    self.flops.append(0.0)
                    wrap = self._wrap(len(self.watched) - 1, active)
                    replaced.append(Replacement(self.watched[-1][2], "forward", wrap))
        return replaced

    def _wrap(self, place: int, current: Callable[[], CallState | None]) -> Wrap:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                active = current()
                return original(*args, **kwargs) if active is None else self._run(active, place, original, args, kwargs)

            return forward

        return wrap

    def _run(self, active: CallState, place: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        block, name, _ = self.watched[place]
        inputs = args[0] if args else kwargs["hidden_states"]
        state, kept, recorder = active.branch.policy_state, active.branch.modules.outputs, self.calibrator.recorder
        before = kept.get(place)
        may_skip = self.policy.skips_modules and self.obeys and recorder is None and before is not None
        if may_skip and self.policy.keeps_module(state, block, name, inputs, active.call):
            active.modules_kept.append(place)
            return before
        counted = active.counted()
        output = original(*args, **kwargs)
        if active.counter is not None:
            self.flops[place] = active.counted() - counted
        if self.policy.skips_modules and self.obeys:
            kept[place] = _detached(output)
        self.policy.observe_module(state, block, name, inputs, output, active.call)
        if recorder is not None:
            recorder.sees_module(active.call.branch, block, name, inputs, output)
        return output


def _detached(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.detach()
    return type(output)(_detached(each) for each in output) if isinstance(output, (tuple, list)) else output
