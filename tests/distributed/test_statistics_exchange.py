"""The exchange of sums between real processes over gloo."""

from __future__ import annotations

import datetime
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xfuser.core.distributed.exchange import SumExchange

SECONDS = 90
LENGTHS = (1, 7, 513)


def vector_of(rank: int, length: int) -> torch.Tensor:
    """Numbers of both signs over twelve orders of magnitude, so that the order of adding shows in the last bits."""
    generator = torch.Generator().manual_seed(1000 * rank + length)
    exponents = torch.rand(length, generator=generator, dtype=torch.float64) * 12 - 6
    return torch.randn(length, generator=generator, dtype=torch.float64) * 10**exponents


def work(rank: int, world: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    group = dist.new_group(list(range(world)), backend="gloo", timeout=limit)
    exchange = SumExchange(group)
    sums = [exchange.sum(vector_of(rank, length)) for length in LENGTHS]
    single = exchange.sum(torch.tensor([0.1 * (rank + 1), 1.0], dtype=torch.float32))
    strided = exchange.sum(torch.arange(6, dtype=torch.float64)[::2] + rank)
    odd = exchange.sum(torch.tensor([math.nan if rank == world - 1 else 1.0, math.inf if rank == 0 else 1.0]))
    report = {
        "sums": [[value.hex() for value in each] for each in sums],
        "single": [value.hex() for value in single],
        "strided": strided,
        "odd": [str(value) for value in odd],
        "collectives": exchange.collectives,
        "bytes": exchange.bytes_sent,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    dist.barrier(group)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What every rank saw."""
    world, folder = request.param, tmp_path_factory.mktemp("exchange")
    context = mp.spawn(work, args=(world, str(folder)), nprocs=world, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def test_every_rank_has_the_same_bits(reports: list[dict]) -> None:
    for other in reports[1:]:
        assert other == reports[0]


def test_sums_are_right(reports: list[dict]) -> None:
    world = len(reports)
    for length, sums in zip(LENGTHS, reports[0]["sums"], strict=True):
        vectors = [vector_of(rank, length).tolist() for rank in range(world)]
        assert len(sums) == length
        for index, total in enumerate(sums):
            parts = [vector[index] for vector in vectors]
            error = abs(float.fromhex(total) - math.fsum(parts))
            assert error <= 1e-12 * math.fsum(map(abs, parts))


def test_sums_are_added_in_rank_order(reports: list[dict]) -> None:
    for length, sums in zip(LENGTHS, reports[0]["sums"], strict=True):
        total = vector_of(0, length)
        for rank in range(1, len(reports)):
            total = total + vector_of(rank, length)
        assert [float.fromhex(value) for value in sums] == total.tolist()


def test_float32_is_added_in_float64(reports: list[dict]) -> None:
    parts = torch.tensor([0.1 * (rank + 1) for rank in range(len(reports))], dtype=torch.float32).double().tolist()
    assert float.fromhex(reports[0]["single"][0]) == pytest.approx(math.fsum(parts), rel=1e-15)
    assert float.fromhex(reports[0]["single"][1]) == len(reports)


def test_a_vector_that_is_not_contiguous(reports: list[dict]) -> None:
    world, ranks = len(reports), sum(range(len(reports)))
    assert reports[0]["strided"] == [0 * world + ranks, 2 * world + ranks, 4 * world + ranks]


def test_what_is_not_finite_on_one_rank_is_not_finite_on_all(reports: list[dict]) -> None:
    for report in reports:
        assert report["odd"] == ["nan", "inf"]


def test_collectives_and_bytes_are_counted(reports: list[dict]) -> None:
    """A vector travels in its own precision: two of these are float32."""
    for report in reports:
        assert report["collectives"] == len(LENGTHS) + 3
        assert report["bytes"] == 8 * (sum(LENGTHS) + 3) + 4 * (2 + 2)


def test_one_process_needs_no_exchange() -> None:
    exchange = SumExchange()
    vector = torch.tensor([0.1, 2.0], dtype=torch.float32)
    assert exchange.sum(vector) == vector.double().tolist()
    assert exchange.sum(torch.zeros(0)) == []
    assert (exchange.collectives, exchange.bytes_sent) == (0, 0)
