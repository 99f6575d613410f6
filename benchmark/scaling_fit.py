"""From what `benchmark/scaling.py` measured to the cost model's parameters, and from those to predictions."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmark.cost_model import Blocks, Layout, Link, Machine, Workload, mean_seconds, step_cost
from benchmark.scaling_worker import ALONE, MESHES
from xfuser.core.distributed.clock import CATEGORIES

DEGREES = {"ulysses_degree": "ulysses", "ring_degree": "ring", "pipefusion_parallel_degree": "pipefusion"}
UNLIMITED = 1e18  # bytes a second, where a measured time has the bytes in it already


@dataclass(frozen=True)
class Figure:
    """Medians over the repeats of one mesh and variant, seconds a step, and the total's lowest and highest."""

    parts: dict[str, float]
    total: float
    low: float
    high: float


def figure(mesh: dict[str, Any], variant: str, kind: str = "all") -> Figure | None:
    """``None`` where not every repeat had steps of that kind."""
    repeats = [each.get(kind) for each in mesh["repeats"][variant]]
    if not repeats or None in repeats:
        return None
    names = (*CATEGORIES, "rest")
    parts = {name: statistics.median([each.get(name, 0.0) for each in repeats]) for name in names}
    totals = [each["total"] for each in repeats]
    return Figure(parts, statistics.median(totals), min(totals), max(totals))


def counted_share(facts: dict[str, Any]) -> float:
    """Share of block evaluations over the steps that are timed: all but the first."""
    first = facts["calls"] / facts["steps"]
    return (facts["evaluated"] - first * facts["blocks"]) / (facts["blocks"] * (facts["calls"] - first))


def work_of(one: dict[str, Any], name: str) -> Workload:
    """The measured model, as the cost model sees it."""
    sizes, images = one["sizes"], one["meshes"][ALONE]["images"]
    return Workload(
        name,
        tuple(Blocks(1, each) for each in sizes["block_flops"]),
        sizes["width"],
        sizes["heads"],
        sizes["tokens"],
        sizes["outside_flops"],
        sizes["output_numbers"],
        sizes["branches"],
        images,
        batched=True,
    )


def fit(one: dict[str, Any], work: Workload, element_bytes: int) -> tuple[Workload, Machine]:
    """Parameters from one process alone, at two batch sizes: what grows with the images and what does not.

    Embedding and tail are elementwise for the most part on a small model, so that their time, not their FLOPs, is
    taken over: as the FLOPs that would take it.
    """
    whole, half = one["meshes"][ALONE], one["half"]
    larger, smaller, cached = figure(whole, "uncached"), figure(half, "uncached"), figure(whole, "cached")
    assert larger is not None and smaller is not None and cached is not None
    compute = _line((whole["images"], larger.parts["compute"]), (half["images"], smaller.parts["compute"]))
    rest = _line((whole["images"], larger.parts["rest"]), (half["images"], smaller.parts["rest"]))
    flops = work.branches * work.block_flops / compute[1]
    work = replace(work, outside_flops=rest[1] * flops / work.branches)
    nothing = Link(0.0, UNLIMITED)
    machine = Machine(
        flops,
        nothing,
        nothing,
        nothing,
        nothing,
        block_seconds=compute[0] / work.depth,
        step_seconds=rest[0],
        decision_seconds=max(cached.parts["rest"] - larger.parts["rest"], 0.0),
        element_bytes=element_bytes,
        overlaps=False,
    )
    return work, machine


def _line(one: tuple[int, float], other: tuple[int, float]) -> tuple[float, float]:
    """Fixed part and slope through two points, neither below zero; all slope where there is one point only."""
    if one[0] == other[0]:
        return 0.0, one[1] / one[0]
    slope = (one[1] - other[1]) / (one[0] - other[0])
    slope = min(slope, one[1] / one[0]) if slope > 0 else one[1] / one[0]
    return one[1] - slope * one[0], slope


def contended(machine: Machine, factor: float, links: dict[str, float], world: int) -> Machine:
    """The machine with ``world`` processes busy on it: each of them so many times slower, and their links."""
    link, control = (
        Link(links["busy_latency"], links["bandwidth"]),
        Link(links["busy_exchange"] / (world - 1), UNLIMITED),
    )
    return replace(
        machine,
        flops=machine.flops / factor,
        block_seconds=machine.block_seconds * factor,
        step_seconds=machine.step_seconds * factor,
        decision_seconds=machine.decision_seconds * factor,
        inside=link,
        across=link,
        control=control,
        control_across=control,
    )


def layout_of(degrees: dict[str, Any], batch: int) -> Layout:
    named = {DEGREES[name]: degree for name, degree in degrees.items() if name in DEGREES}
    cfg = 2 if degrees.get("use_cfg_parallel") else 1
    stages = named.get("pipefusion", 1)
    return Layout(**named, cfg=cfg, parts=min(batch, stages) if stages > 1 else None)


@dataclass(frozen=True)
class Comparison:
    """One mesh and variant: measured, and computed."""

    world: int
    mesh: str
    variant: str
    measured: Figure
    facts: dict[str, Any]
    skipped: Figure | None
    evaluated: Figure | None
    predicted: float | None
    slower: float


