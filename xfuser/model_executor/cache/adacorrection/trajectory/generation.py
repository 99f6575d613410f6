"""One generation: which step this is, what it evaluates, and what is added to its latent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from xfuser.model_executor.cache.adacorrection.trajectory.branches import (
    Branch,
    HalfBatch,
    Slot,
    form_of,
    sample_of,
    with_sample,
)
from xfuser.model_executor.cache.adacorrection.trajectory.layout import Layout, beside, find_layout, fits
from xfuser.model_executor.cache.adacorrection.trajectory.plan import FULL, SKIP, Plan
from xfuser.model_executor.cache.adacorrection.trajectory.recording import Recording
from xfuser.model_executor.cache.adacorrection.trajectory.weights import NormalEquations, difference_basis

OTHER_FORM = "its denoiser's batch changes its form from one step to another"


@dataclass
class Fit:
    """What a replay learns: its weights step by step, from the equations of this generation and of those before."""

    reference: list[torch.Tensor]
    known: list[NormalEquations]
    raw: list[list[torch.Tensor]] | None = None
    equations: list[NormalEquations] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    shrinkage: list[float] = field(default_factory=list)


class Generation:
    """Follows one generation from the scheduler's ``set_timesteps`` to its last ``step``.

    Attributes:
        step: Index of the step that runs.
        plan: What is evaluated; ``None`` evaluates everything.
        layout: The form of a step, known from the end of the first one.
        evaluated: What each finished step evaluated: a plan's kinds.
        recording: Where this generation is recorded.
        fit: Where it is a replay.
        broken: Why nothing is skipped or learned any more.
    """

    def __init__(self, synchronize: Callable[[], None], half_batch: HalfBatch) -> None:
        self.step = 0
        self.plan: Plan | None = None
        self.weights: list[torch.Tensor] | None = None
        self.layout: Layout | None = None
        self.evaluated: list[int] = []
        self.recording: Recording | None = None
        self.fit: Fit | None = None
        self.broken: str | None = None
        self.denoiser_calls = 0
        self.first_timestep = 0.0
        self.batch = 0
        self.shape: list[int] = []
        self.not_finite: list[torch.Tensor] = []
        self._slots: list[Slot] = []
        self._call = 0
        self._guided = Branch()
        self._half_batch = half_batch
        self._synchronize = synchronize
        self._keeps_raw = False
        self._newest_latents = torch.empty(0)
        self._denoiser_seconds = 0.0
        self._spent_recording = 0.0
        self._step_began: float | None = None
        self.began = time.perf_counter()
        self.seconds = 0.0

    # -- the denoiser's calls -----------------------------------------------------------------------------------------

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one call of a denoiser: by it, by half of it, or from memory."""
        if self._step_began is None:
            self._step_began = time.perf_counter()
        index, self._call = self._call, self._call + 1
        if self.step > 0 and index >= len(self._slots):
            self.give_up("its steps call the denoiser different numbers of times")
        if self.broken is not None:
            return self._timed(original, args, kwargs)
        kind = self._kind()
        if kind == FULL or index >= len(self._slots) or not self._slots[index].branches:
            return self._evaluate(index, original, args, kwargs, kind)
        slot, form = self._slots[index], form_of(args, kwargs)
        if form not in slot.forms:  # only the denoiser can tell whether what is remembered still fits
            output = self._timed(original, args, kwargs)
            if not slot.fits(output):
                self.give_up(OTHER_FORM)
                return output
            slot.forms.add(form)
        if kind == SKIP:
            return slot.forecast(self.step)
        return self._evaluate_conditional(index, slot, original, args, kwargs)

    def _kind(self) -> int:
        return FULL if self.plan is None or self.step >= self.plan.steps else self.plan.kinds[self.step]

    def _evaluate(
        self, index: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], kind: int
    ) -> Any:
        known, form = len(self._slots) > index, form_of(args, kwargs)
        if not known:
            self._slots.append(Slot())
        slot = self._slots[index]
        if self._is_recorded and known:
            output = self._recorded(index)
        elif kind == SKIP and slot.shell is not None and form in slot.forms:
            return slot.shell  # an auxiliary network (a ControlNet): nobody reads it in a skipped step
        else:
            output = self._timed(original, args, kwargs)
        try:
            sample_of(output)
        except TypeError:
            slot.shell, slot.forms = output, {form}
            return output
        if not slot.fits(output):
            self.give_up(OTHER_FORM)
            return output
        slot.forms.add(form)
        slot.remember(self.step, output)
        if self.recording is not None:
            self._check_half(original, args, kwargs, sample_of(output))
        return output

    @property
    def _is_recorded(self) -> bool:
        """Whether this is a replay without the denoiser: what it returned is known."""
        return self.fit is not None and self.fit.raw is not None

    def _recorded(self, index: int) -> Any:
        slot = self._slots[index]
        assert self.fit is not None and self.fit.raw is not None
        like = slot.branches[0].outputs[0][1]
        return with_sample(slot.shell, self.fit.raw[self.step][index].to(like.device, like.dtype))

    def _evaluate_conditional(
        self, index: int, slot: Slot, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        assert self.layout is not None
        call, half = self.layout.places[0]
        if not self.layout.halves:
            if index != call:
                return slot.forecast(self.step)
            output = self._recorded(index) if self._is_recorded else self._timed(original, args, kwargs)
            slot.remember(self.step, output)
            return output
        if self._is_recorded:
            slot.branches[half].remember(self.step, sample_of(self._recorded(index)).chunk(2)[half])
            return slot.forecast(self.step)
        output = self._timed(lambda *a, **k: self._half_batch(original, a, k, half), args, kwargs)
        slot.branches[half].remember(self.step, sample_of(output))
        return slot.forecast(self.step)

    def _timed(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.denoiser_calls += 1
        if self.recording is None:
            return original(*args, **kwargs)
        self._synchronize()
        begin = time.perf_counter()
        output = original(*args, **kwargs)
        self._synchronize()
        self._denoiser_seconds += time.perf_counter() - begin
        return output

    def _check_half(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], whole: torch.Tensor
    ) -> None:
        """Once: find out whether one half of the batch can be evaluated alone, and what it takes."""
        if self.layout is None or not self.layout.halves or self._half_batch.checked or self.step != 1:
            return
        begin = time.perf_counter()
        self._half_batch.check(original, args, kwargs, whole, 0, self._synchronize)
        self._spent_recording += time.perf_counter() - begin

    def give_up(self, reason: str) -> None:
        """Evaluate everything from here on, and learn nothing."""
        self.broken = self.broken or reason

    # -- the scheduler's step -----------------------------------------------------------------------------------------

    def end_step(
        self,
        take: Callable[[], Any],
        output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        decide: Callable[[Generation], None],
    ) -> Any:
        """Take the scheduler's step, and correct what comes out of it.

        Args:
            take: Takes the step.
            output: The model output that the scheduler receives.
            timestep: The step's.
            sample: The latent that it receives.
            decide: Called at the end of the first step's evaluation, when its layout is known.
        """
        if self.step == 0:
            # Of this step only: where timesteps are on an accelerator, reading one waits for it.
            self.first_timestep = float(timestep)
            self._begin(output, sample)
            if self.broken is None:
                decide(self)
        elif self.layout is not None and self._call != self.layout.calls:
            self.give_up("its steps call the denoiser different numbers of times")
        if self.broken is not None:
            result = take()
            self.evaluated.append(FULL)
            self._close_step(result)
            return result
        layout = self.layout
        assert layout is not None
        kind = self._kind()
        if not layout.places and kind != SKIP:
            self._guided.remember(self.step, layout.fold(output))
        begin = time.perf_counter()
        if self.recording is not None:
            latents = layout.fold(sample)
            guided = beside(layout.fold(output), latents)
            self.recording.add(float(timestep), latents, self._newest(latents), guided)
            if self._keeps_raw:
                self.recording.raw.append([_whole(slot) for slot in self._slots])
            self.recording.correction_seconds.append(self._time_correction(sample))
        self._spent_recording += time.perf_counter() - begin
        result = take()
        result = self._corrected(result, sample)
        self.evaluated.append(kind)
        self._close_step(result)
        return result

    def _begin(self, output: torch.Tensor, sample: torch.Tensor) -> None:
        """Find the form of a step, at the end of the first one."""
        if not sample.is_floating_point():
            self.give_up("its latents are whole numbers")
            return
        layout = find_layout(self._slots, sample, output)
        if not fits(layout.fold(output), layout.fold(sample)):
            self.give_up("what its scheduler receives has not the latent's form")
            return
        self.layout = layout
        self.batch, *self.shape = layout.fold(sample).shape
        if layout.halves:
            self._slots[0].split()

    def record(self, raw: bool) -> None:
        """Record this generation from its first step on, with what each call returned where a replay needs it."""
        assert self.layout is not None
        self.recording, self._keeps_raw = Recording(self.layout), raw

    def _close_step(self, result: Any) -> None:
        now = time.perf_counter()
        if self.recording is not None and self._step_began is not None:
            self.recording.denoiser_seconds.append(self._denoiser_seconds)
            self.recording.step_seconds.append(now - self._step_began - self._spent_recording)
        self._denoiser_seconds = self._spent_recording = 0.0
        self._step_began = now
        self.seconds = now - self.began
        self._newest_latents = prev_sample_of(result)
        self.step += 1
        self._call = 0

    @property
    def last_latents(self) -> torch.Tensor:
        return self._newest_latents

    def _newest(self, latents: torch.Tensor) -> list[torch.Tensor]:
        layout = self.layout
        assert layout is not None
        if not layout.places:
            return [beside(self._guided.outputs[0][1], latents)]
        branches = [layout.branch(self._slots, index) for index in range(layout.branches)]
        return [beside(branch.outputs[0][1], latents) for branch in branches]

    def _time_correction(self, sample: torch.Tensor) -> float:
        """Take the seconds that a skipped step adds: the forecast, and the sum that corrects the latent."""
        layout = self.layout
        assert layout is not None
        self._synchronize()
        begin = time.perf_counter()
        for slot in self._slots:
            if slot.branches:
                slot.forecast(self.step + 1)
        latents = layout.fold(sample)
        features, _ = self._features(latents)
        _added(latents, features, [0.0] * len(features))
        self._synchronize()
        return time.perf_counter() - begin

    def _corrected(self, result: Any, sample: torch.Tensor) -> Any:
        fit = self.fit
        # A pipeline may go on after the steps that were learned.
        if fit is None and (self.weights is None or self.step >= len(self.weights)):
            return result
        layout = self.layout
        assert layout is not None
        previous = layout.fold(prev_sample_of(result))
        latents = layout.fold(sample)
        features, counts = self._features(latents)
        if fit is not None:
            reference = fit.reference[self.step + 1].to(previous.device)
            own = NormalEquations.of(torch.stack(features), reference - previous.float())
            known = own.join(fit.known[self.step] if fit.known else None)
            weights, shrinkage = known.solve(difference_basis(counts))
            fit.equations.append(known)
            fit.weights.append(weights)
            fit.shrinkage.append(shrinkage)
        else:
            assert self.weights is not None
            weights = self.weights[self.step]
        numbers = weights.tolist()
        if not any(numbers):
            return result
        corrected, finite = _added(previous, features, numbers)
        self.not_finite.append(~finite)
        return with_prev_sample(result, layout.unfold(corrected))

    def _features(self, latents: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
        layout = self.layout
        assert layout is not None
        if layout.places:
            branches = [layout.branch(self._slots, index) for index in range(layout.branches)]
        else:
            branches = [self._guided]
        features = [beside(each, latents).float() for branch in branches for _, each in branch.outputs]
        return [*features, latents.float()], [len(branch.outputs) for branch in branches]

    def memory_bytes(self) -> int:
        """Count what is held between two steps."""
        return sum(slot.bytes() for slot in self._slots) + self._guided.bytes()

    def corrections_dropped(self) -> int:
        """Count steps whose correction was not finite, and was left out."""
        return int(torch.stack(self.not_finite).sum()) if self.not_finite else 0

    def forget(self) -> None:
        """Let go of all tensors; what was counted stays."""
        self._slots, self._guided, self.recording, self.fit = [], Branch(), None, None
        self._newest_latents = torch.empty(0)


def _added(
    latents: torch.Tensor, features: list[torch.Tensor], numbers: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the weighted features to latents, unless what comes out is not finite; and whether it is."""
    added = features[0] * numbers[0]
    for feature, number in zip(features[1:], numbers[1:], strict=True):
        added = torch.add(added, feature, alpha=number)
    corrected = latents.float() + added
    finite = torch.isfinite(corrected).all()
    # Decided on the device: asking for the answer would wait for it at every step.
    return torch.where(finite, corrected, latents.float()).to(latents.dtype), finite


def _whole(slot: Slot) -> torch.Tensor:
    parts = [branch.outputs[0][1] for branch in slot.branches]
    return torch.cat(parts).to("cpu", copy=True)


def prev_sample_of(result: Any) -> torch.Tensor:
    """Find the latent in what a scheduler's step returns."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def with_prev_sample(result: Any, latents: torch.Tensor) -> Any:
    """Make what a scheduler's step returns, with another latent in it."""
    if isinstance(result, tuple):
        return (latents, *result[1:])
    result.prev_sample = latents
    return result
