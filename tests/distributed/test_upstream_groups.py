"""xDiT's groups: who is in one, and what its members exchange."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from launching import start, wait
from pool import Pool

from xfuser.core.distributed import (
    get_cfg_group,
    get_dit_group,
    get_dp_group,
    get_pp_group,
    get_sp_group,
    get_world_group,
    initialize_model_parallel,
)
from xfuser.xdit import parallel_state

GROUPS = {
    "world": get_world_group,
    "data": get_dp_group,
    "cfg": get_cfg_group,
    "stages": get_pp_group,
    "sequence": get_sp_group,
}


@contextmanager
def placed(**degrees: int) -> Iterator[None]:
    """This process among all, and not any more; the pool keeps its processes' group."""
    before, parallel_state._process = parallel_state._process, parallel_state._Process()
    try:
        initialize_model_parallel(**degrees)
        yield
    finally:
        parallel_state._process = before


@dataclass
class Seen:
    """What a rank knows of a group, and what it has got there."""

    ranks: tuple[int, ...]
    place: tuple[int, int]
    neighbours: tuple[int, int]
    gathered: torch.Tensor
    apart: list[torch.Tensor]
    by_torch: float
    at_last: torch.Tensor | None
    sum: float
    first: float
    named: Any


def look(degrees: dict[str, int]) -> dict[str, Seen]:
    seen = {}
    with placed(**degrees):
        assert dist.get_world_size(get_dit_group()) == dist.get_world_size()
        for name, getter in GROUPS.items():
            group = getter()
            mine = torch.full((2, 1), float(group.rank))
            total = torch.full((1,), float(group.rank))
            if group.device_group is not None:
                dist.all_reduce(total, group=group.device_group)
            group.barrier()
            seen[name] = Seen(
                group.ranks,
                (group.rank_in_group, group.world_size),
                (group.prev_rank, group.next_rank),
                group.all_gather(mine, dim=-1),
                group.all_gather(mine, separate_tensors=True),
                total.item(),
                group.gather(mine, dst=group.world_size - 1, dim=0),
                group.all_reduce(torch.full((1,), float(group.rank))).item(),
                group.broadcast(torch.full((1,), float(group.rank)), src=group.world_size - 1).item(),
                group.broadcast_object({"rank": group.rank}),
            )
    return seen


def check(seen: list[dict[str, Seen]], members: dict[str, list[list[int]]]) -> None:
    for rank, groups in enumerate(seen):
        for name, known in groups.items():
            ranks = next(each for each in members[name] if rank in each)
            place = ranks.index(rank)
            assert list(known.ranks) == ranks, name
            assert known.place == (place, len(ranks))
            assert known.neighbours == (ranks[place - 1], ranks[(place + 1) % len(ranks)])
            assert known.gathered.tolist() == [[float(each) for each in ranks]] * 2
            assert [part.tolist() for part in known.apart] == [[[float(each)]] * 2 for each in ranks]
            assert known.by_torch == known.sum == sum(ranks)
            assert known.first == ranks[-1] and known.named == {"rank": ranks[0]}
            if rank == ranks[-1]:
                assert known.at_last is not None
                assert known.at_last.flatten().tolist() == [float(each) for each in ranks for _ in range(2)]
            else:
                assert known.at_last is None


def test_groups_of_branches_and_of_tokens(four: Pool) -> None:
    seen = four.call(look, {"classifier_free_guidance_degree": 2, "ulysses_degree": 2})
    pairs = {"cfg": [[0, 2], [1, 3]], "sequence": [[0, 1], [2, 3]]}
    single = [[rank] for rank in range(4)]
    check(seen, pairs | {"world": [[0, 1, 2, 3]], "data": single, "stages": single})


def test_groups_of_images_and_of_stages(four: Pool) -> None:
    seen = four.call(look, {"data_parallel_degree": 2, "pipeline_parallel_degree": 2})
    pairs = {"data": [[0, 2], [1, 3]], "stages": [[0, 1], [2, 3]]}
    single = [[rank] for rank in range(4)]
    check(seen, pairs | {"world": [[0, 1, 2, 3]], "cfg": single, "sequence": single})


def within_the_sequence() -> tuple[tuple[int, ...], tuple[int, int], tuple[int, int], list[int], list[int]]:
    with placed(ulysses_degree=2, ring_degree=2, sequence_parallel_degree=4):
        group = get_sp_group()
        assert group.ulysses_group is not None and group.ring_group is not None
        return (
            group.ranks,
            (group.ulysses_rank, group.ulysses_world_size),
            (group.ring_rank, group.ring_world_size),
            dist.get_process_group_ranks(group.ulysses_group),
            dist.get_process_group_ranks(group.ring_group),
        )


def test_ulysses_and_ring_within_the_sequence(four: Pool) -> None:
    assert four.call(within_the_sequence) == [
        ((0, 1, 2, 3), (0, 2), (0, 2), [0, 1], [0, 2]),
        ((0, 1, 2, 3), (1, 2), (0, 2), [0, 1], [1, 3]),
        ((0, 1, 2, 3), (0, 2), (1, 2), [2, 3], [0, 2]),
        ((0, 1, 2, 3), (1, 2), (1, 2), [2, 3], [1, 3]),
    ]


BY_HAND = """
import sys, torch
from xfuser.core.distributed import get_world_group, init_distributed_environment
from xfuser.xdit.parallel_state import destroy_distributed_environment

rank, port = map(int, sys.argv[1:])
init_distributed_environment(2, rank, distributed_init_method=f"tcp://localhost:{port}", local_rank=7 + rank)
group = get_world_group()
print(group.rank, group.local_rank, group.all_gather(torch.tensor([rank + 5])).tolist())
destroy_distributed_environment()
"""


def test_processes_that_no_launcher_has_started_meet_at_a_url() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ended = wait([start("-c", BY_HAND, str(rank), str(port)) for rank in range(2)], limit=120)
    assert [(each.code, each.out) for each in ended] == [(0, "0 7 [5, 6]\n"), (0, "1 8 [5, 6]\n")]
