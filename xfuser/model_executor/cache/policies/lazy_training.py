"""How LazyDiT's gates are learned: by logistic regression, or by the published loss with the model frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from xfuser.model_executor.cache.patching import Replacement
from xfuser.model_executor.cache.policies.base import Learning
from xfuser.model_executor.cache.policies.lazy import gated_modules

RIDGE = 1e-3  # of the logistic regression, on inputs of length 1
NEWTON_STEPS = 8
SMALLEST_CURVATURE = 1e-3
SEARCHED = 30  # halvings of the limit
RATE = 1e-4  # AdamW's, as published


def needed_evaluations(drifts: Mapping[str, torch.Tensor], ratio: float) -> dict[str, torch.Tensor]:
    """Say which evaluations are needed, so that at least a share of all of them is not.

    A module computes whenever its output has drifted by a limit since it last did, and at the first step. The limit,
    one for all modules, is searched.

    Args:
        drifts: Per module, its output's relative change from step to step, [steps, steps, images].
        ratio: The share of evaluations that are not needed, 0 to 1.

    Returns:
        Per module, 1 where an evaluation is needed and 0 elsewhere, [steps, images].
    """
    if ratio == 0:
        return {place: torch.ones(each.shape[1:]) for place, each in drifts.items()}
    low, high = 0.0, max(float(each.max()) for each in drifts.values()) * 2 + 1e-6
    for _ in range(SEARCHED):
        middle = (low + high) / 2
        needed = {place: _computed(each, middle) for place, each in drifts.items()}
        left_out = 1 - sum(float(each.sum()) for each in needed.values()) / sum(e.numel() for e in needed.values())
        low, high = (middle, high) if left_out < ratio else (low, middle)
    return {place: _computed(each, high) for place, each in drifts.items()}


def _computed(drifts: torch.Tensor, limit: float) -> torch.Tensor:
    steps, _, images = drifts.shape
    last, computed = torch.zeros(images, dtype=torch.long), torch.zeros(steps, images)
    computed[0] = 1
    for step in range(1, steps):
        drift = drifts[last, step, torch.arange(images)]
        computed[step] = (drift >= limit).float()
        last = torch.where(computed[step] > 0, step, last)
    return computed


def fit_gates(inputs: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """Fit the logistic regression of what is needed on the inputs, each step by itself: ridge, Newton's method.

    Args:
        inputs: Mean inputs, [steps, n, D].
        needed: 1 or 0, [steps, n].

    Returns:
        Weights [steps, D], without a constant: the modulation's shift is one.
    """
    features, target = inputs.double(), needed.double()
    length = torch.linalg.vector_norm(features, dim=2).square().mean(1).sqrt().clamp_min(1e-12)[:, None, None]
    features = features / length
    kernel, count = features @ features.transpose(1, 2), features.shape[1]
    dual = torch.zeros_like(target)
    for _ in range(NEWTON_STEPS):
        logit = (kernel @ dual[..., None])[..., 0]
        chance = torch.sigmoid(logit)
        curvature = (chance * (1 - chance)).clamp_min(SMALLEST_CURVATURE)
        system = kernel + torch.diag_embed(count * RIDGE / curvature)
        dual = torch.linalg.solve(system, (logit + (target - chance) / curvature)[..., None])[..., 0]
    return ((features.transpose(1, 2) @ dual[..., None])[..., 0] / length[..., 0]).float()


def train_gates(
    learning: Learning, calls: list[list[tuple[Any, ...]]], updates: int, penalty: float
) -> dict[str, torch.Tensor]:
    """Train the gates as published: the model mixes each module's fresh output with that of the step before,
    s·fresh + (1 − s)·cached with s = σ(Σ_tokens w·z), and MSE to the full model's output + ρ Σ s falls (AdamW).

    The model's own weights stay as they are; its forward must be its own meanwhile.

    Args:
        learning: The model, and the number of steps.
        calls: Per recorded branch, the arguments of each step's call of the transformer.
        updates: Of the weights, from zero; each takes two neighbouring steps of one branch.
        penalty: ρ.

    Returns:
        Per module, weights on the mean of its input over the tokens, [steps, D].
    """
    gates = _Gates(learning)
    optimiser: torch.optim.Optimizer | None = None
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), _frozen(learning.transformer), gates.attached():
        for _ in range(updates):
            branch = calls[int(torch.randint(len(calls), (), generator=generator))]
            step = 1 + int(torch.randint(learning.steps - 1, (), generator=generator))
            with torch.no_grad():
                gates.record(learning.transformer, branch[step])  # makes the weights, at the first update
                gates.record(learning.transformer, branch[step - 1])
                target = _sample(learning.transformer(*branch[step][0], **branch[step][1]))
            optimiser = optimiser or torch.optim.AdamW(gates.weights.values(), lr=RATE)
            output, scores = gates.mixed(learning.transformer, branch[step], step)
            loss = (output - target).square().mean() + penalty * sum(scores)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return {place: weight.detach().cpu() * gates.tokens[place] for place, weight in gates.weights.items()}


class _Gates:
    """The gated modules of a model in training: records what they give, or mixes it with what was recorded."""

    def __init__(self, learning: Learning) -> None:
        self._learning = learning
        self.weights: dict[str, nn.Parameter] = {}
        self.tokens: dict[str, int] = {}
        self._cached: dict[str, Any] = {}
        self._scores: list[torch.Tensor] = []
        self._step: int | None = None
        self._records = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Stand before all modules for as long as the block lasts."""
        replaced: list[Replacement] = []
        try:
            for index, block in enumerate(self._learning.blocks):
                for name in gated_modules(self._learning.spec, block):
                    replaced.append(Replacement(getattr(block, name), "forward", self._wrap(f"{index}.{name}")))
            yield
        finally:
            while replaced:
                replaced.pop().undo()

    def record(self, transformer: nn.Module, call: tuple[Any, ...]) -> None:
        """Run a call in full and keep what its modules give."""
        self._records = True
        transformer(*call[0], **call[1])
        self._records = False

    def mixed(self, transformer: nn.Module, call: tuple[Any, ...], step: int) -> tuple[torch.Tensor, list[Any]]:
        """Run a call with every module's output mixed with what was kept; its output, and the scores."""
        self._step, self._scores = step, []
        output = _sample(transformer(*call[0], **call[1]))
        self._step = None
        return output, self._scores

    def _wrap(self, place: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                inputs, output = args[0] if args else kwargs["hidden_states"], original(*args, **kwargs)
                if self._records:
                    self._cached[place], self.tokens[place] = output, inputs.shape[1]
                    if place not in self.weights:
                        zeros = torch.zeros(self._learning.steps, inputs.shape[2], device=inputs.device)
                        self.weights[place] = nn.Parameter(zeros)
                elif self._step is not None:
                    score = torch.sigmoid(inputs.float().sum(1) @ self.weights[place][self._step])
                    self._scores.append(score.mean())
                    return _mix(output, self._cached[place], score)
                return output

            return forward

        return wrap


def _mix(fresh: Any, cached: Any, score: torch.Tensor) -> Any:
    if isinstance(fresh, torch.Tensor):
        share = score.to(fresh.dtype).view(-1, *(1,) * (fresh.dim() - 1))
        return share * fresh + (1 - share) * cached
    return type(fresh)(_mix(new, old, score) for new, old in zip(fresh, cached, strict=True))


def _sample(output: Any) -> torch.Tensor:
    return (output[0] if isinstance(output, tuple) else output.sample).float()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight ask for a gradient for as long as the block lasts."""
    with ExitStack() as stack:
        for weight in model.parameters():
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(False)
        yield
