"""One pool of processes a world size, for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from pool import Pool


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The pools' processes take theirs from here, while they start.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)


def _pool(world: int, factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(world, factory.mktemp(f"pool{world}"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    yield from _pool(2, tmp_path_factory)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    yield from _pool(4, tmp_path_factory)
