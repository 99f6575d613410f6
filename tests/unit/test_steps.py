"""StepTracker alone: what a call is, from its timestep, its sample and its context."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from toys import wrapped

from xfuser.model_executor.cache.steps import Call, StepTracker


def sample(seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, 2, 2, generator=torch.Generator().manual_seed(seed))


def places(calls: list[Call]) -> list[tuple[int, bool]]:
    return [(call.step, call.starts_generation) for call in calls]


@pytest.fixture
def tracker() -> StepTracker:
    return StepTracker(None, -1)


def test_descending_timesteps_are_steps(tracker: StepTracker) -> None:
    calls = [tracker.begin(torch.tensor([t, t]), sample(i), None) for i, t in enumerate((999, 700, 300, 1))]
    assert places(calls) == [(0, True), (1, False), (2, False), (3, False)]
    assert len({call.branch for call in calls}) == 1
    assert not any(call.is_last for call in calls)
    assert all(call.num_steps is None for call in calls)


def test_a_jump_up_starts_a_generation(tracker: StepTracker) -> None:
    calls = [tracker.begin(t, sample(i), None) for i, t in enumerate((999, 500, 999, 500, 250, 600))]
    assert places(calls) == [(0, True), (1, False), (0, True), (1, False), (2, False), (0, True)]


def test_the_identical_sample_at_one_timestep_is_two_branches(tracker: StepTracker) -> None:
    calls = []
    for step, timestep in enumerate((900, 600, 300)):
        shared = sample(step)
        # The first step's second branch is an equal copy, as pipelines that clone their latents pass it.
        calls += [tracker.begin(timestep, shared, None), tracker.begin(timestep, shared.clone(), None)]
    assert [call.step for call in calls] == [0, 0, 1, 1, 2, 2]
    assert [call.starts_generation for call in calls] == [True] + [False] * 5
    conditional, unconditional = calls[0].branch, calls[1].branch
    assert conditional != unconditional
    assert [call.branch for call in calls] == [conditional, unconditional] * 3


def test_contexts_name_the_branches(tracker: StepTracker) -> None:
    calls = []
    for step, timestep in enumerate((1.0, 0.6, 0.3)):
        shared = sample(step)
        calls += [tracker.begin(timestep, shared, name) for name in ("cond", "uncond")]
    assert [call.step for call in calls] == [0, 0, 1, 1, 2, 2]
    assert [call.branch[0] for call in calls] == ["cond", "uncond"] * 3
    assert sum(call.starts_generation for call in calls) == 1


def test_contexts_over_two_generations_of_one_step(tracker: StepTracker) -> None:
    calls = []
    for seed in (0, 1):
        shared = sample(seed)
        calls += [tracker.begin(1.0, shared, name) for name in ("cond", "uncond")]
    assert places(calls) == [(0, True), (0, False), (0, True), (0, False)]


def test_a_repeated_timestep_of_a_second_order_scheduler_is_a_step(tracker: StepTracker) -> None:
    """Heun calls twice at every timestep but the first (and, with a last sigma of 0, the last)."""
    calls = [tracker.begin(t, sample(i), None) for i, t in enumerate((999, 700, 700, 400, 400, 100, 100))]
    assert places(calls) == [(0, True)] + [(step, False) for step in range(1, 7)]
    assert len({call.branch for call in calls}) == 1


def test_a_repeated_timestep_with_two_branches(tracker: StepTracker) -> None:
    calls = []
    for seed, timestep in enumerate((999, 700, 700, 400)):
        shared = sample(seed)
        calls += [tracker.begin(timestep, shared, None) for _ in range(2)]
    assert [call.step for call in calls] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [call.branch[0] for call in calls] == [0, 1] * 4


def test_a_repeated_timestep_with_contexts(tracker: StepTracker) -> None:
    calls = []
    for seed, timestep in enumerate((999, 700, 700)):
        shared = sample(seed)
        calls += [tracker.begin(timestep, shared, name) for name in ("cond", "uncond")]
    assert [call.step for call in calls] == [0, 0, 1, 1, 2, 2]


def test_generations_of_one_step_repeated(tracker: StepTracker) -> None:
    calls = [tracker.begin(999, sample(seed), None) for seed in range(4)]
    assert places(calls) == [(0, True)] * 4
    assert len({call.branch for call in calls}) == 1


def test_generations_of_one_step_then_a_longer_one(tracker: StepTracker) -> None:
    tracker.begin(999, sample(0), None)
    calls = [tracker.begin(t, sample(i + 1), None) for i, t in enumerate((999, 500, 10))]
    assert places(calls) == [(0, True), (1, False), (2, False)]


def test_told_number_of_steps_marks_the_last() -> None:
    tracker = StepTracker(3, -1)
    calls = [tracker.begin(t, sample(i), None) for i, t in enumerate((900, 600, 300, 900, 600, 300))]
    assert [call.is_last for call in calls] == [False, False, True] * 2
    assert [call.starts_generation for call in calls] == [True, False, False] * 2
    assert all(call.num_steps == 3 for call in calls)


def test_told_one_step() -> None:
    tracker = StepTracker(1, -1)
    calls = [tracker.begin(999, sample(seed), None) for seed in range(3)]
    assert places(calls) == [(0, True)] * 3
    assert all(call.is_last for call in calls)


def test_going_on_after_the_told_number_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    tracker = StepTracker(2, -1)
    with caplog.at_level(logging.WARNING):
        calls = [tracker.begin(1000 - 100 * i, sample(i), None) for i in range(6)]
    assert [call.starts_generation for call in calls] == [True, False] * 3
    assert len(caplog.records) == 1
    assert "num_steps=2" in caplog.records[0].getMessage()


def test_two_branches_in_the_last_told_step() -> None:
    tracker = StepTracker(2, -1)
    calls = []
    for seed, timestep in enumerate((900, 400, 900, 400)):
        shared = sample(seed)
        calls += [tracker.begin(timestep, shared, None) for _ in range(2)]
    assert [call.step for call in calls] == [0, 0, 1, 1] * 2
    assert [call.starts_generation for call in calls] == [True, False, False, False] * 2


def test_another_shape_at_the_first_timestep_starts_a_generation(tracker: StepTracker) -> None:
    first = tracker.begin(999, sample(batch=1), None)
    second = tracker.begin(999, sample(batch=2), None)
    assert second.starts_generation and second.step == 0
    assert first.branch != second.branch


def test_another_shape_later_never_shares_a_branch(tracker: StepTracker) -> None:
    calls = [tracker.begin(t, sample(batch=b), None) for t, b in ((900, 1), (600, 1), (300, 2))]
    assert calls[1].branch == calls[0].branch
    assert calls[2].branch != calls[0].branch


def test_another_dtype_never_shares_a_branch(tracker: StepTracker) -> None:
    first = tracker.begin(900, sample(), None)
    second = tracker.begin(600, sample().bfloat16(), None)
    assert first.branch != second.branch


def test_ascending_direction() -> None:
    tracker = StepTracker(None, +1)
    calls = [tracker.begin(t, sample(i), None) for i, t in enumerate((0.0, 0.4, 0.9, 0.0, 0.4))]
    assert places(calls) == [(0, True), (1, False), (2, False), (0, True), (1, False)]


def test_reset_starts_a_generation(tracker: StepTracker) -> None:
    tracker.begin(900, sample(0), None)
    tracker.begin(600, sample(1), None)
    tracker.reset()
    assert places([tracker.begin(300, sample(2), None)]) == [(0, True)]


def watching(scheduler: object) -> StepTracker:
    tracker = StepTracker(None, -1)
    tracker.watch_scheduler(scheduler)
    return tracker


def test_a_watched_scheduler_decides_alone() -> None:
    """Timesteps do not matter then, nor do equal samples in two generations of one step."""
    scheduler = DDIMScheduler()
    tracker = watching(scheduler)
    same = sample()
    for _ in range(2):
        scheduler.set_timesteps(1)
        tracker.generation_starts()
        calls = [tracker.begin(999, same, None), tracker.begin(999, same, None)]
        tracker.step_ends()
        assert places(calls) == [(0, True), (0, False)]
        assert all(call.is_last and call.num_steps == 1 for call in calls)
    scheduler.set_timesteps(3)
    tracker.generation_starts()
    calls = []
    for timestep in (100, 900, 900):
        calls.append(tracker.begin(timestep, sample(), None))
        tracker.step_ends()
    assert places(calls) == [(0, True), (1, False), (2, False)]
    assert [call.is_last for call in calls] == [False, False, True]


def test_a_watched_scheduler_that_begins_in_the_middle() -> None:
    """Image to image: what remains of the schedule is the generation."""
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(6)
    assert len(scheduler.timesteps) == 11
    scheduler.set_begin_index(4)
    assert watching(scheduler).begin(1, sample(), None).num_steps == 7


def test_a_watched_second_order_scheduler_counts_its_calls() -> None:
    scheduler = HeunDiscreteScheduler()
    tracker = watching(scheduler)

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            tracker.step_ends()
            return original(*args, **kwargs)

        return step

    with wrapped(scheduler, "step", noting):
        scheduler.set_timesteps(4)
        tracker.generation_starts()
        latents, calls = sample() * 10, []
        for timestep in scheduler.timesteps:
            calls.append(tracker.begin(timestep, latents, None))
            latents = scheduler.step(latents * 0.1, timestep, latents).prev_sample
    assert [call.step for call in calls] == list(range(7))
    assert [call.is_last for call in calls] == [False] * 6 + [True]


def test_other_conditioning_starts_a_generation() -> None:
    """A one-step generation and a longer one from the same noise differ in nothing but their labels."""
    tracker, shared = StepTracker(None, -1), sample(0)
    first, second = torch.tensor([900]), torch.tensor([5])
    tracker.begin(999, shared, None, [first])
    tracker.begin(999, shared.clone(), None, [second])
    assert tracker.begin(500, sample(1), None, [second]).starts_generation
    assert not tracker.begin(250, sample(2), None, [second.clone()]).starts_generation
