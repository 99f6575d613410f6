"""Ranks whose activations differ decide alike all the same; those that do not are stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pool import SMALL, Job, Outcome, Pool, alone, loaded, run

from xfuser.core.distributed.exchange import Disagreement, SumExchange
from xfuser.core.tokens import Extent, part
from xfuser.model_executor.cache.adacorrection.offset import drift_sums, offset_sums
from xfuser.model_executor.cache.blocks.probe import sample_tokens
from xfuser.model_executor.cache.policies.base import relative_sums
from xfuser.model_executor.parallel import ParallelPipeline

TRIALS = 200
MESHES = {"ulysses": {"ulysses_degree": 2}, "pipefusion": {"pipefusion_parallel_degree": 2, "warmup_steps": 2}}


# -- perturbed ranks -----------------------------------------------------------------------------------------------


def perturbed(job: Job, scale: float, seed: int) -> Outcome:
    """The job, with noise of that scale on what one rank's last block has done to its tokens."""

    def prepare(spread: ParallelPipeline) -> None:
        rank = torch.distributed.get_rank()
        if rank != seed % torch.distributed.get_world_size():
            return
        generator = torch.Generator().manual_seed(seed)
        runner = spread.engine.runner
        original = runner.streams_of

        def streams_of(active: Any, index: int, args: Any, kwargs: Any) -> Any:
            streams = original(active, index, args, kwargs)
            noise = torch.randn(streams[0].shape, generator=generator)
            return (streams[0] + scale * noise * streams[0].abs().mean(), *streams[1:])

        runner.streams_of = streams_of

    return run(job, prepare)


@pytest.mark.parametrize("mesh", MESHES)
def test_noise_on_one_rank_never_splits_the_plan(two: Pool, mesh: str) -> None:
    """Random trials around the threshold: never a hang (the pool's limit), never two plans."""
    generator = torch.Generator().manual_seed(5)
    hits = set()
    for trial in range(TRIALS):
        method = ("Tea", "Fb", "Fast")[trial % 3]
        scale = 10 ** (-6 + 5 * float(torch.rand((), generator=generator)))
        threshold = 0.08 * 4 ** float(torch.rand((), generator=generator) - 0.5)
        cache = {"use_cache": method, "rel_l1_thresh": threshold}
        if trial % 2:
            cache |= {"enable_adacorrection": True}
        job = Job(SMALL, MESHES[mesh], cache, steps=6, images=1, seed=trial)
        outcomes = two.call(perturbed, job, scale, trial)
        assert len({each.digest for each in outcomes}) == 1
        hits.add(outcomes[0].summary["hit_rate"])
    assert len(hits) > 5, "the trials do not lie around the threshold"


def test_two_plans_stop_all_ranks(two: Pool) -> None:
    """The line names step, block and rank."""
    messages = two.call(disagreeing)
    assert messages[0] == messages[1] == "step 3, block 2: rank 1 has another plan than rank 0"


def disagreeing() -> str:
    exchange = SumExchange(torch.distributed.group.WORLD, verify=True)
    exchange.verify(2, [1.0, 1.0, -1.0])
    try:
        exchange.verify(3, [1.0, 1.0, -1.0 if torch.distributed.get_rank() else 0.5])
    except Disagreement as error:
        return str(error)
    return "nobody noticed"


# -- uneven shards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 3])
def test_uneven_shards_have_the_sums_of_one_process(four: Pool, images: int) -> None:
    """Four ranks share 67 tokens (and, for even batches, two branches): every sum to 1e-6."""
    expected = sums_of(*activations(images), None)
    for told in four.call(reduced_over_shards, images):
        for ours, theirs in zip(told, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)


def activations(images: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(images)
    return tuple(torch.randn(images, 67, 24, generator=generator) for _ in range(4))


def sums_of(
    now: torch.Tensor, before: torch.Tensor, out: torch.Tensor, residual: torch.Tensor, extent: Extent | None
) -> list[float]:
    """The policy's sums, the drift's and a row of statistics."""
    sampled = [sample_tokens(each, extent)[None, None] for each in (now, before, out, residual)]
    weights = torch.tensor([0.5])[None, :, None, None, None]
    row = offset_sums(sampled[0], sampled[2], [(sampled[1], sampled[3])], weights, 2 * weights)
    whole = [relative_sums(now, before), drift_sums(sampled[0][0], sampled[1][0]), row.flatten()]
    return torch.cat(whole).tolist()


def reduced_over_shards(images: int) -> list[float]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    span = part(67, world, rank)
    extent = Extent(images, 67, first_token=span.start)
    local = sums_of(*(each[:, span] for each in activations(images)), extent)
    return SumExchange(torch.distributed.group.WORLD).sum(torch.tensor(local))


# -- what does not go together -------------------------------------------------------------------------------------

REFUSED = {
    "motion_threshold": ({"ulysses_degree": 2}, {"use_cache": "Fast", "motion_threshold": 0.1}),
    "granularity": (
        {"use_cfg_parallel": True},
        {"use_cache": "Tea", "enable_adacorrection": True, "adacorr_mode": "gate", "granularity": "token"},
    ),
    "calibration": ({"ring_degree": 2}, {"use_cache": "Tea", "calibration": "first"}),
    "sync": ({"pipefusion_parallel_degree": 2}, {"use_cache": "Fast", "sync": "layer"}),
    "blend": (
        {"pipefusion_parallel_degree": 2},
        {"use_cache": "Tea", "enable_adacorrection": True, "adacorr_mode": "blend"},
    ),
    "--attn_layer_num_for_pp": ({"pipefusion_parallel_degree": 2, "attn_layer_num_for_pp": (5, 5)}, {}),
}


def refused(job: Job) -> str:
    try:
        run(job)
    except ValueError as error:
        return str(error)
    return "it ran"


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together(two: Pool, name: str) -> None:
    parallel, cache = REFUSED[name]
    for message in two.call(refused, Job("tiny-dit", parallel, {"use_cache": None} | cache)):
        assert name in message and "\n" not in message
    assert "forward" not in vars(loaded("tiny-dit").pipeline.transformer)


def test_a_refusal_leaves_the_pool_working(two: Pool) -> None:
    job = Job("tiny-dit", {"ulysses_degree": 2}, {"use_cache": None}, steps=4)
    assert two.run(job)[0].digest == alone(job).digest
