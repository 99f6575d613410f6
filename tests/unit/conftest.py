"""Toy pipelines, built once. A test that attaches a cache takes it off again (`toys.attached`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from calibrations import once, saved  # noqa: F401 (fixtures)
from toys import Toy
from trajectories import attached, own_store, tiny  # noqa: F401 (fixtures)

from xfuser.model_executor.adapters import denoisers_of


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Sums of several threads may be added in another order, and images are compared bit by bit.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _once() -> Callable[[str], Toy]:
    return cache(Toy.build)


@pytest.fixture
def dit(_once: Callable[[str], Toy]) -> Iterator[Toy]:
    yield from _lent(_once("dit"))


@pytest.fixture
def flux(_once: Callable[[str], Toy]) -> Iterator[Toy]:
    yield from _lent(_once("flux"))


@pytest.fixture
def sd3(_once: Callable[[str], Toy]) -> Iterator[Toy]:
    yield from _lent(_once("sd3"))


@pytest.fixture
def toy(family: str, _once: Callable[[str], Toy]) -> Iterator[Toy]:
    """The toy that a test's ``family`` parameter names."""
    yield from _lent(_once(family))


def _lent(used: Toy) -> Iterator[Toy]:
    yield used
    _assert_clean(used)


def _assert_clean(used: Toy) -> None:
    modules = [module for denoiser in denoisers_of(used.pipeline) for module in denoiser.modules()]
    assert not any("forward" in vars(module) for module in modules), "a cache was left attached"
    assert not {"step", "set_timesteps"} & set(vars(used.scheduler)), "a cache was left on the scheduler"
