"""What became of each row: measured, without effect, or failed; and how a benchmark ends because of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmark.matching import ALLOWED, Match
from benchmark.rows import Row, dial_of
from xfuser.model_executor.cache.blocks.flops import StepFlops

FAILED, INACTIVE = 1, 3  # exit codes: some row failed; all rows are there, and some cache did nothing


@dataclass
class Run:
    """What one row has produced so far.

    Attributes:
        row: What it is.
        images: All its batches, or, where the row's images are not kept, the last one.
        summary: The engine's, of the last batch.
        flops: What one call costs, as the engine counted it.
        match: Where a setting is searched.
        left_out: Why nothing is reported of it.
        failed: Whether that is a failure, and not one setting of many that came to nothing.
        inactive: Why it is reported, but not as a cache: it never spared anything.
    """

    row: Row
    images: list[np.ndarray] = field(default_factory=list)
    batch_seconds: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    hit_rates: list[float] = field(default_factory=list)
    flops_saved: list[float] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    non_finite: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    flops: dict[tuple[Any, ...], StepFlops] | None = None
    match: Match | None = None
    left_out: str | None = None
    failed: bool = False
    inactive: str | None = None

    @property
    def pixels(self) -> np.ndarray:
        return np.concatenate(self.images)

    @property
    def seconds(self) -> float:
        return float(sum(self.batch_seconds))

    @property
    def images_per_second(self) -> float:
        return sum(self.batch_sizes) / self.seconds


class Unreportable(RuntimeError):
    """A row that nothing may be reported of under its name."""


def check(run: Run, runs: list[Run], lenient: bool) -> None:
    """Judge what may be said of a run under its name, once all its batches are there.

    A run that never hit becomes inactive, or, where rows may be left out (``lenient``), cannot be reported.

    Raises:
        Unreportable: It missed what it had to match, or, where rows may be left out, it says nothing new.
        RuntimeError: Its method was not active, or its images contradict its decisions.
    """
    method = run.row.method
    if run.left_out is not None:
        return
    if run.row.fewer_steps and not lenient and sum(run.flops_saved) == 0:
        run.inactive = f"{method}: {run.row.base} evaluates about every step, so that these are the steps of None"
    if run.row.config.use_cache is None:
        return
    if "plan" not in run.summary or run.summary["steps"] == 0:
        raise RuntimeError("the cache was attached, but saw no step; nothing is reported under its name")
    if run.row.config.mode != "blend" and sum(run.hit_rates) == 0:
        reason = f"{method}: it never hit, so that it is another name for None; {_remedy(run)}"
        if lenient:
            raise Unreportable(reason)
        run.inactive = reason
        return
    if run.match is not None and not run.match.holds:
        raise Unreportable(
            f"{method}: it saved {run.match.reached:.3f} of the FLOPs and {run.row.base} {run.match.target:.3f}, more "
            f"than {ALLOWED} apart; more batches or more steps (--num_images, --num_inference_steps) match closer"
        )
    for other in runs:
        if other is run or other.left_out is not None or other.row.config.use_cache is None:
            continue
        same_images = torch.equal(torch.from_numpy(other.images[-1]), torch.from_numpy(run.images[-1]))
        if other.summary.get("plan") != run.summary["plan"]:
            # Plans of blocks and of the trajectory never read alike, also where both evaluate everything.
            if same_images and run.hit_rates[-1] + other.hit_rates[-1] > 0:
                raise RuntimeError(f"it decided otherwise than {other.row.method}, and yet their images are the same")
        elif lenient and same_images and _is_repetition(run, other):
            raise Unreportable(f"{method}: it decided as {other.row.method} did, batch by batch")


def _is_repetition(run: Run, other: Run) -> bool:
    """Whether two settings of one base method, the other the earlier one, came to the same."""
    both = run.row, other.row
    if any(row.method != row.base for row in both) or both[0].config.use_cache != both[1].config.use_cache:
        return False
    dial = dial_of(both[0].config.use_cache)
    earlier = getattr(both[1].config, dial) < getattr(both[0].config, dial)
    return earlier and other.hit_rates == run.hit_rates


def _remedy(run: Run) -> str:
    """What a user can do about a cache that never hits."""
    row, config = run.row, run.row.config
    if row.spends_as_base:
        return f"it spends what {row.base} spends, which is everything"
    if config.mode == "budget":
        return "lower --adacorr_budget"
    if config.mode is not None:
        return "raise --adacorr_tolerance"
    dial = dial_of(config.use_cache)
    if dial != "rel_l1_thresh":
        return f"raise --{dial}, or take more steps"
    if config.use_cache == "Fast":
        # Its second test, for noise, is in the way at any threshold where inputs change more than they did at first.
        return "raise its threshold; where that does not help, its test for noise never passes here (docs/methods.md)"
    return "raise its threshold, or take more steps"


def leave_out(run: Run, runs: Iterable[Run], reason: str, failed: bool) -> None:
    """Drop a run that nothing can be reported of, and with a base method what cannot be measured without it.

    Where it did not fail, all rows of a base method go with it: its correction has nothing to correct.
    """
    for other in runs:
        of_this_base = run.row.method == run.row.base and other.row.base == run.row.base
        if other is run or (of_this_base and (not failed or other.row.needs_base)):
            other.left_out = other.left_out or reason
            other.failed = other.failed or failed
            other.images.clear()


def failures(runs: Iterable[Run]) -> dict[str, str]:
    """Why rows that failed are not reported, in a line each, by their names."""
    return {run.row.method: run.left_out for run in runs if run.failed and run.left_out is not None}


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know: which rows failed, and which are no cache."""
    inactive = [row["inactive"] for row in document["results"] if row.get("inactive")]
    # What belongs to a base method fails with it, for the same reason.
    failed = dict.fromkeys((document.get("failures") or {}).values())
    empty = (document.get("sweep") or {}).get("empty", [])
    return [
        *(f"failed: {reason}" for reason in failed),
        *(f"inactive: {reason}" for reason in inactive),
        *(f"inactive: {name}: nothing could be reported at any of its settings" for name in empty),
    ]


def exit_code(document: Mapping[str, Any]) -> int:
    """The code that a benchmark ends with, once everything that was finished is written."""
    if document.get("failures"):
        return FAILED
    return INACTIVE if remarks(document) else 0
