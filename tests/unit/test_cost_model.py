"""The cost model against numbers worked out by hand, and its FLOPs against those that are counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, WanTransformer3DModel

from benchmark.cost_model import (
    FLUX,
    WAN,
    Blocks,
    Layout,
    Link,
    Machine,
    Workload,
    dit_blocks,
    exchange_bytes,
    exchange_seconds,
    flux_blocks,
    flux_outside_flops,
    mean_seconds,
    step_cost,
    wan_blocks,
    wan_outside_flops,
)
from xfuser import apply_cache_on_transformer
from xfuser.core.distributed.exchange import SumExchange
from xfuser.model_executor.cache.blocks.flops import FlopCount

# 2 blocks of 100 FLOPs, 10 tokens of 4 channels; a FLOP a second, a byte an element, a byte a second, no latency.
WORK = Workload("hand", (Blocks(2, 100.0),), width=4, heads=2, tokens=10, outside_flops=10.0, output_numbers=8)
PLAIN = Link(0.0, 1.0)
MACHINE = Machine(1.0, PLAIN, PLAIN, PLAIN, PLAIN, element_bytes=1, overlaps=False)


def counted(model: torch.nn.Module, call: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCount() as count:
        call()
    return count.total


def flux_flops(config: dict[str, int], size: tuple[int, int], device: str) -> int:
    image, text = size
    with torch.device(device):
        model = FluxTransformer2DModel(guidance_embeds=True, **config).eval()
        inputs = {
            "hidden_states": torch.zeros(1, image, model.config.in_channels),
            "encoder_hidden_states": torch.zeros(1, text, model.config.joint_attention_dim),
            "pooled_projections": torch.zeros(1, model.config.pooled_projection_dim),
            "timestep": torch.ones(1),
            "guidance": torch.ones(1),
            "img_ids": torch.zeros(image, 3),
            "txt_ids": torch.zeros(text, 3),
        }
    return counted(model, lambda: model(**inputs))


def test_flux_flops_of_a_small_instance() -> None:
    config = dict(num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2, in_channels=8)
    config |= dict(joint_attention_dim=12, pooled_projection_dim=20, axes_dims_rope=(4, 4, 8))
    expected = sum(each.count * each.flops for each in flux_blocks(2, 3, 32, 24, 6))
    expected += flux_outside_flops(32, 24, 6, 8, 12, 20)
    assert flux_flops(config, (24, 6), "cpu") == expected


def test_flux_flops_at_full_size() -> None:
    assert flux_flops({}, (4096, 512), "meta") == pytest.approx(FLUX.block_flops + FLUX.outside_flops, rel=1e-9)


def wan_flops(config: dict[str, object], video: tuple[int, int, int], text: int, device: str) -> int:
    with torch.device(device):
        model = WanTransformer3DModel(**config).eval()
        frames, height, width = video
        hidden = torch.zeros(1, model.config.in_channels, frames, height, width)
        states = torch.zeros(1, text, model.config.text_dim)
        times = torch.ones(1)
    return counted(model, lambda: model(hidden, times, states))


def test_wan_flops_of_a_small_instance() -> None:
    config = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=10)
    config |= dict(ffn_dim=40, num_layers=3, rope_max_seq_len=32)
    video = 3 * 2 * 4
    expected = sum(each.count * each.flops for each in wan_blocks(3, 24, 40, video, 7))
    expected += wan_outside_flops(24, video, 7, 4 * 4, 10)
    assert wan_flops(config, (3, 4, 8), 7, "cpu") == expected


def test_wan_14b_has_the_tokens_of_720p_and_81_frames() -> None:
    assert WAN.tokens == (1 + (81 - 1) // 4) * (720 // 16) * (1280 // 16)


def test_dit_flops_of_a_small_instance() -> None:
    model = DiTTransformer2DModel(2, 8, in_channels=4, num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=9)
    model.eval()
    latents, zero = torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)
    engine = apply_cache_on_transformer(model, use_cache=None)
    with torch.no_grad():
        model(latents, timestep=zero + 1, class_labels=zero)
    (flops,) = engine.known_flops().values()
    assert sum(flops.blocks) == sum(each.count * each.flops for each in dit_blocks(3, 16, 16))


def test_one_device() -> None:
    assert step_cost(WORK, Layout(), MACHINE).parts == {"compute": 200.0, "outside": 10.0}


def test_ulysses() -> None:
    # A rank's tensor: 10 × 4 / 2 = 20 bytes; half of it leaves, 4 times, in each of 2 blocks: 80. The gather: 20.
    parts = step_cost(WORK, Layout(ulysses=2), MACHINE).parts
    assert parts == {"compute": 100.0, "outside": 10.0, "attention exchange": 100.0}


def test_ring_in_front_of_computing_and_behind_it() -> None:
    # A pass of keys and values: 40 bytes, in each of 2 blocks: 80. The gather: 20. Behind it 4 · 5 · 5 · 4 = 400 FLOPs.
    assert step_cost(WORK, Layout(ring=2), MACHINE).parts["attention exchange"] == 100.0
    slow = Machine(20.0, PLAIN, PLAIN, PLAIN, PLAIN, element_bytes=1)
    assert step_cost(WORK, Layout(ring=2), slow).parts["attention exchange"] == 2 * (40.0 - 400 / 20) + 20.0


def test_latency_counts_by_message() -> None:
    late = Link(1.0, 1.0)
    machine = Machine(1.0, late, late, late, late, element_bytes=1, overlaps=False)
    assert step_cost(WORK, Layout(ulysses=2), machine).parts["attention exchange"] == 100.0 + 2 * 4 + 1


def test_a_group_beyond_the_node_talks_over_the_slower_link() -> None:
    machine = Machine(1.0, PLAIN, Link(0.0, 0.5), PLAIN, PLAIN, node=1, element_bytes=1, overlaps=False)
    assert step_cost(WORK, Layout(ulysses=2), machine).parts["attention exchange"] == 200.0


def test_pipefusion() -> None:
    # A stage: 100; 2 parts of it through 2 stages: 150. A hand-over of half the tokens: 20 bytes, twice; told: 8.
    parts = step_cost(WORK, Layout(pipefusion=2), MACHINE).parts
    assert parts == {"compute": 150.0, "outside": 10.0, "pipeline": 48.0}
    alone = step_cost(WORK, Layout(pipefusion=2, parts=1), MACHINE).parts
    assert alone == {"compute": 200.0, "outside": 10.0, "pipeline": 48.0}


def test_pipefusion_exchanges_once_a_part() -> None:
    # A block a stage: 2 parts, each 4 messages late by 1, and 40 bytes; through the pipe in 3/2 of that; the gather 21.
    late = Link(1.0, 1.0)
    machine = Machine(1.0, late, late, late, late, element_bytes=1, overlaps=False)
    parts = step_cost(WORK, Layout(ulysses=2, pipefusion=2), machine).parts
    assert parts["attention exchange"] == 1.5 * (8 + 40) + 21


def test_guidance() -> None:
    both = Workload("hand", WORK.blocks, 4, 2, 10, 10.0, 8, branches=2)
    assert step_cost(both, Layout(), MACHINE).seconds == 420.0
    assert step_cost(both, Layout(cfg=2), MACHINE).parts == {"compute": 200.0, "outside": 10.0, "guidance": 8.0}


def test_fixed_times() -> None:
    machine = Machine(1.0, PLAIN, PLAIN, PLAIN, PLAIN, block_seconds=3.0, step_seconds=5.0, decision_seconds=7.0)
    parts = step_cost(WORK, Layout(), machine, exchanged=100).parts
    assert parts == {"compute": 206.0, "outside": 15.0, "decision": 7.0, "statistics": 0.0}


def test_a_skipped_step_costs_the_outside_and_the_exchange() -> None:
    parts = step_cost(WORK, Layout(ulysses=2), MACHINE, evaluated=0.0, exchanged=6).parts
    expected = {"compute": 0.0, "outside": 10.0, "attention exchange": 20.0, "decision": 0.0, "statistics": 6.0}
    assert parts == expected
    assert step_cost(WORK, Layout(ulysses=2), MACHINE, 0.0, 6).statistics_share == pytest.approx(6 / 36)
    mean = mean_seconds(WORK, Layout(ulysses=2), MACHINE, 0.25, 6)
    assert mean == pytest.approx(0.25 * 216 + 0.75 * 36)


def test_the_exchange_goes_round() -> None:
    machine = Machine(1.0, PLAIN, PLAIN, Link(2.0, 10.0), Link(4.0, 10.0), node=4)
    assert exchange_seconds(4, 100, machine) == 3 * (2.0 + 10.0)
    assert exchange_seconds(8, 100, machine) == 7 * (4.0 + 10.0)


@pytest.mark.parametrize("method, corrected", [("Fb", True), ("Tea", True), ("Tea", False)])
def test_exchanged_bytes_are_those_of_the_engine(method: str, corrected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DiTTransformer2DModel(2, 8, in_channels=4, num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=9)
    model.eval()
    seen = []
    whole = SumExchange.sum

    def watched(self: SumExchange, vector: torch.Tensor) -> list[float]:
        seen.append(vector.numel() * vector.element_size())
        return whole(self, vector)

    monkeypatch.setattr(SumExchange, "sum", watched)
    apply_cache_on_transformer(model, use_cache=method, enable_adacorrection=corrected)
    latents, zero = torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        model(latents, timestep=zero + 1, class_labels=zero)
    assert seen == [exchange_bytes(3, 2, measures=corrected)]
