"""What happened: decisions, weights, offsets and errors of every step, and their summary."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, field
from typing import Any

from xfuser.model_executor.cache.blocks.flops import StepFlops
from xfuser.model_executor.cache.steps import BranchKey


@dataclass
class StepRecord:
    """One branch's step, per block. Numbers that nobody measured are NaN; ``evaluated`` is the share of tokens."""

    step: int
    evaluated: list[float]
    weights: list[float]
    predicted: list[float]
    offsets: list[float]
    true: list[float]
    proposed: float = 1.0

    @classmethod
    def empty(cls, step: int, blocks: int) -> StepRecord:
        nothing = [math.nan] * blocks
        return cls(step, [1.0] * blocks, list(nothing), list(nothing), list(nothing), list(nothing))


@dataclass
class Generation:
    """All records of one generation, by branch."""

    records: dict[BranchKey, list[StepRecord]] = field(default_factory=dict)

    def table(self, name: str) -> dict[str, list[list[Any]]]:
        """One property of all records, steps by blocks, by branch name, ready for JSON."""
        return {
            _branch_name(key): [[_plain(value) for value in getattr(record, name)] for record in records]
            for key, records in self.records.items()
        }


class Statistics:
    """Totals over all generations since the last reset, and the last generation in full."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.reset()

    def reset(self) -> None:
        self.generations = 0
        self.calls = 0
        self.evaluated = 0.0
        self.flops = 0.0
        self.flops_skipped = 0.0
        self.flops_added = 0.0
        self.non_finite = 0
        self.proposed = 0.0
        self.within_prediction = 0
        self.predictions = 0
        self.generation = Generation()
        self._digest = hashlib.sha256()

    def start_generation(self) -> None:
        self.generations += 1
        self.generation = Generation()
        self._digest.update(b"generation")

    def add(self, branch: BranchKey, record: StepRecord, flops: StepFlops) -> None:
        """Count one finished call."""
        self.calls += 1
        self.proposed += record.proposed
        self.evaluated += sum(record.evaluated)
        self.flops += flops.total
        self.flops_skipped += sum(
            cost * (1 - share) for cost, share in zip(flops.blocks, record.evaluated, strict=True)
        )
        self.flops_added += flops.signal
        self.generation.records.setdefault(branch, []).append(record)
        self._digest.update(struct.pack(f"<i{self.blocks}d", record.step, *record.evaluated))

    @property
    def plan_digest(self) -> str:
        """Of all decisions since the last reset: which blocks were evaluated at which step."""
        return self._digest.hexdigest()

    def count_prediction(self, predicted: float, true: float) -> None:
        if math.isfinite(predicted) and math.isfinite(true):
            self.predictions += 1
            self.within_prediction += true <= predicted

    @property
    def hit_rate(self) -> float:
        return 1 - self.evaluated / (self.blocks * self.calls) if self.calls else 0.0

    @property
    def flops_saved(self) -> float:
        return self.flops_skipped / self.flops if self.flops else 0.0

    @property
    def signal_flops(self) -> float:
        """What the base method's signal costs on top, as a share of the transformer's own FLOPs."""
        return self.flops_added / self.flops if self.flops else 0.0

    def summary(self) -> dict[str, Any]:
        """Everything in plain types, ready for JSON.

        ``plan`` (the share of tokens evaluated), ``weights``, ``offsets``, ``predicted_errors`` and ``true_errors``
        are the last generation's, by branch, steps by blocks; the rest counts all generations since the last reset.
        """
        last = self.generation
        return {
            "generations": self.generations,
            "steps": max((len(records) for records in last.records.values()), default=0),
            "branches": len(last.records),
            "blocks": self.blocks,
            "calls": self.calls,
            "evaluated": self.evaluated,
            "hit_rate": self.hit_rate,
            "flops_saved": self.flops_saved,
            "signal_flops": self.signal_flops,
            "proposed_share": self.proposed / self.calls if self.calls else 0.0,
            "non_finite": self.non_finite,
            "plan_digest": self.plan_digest,
            "prediction_coverage": self.within_prediction / self.predictions if self.predictions else None,
            "plan": last.table("evaluated"),
            "weights": last.table("weights"),
            "offsets": last.table("offsets"),
            "predicted_errors": last.table("predicted"),
            "true_errors": last.table("true"),
        }


def _branch_name(key: BranchKey) -> str:
    return str(key[0])


def _plain(value: Any) -> Any:
    if not math.isfinite(value):
        return None
    return int(value) if value in (0, 1) else value