def compare(documents: dict[int, dict[str, Any]], element_bytes: int) -> Iterator[Comparison]:
    """Measured beside computed, for every mesh; data-parallel rows give the machine's slowdown and predict nothing."""
    model: tuple[Workload, Machine] | None = None
    alone = 0.0
    if 1 in documents:
        model = fit(documents[1], work_of(documents[1], "measured"), element_bytes)
        alone = _compute(documents[1]["meshes"][ALONE])
    for world, document in documents.items():
        slower = _compute(document["meshes"][f"data {world}"]) / alone if model and world > 1 else 1.0
        for mesh, each in document["meshes"].items():
            for variant in each["repeats"]:
                seen, facts = figure(each, variant), each["facts"][variant]
                assert seen is not None
                predicted = None
                if model is not None and not mesh.startswith("data"):
                    work, machine = model
                    if world > 1:
                        machine = contended(machine, slower, document["links"], world)
                    if variant == "uncached":
                        machine = replace(machine, decision_seconds=0.0)
                    layout = layout_of(MESHES[world][mesh], work.images * work.branches)
                    sent = int(facts["bytes_per_step"])
                    predicted = step_cost(work, layout, machine, counted_share(facts), sent).seconds
                kinds = (figure(each, variant, "skipped"), figure(each, variant, "evaluated"))
                yield Comparison(world, mesh, variant, seen, facts, *kinds, predicted, slower)


def _compute(mesh: dict[str, Any]) -> float:
    seen = figure(mesh, "uncached")
    assert seen is not None
    return seen.parts["compute"]


# -- extrapolation ----------------------------------------------------------------------------------------------------


def layouts(work: Workload, ranks: int, cached: bool) -> Iterator[Layout]:
    """All ways to put one image on so many ranks; with a cache PipeFusion's steps are synchronous by default."""
    for cfg in range(1, work.branches + 1):
        for pipefusion in (p for p in range(1, work.depth + 1) if ranks % (cfg * p) == 0):
            sequence = ranks // (cfg * pipefusion)
            for ulysses in (u for u in range(1, work.heads + 1) if work.heads % u == 0 and sequence % u == 0):
                parts = min(work.images, pipefusion) if cached and pipefusion > 1 else None
                yield Layout(ulysses, sequence // ulysses, pipefusion, cfg, parts)


@dataclass(frozen=True)
class Extrapolation:
    """Computed seconds of one model on so many devices, each variant in the layout that is best for it.

    ``undecided`` is what a cached step would take if deciding and its exchange cost nothing; ``trajectory`` what a step
    takes on average where skipped ones are the scheduler's arithmetic and communicate nothing.
    """

    ranks: int
    uncached_layout: Layout
    uncached: float
    layout: Layout
    cached: float
    evaluated: float
    skipped: float
    statistics: float
    evaluated_share: float
    skipped_share: float
    undecided: float
    trajectory: float

    @property
    def trajectory_speedup(self) -> float:
        """Of a cache on the trajectory, which keeps the uncached layout."""
        return self.uncached / self.trajectory

    @property
    def speedup(self) -> float:
        return self.uncached / self.cached


SKIPPED_SECONDS = 2e-4  # a skipped step's scheduler, forecast and correction, on the host: 0.15 ms measured on a CPU


def extrapolate(
    work: Workload,
    ranks: int,
    machine: Machine,
    share: float,
    exchanged: int,
    skipped_seconds: float = SKIPPED_SECONDS,
) -> Extrapolation:
    plain = min(layouts(work, ranks, False), key=lambda each: step_cost(work, each, machine).seconds)
    best = min(layouts(work, ranks, True), key=lambda each: mean_seconds(work, each, machine, share, exchanged))
    evaluated = step_cost(work, best, machine, 1.0, exchanged)
    skipped = step_cost(work, best, machine, 0.0, exchanged)
    return Extrapolation(
        ranks,
        plain,
        step_cost(work, plain, machine).seconds,
        best,
        mean_seconds(work, best, machine, share, exchanged),
        evaluated.seconds,
        skipped.seconds,
        evaluated.parts["statistics"],
        evaluated.statistics_share,
        skipped.statistics_share,
        share * step_cost(work, best, machine).seconds + (1 - share) * step_cost(work, best, machine, 0.0).seconds,
        share * step_cost(work, plain, machine).seconds + (1 - share) * skipped_seconds,
    )


def answer(name: str, rows: list[Extrapolation], share: float) -> str:
    """Whether the speed-up survives, and where the agreement begins to show."""
    first, last = rows[0], rows[-1]
    kept = [row.ranks for row in rows if row.speedup >= 0.9 * first.speedup]
    until = max((ranks for ranks in kept if all(r.ranks in kept for r in rows if r.ranks <= ranks)), default=1)
    verdict = "survives to" if until == last.ranks else "is within a tenth of that up to"
    text = (
        f"{name}: at an evaluated share of {share:g} the cache's speed-up is {first.speedup:.2f}× on "
        f"{first.ranks} device{'' if first.ranks == 1 else 's'} and {verdict} {until} ({last.speedup:.2f}× at "
        f"{last.ranks}). "
    )
    kinds = (("evaluated", lambda row: row.evaluated_share), ("skipped", lambda row: row.skipped_share))
    crossings = []
    for kind, of in kinds:
        for limit in (0.01, 0.05):
            above = next((row.ranks for row in rows if of(row) > limit), None)
            where = f"from {above} devices" if above else f"not up to {last.ranks}"
            crossings.append(f"{limit:.0%} of the {kind} step {where}")
    text += (
        f"On the trajectory it is {first.trajectory_speedup:.2f}× on {first.ranks} and "
        f"{last.trajectory_speedup:.2f}× on {last.ranks}. "
    )
    return text + (
        f"The statistics exchange exceeds {', '.join(crossings)}. At {last.ranks} the speed-up would be "
        f"{last.uncached / last.undecided:.2f}× if deciding cost nothing; what is missing from there to "
        f"{first.speedup:.2f}× is the layout ({last.layout.name} with the cache, whose pipe takes one image at a time, "
        f"against {last.uncached_layout.name}) and what a skipped step still computes and gathers."
    )
