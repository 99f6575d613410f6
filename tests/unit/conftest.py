"""Toy pipelines, built once. A test that attaches a cache takes it off again (`toys.attached`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from toys import Toy, build_toy_dit


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Sums of several threads may be added in another order, and images are compared bit by bit.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _dit_once() -> Toy:
    return Toy("dit", build_toy_dit())


@pytest.fixture(scope="session")
def _flux_once() -> Toy:
    from xfuser.model_executor.pipelines.toy_flux import build_toy_flux

    pipeline = build_toy_flux()
    pipeline.set_progress_bar_config(disable=True)
    return Toy("flux", pipeline)


@pytest.fixture
def dit(_dit_once: Toy) -> Iterator[Toy]:
    yield _dit_once
    _assert_clean(_dit_once)


@pytest.fixture
def flux(_flux_once: Toy) -> Iterator[Toy]:
    yield _flux_once
    _assert_clean(_flux_once)


@pytest.fixture
def toy(family: str, request: pytest.FixtureRequest) -> Toy:
    """The toy that a test's ``family`` parameter names."""
    return request.getfixturevalue(family)


def _assert_clean(used: Toy) -> None:
    assert not any("forward" in vars(module) for module in used.transformer.modules()), "a cache was left attached"
    assert not {"step", "set_timesteps"} & set(vars(used.scheduler)), "a cache was left on the scheduler"
