"""How measured seconds become the cost model's parameters, and what the extrapolation says of its rows."""

from __future__ import annotations

from typing import Any

import pytest

from benchmark.cost_model import FLUX, WAN, Layout, Link, Machine
from benchmark.scaling import machine_of, parser
from benchmark.scaling_fit import (
    answer,
    contended,
    counted_share,
    extrapolate,
    figure,
    fit,
    layout_of,
    layouts,
    work_of,
)
from benchmark.scaling_worker import ALONE

LINK = Link(1e-5, 1e11)
SLOW = Machine(4e14, LINK, LINK, Link(1e-4, 1e9), Link(1e-2, 1e9))


def mesh(images: int, *uncached: tuple[float, float], cached: float = 0.0) -> dict[str, Any]:
    """Repeats of (compute, rest) seconds."""
    repeats = [{"all": {"compute": one, "rest": two, "total": one + two}} for one, two in uncached]
    warm = [{"all": {"compute": 1.0, "rest": cached, "total": 1.0 + cached}}]
    return {"images": images, "repeats": {"uncached": repeats, "cached": warm}}


def document() -> dict[str, Any]:
    sizes = {"block_flops": [60.0, 40.0], "outside_flops": 7.0, "width": 4, "heads": 2, "tokens": 10}
    sizes |= {"output_numbers": 8, "branches": 2}
    whole = mesh(4, (0.9, 0.2), (1.1, 0.3), (1.0, 0.25), cached=0.35)
    return {"sizes": sizes, "meshes": {ALONE: whole}, "half": mesh(2, (0.6, 0.15))}


def test_medians_and_spread() -> None:
    seen = figure(document()["meshes"][ALONE], "uncached")
    assert seen is not None
    assert seen.parts["compute"] == 1.0 and seen.parts["statistics"] == 0.0
    assert (seen.total, seen.low, seen.high) == pytest.approx((1.25, 1.1, 1.4))
    assert figure(document()["meshes"][ALONE], "uncached", "skipped") is None


def test_fit_splits_what_grows_with_the_images_from_what_does_not() -> None:
    # Compute: 0.2 + 0.2 an image, of 2 × 100 FLOPs; rest: 0.05 + 0.05 an image; a cache adds 0.1.
    work, machine = fit(document(), work_of(document(), "toy"), 4)
    assert machine.flops == pytest.approx(1000)
    assert machine.block_seconds == pytest.approx(0.1) and machine.step_seconds == pytest.approx(0.05)
    assert machine.decision_seconds == pytest.approx(0.1)
    assert work.images * work.branches * work.outside_flops / machine.flops == pytest.approx(0.2)


def test_busy_processes_are_slower() -> None:
    links = {"busy_latency": 0.5, "busy_exchange": 0.9, "bandwidth": 10.0}
    machine = contended(Machine(100.0, LINK, LINK, LINK, LINK, block_seconds=1.0), 2.0, links, 4)
    assert machine.flops == 50.0 and machine.block_seconds == 2.0
    assert machine.inside == Link(0.5, 10.0) and machine.control.latency == pytest.approx(0.3)


def test_share_leaves_the_first_step_out() -> None:
    # Two branches, 5 steps of 3 blocks: the first step's 6 evaluations are not counted, nor is it.
    assert counted_share({"calls": 10, "steps": 5, "evaluated": 18.0, "blocks": 3}) == 0.5


def test_layouts_fit_the_model() -> None:
    assert layout_of({"pipefusion_parallel_degree": 4}, 2) == Layout(pipefusion=4, parts=2)
    assert layout_of({"use_cfg_parallel": True, "ulysses_degree": 2}, 8) == Layout(ulysses=2, cfg=2)
    for work in (FLUX, WAN):
        for layout in layouts(work, 16, cached=True):
            assert layout.ranks == 16 and work.heads % layout.ulysses == 0 and layout.cfg <= work.branches
            assert layout.parts == (1 if layout.pipefusion > 1 else None)


def test_the_answer_names_where_the_exchange_shows() -> None:
    rows = [extrapolate(FLUX, ranks, SLOW, 0.5, 2000) for ranks in (1, 8, 16)]
    assert rows[0].speedup == pytest.approx(2, rel=0.01)
    assert rows[-1].statistics == pytest.approx(15 * (1e-2 + 2000 / 1e9))
    text = answer(FLUX.name, rows, 0.5)
    assert "is within a tenth of that up to 8" in text
    assert "5% of the evaluated step from 16 devices" in text
    assert "5% of the skipped step from 8 devices" in text


def test_the_trajectory_keeps_its_speedup_at_64_devices() -> None:
    machine = machine_of(parser().parse_args([]))
    one, many = (extrapolate(FLUX, ranks, machine, 0.3, 100) for ranks in (1, 64))
    assert many.trajectory_speedup / one.trajectory_speedup >= 0.95
    # By hand: of every step, 0.3 of an evaluated one and 0.7 of a skipped one of half a second.
    row = extrapolate(FLUX, 1, machine, 0.3, 100, skipped_seconds=0.5)
    assert row.trajectory == pytest.approx(0.3 * row.uncached + 0.35)
