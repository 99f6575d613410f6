"""One pool of processes a world size, for as long as tests of this folder run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pool import Pool


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The pools' processes take theirs from here, while they start.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)


_POOLS: dict[int, Pool] = {}


def _pool(world: int, factory: pytest.TempPathFactory) -> Pool:
    if world not in _POOLS:
        _POOLS[world] = Pool(world, factory.mktemp(f"pool{world}"))
    return _POOLS[world]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the pools behind the last test of this folder: waiting processes take time from those that follow."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        while _POOLS:
            _POOLS.popitem()[1].close()


@pytest.fixture
def two(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return _pool(2, tmp_path_factory)


@pytest.fixture
def four(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return _pool(4, tmp_path_factory)
