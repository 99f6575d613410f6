"""The rows of the comparison: which settings each named method stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from xfuser.config import CacheConfig
from xfuser.model_executor.cache.policies import POLICIES

SUFFIX = "+AdaCorrection"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: Its name.
        base: Name of the base method it belongs to; ``None`` for the run without a cache.
        config: Its settings.
        matched: Whether its budget is set to what the base method spends on the same batch.
        fewer_steps: Whether it runs without a cache, on the share of the steps that the base method evaluates.
    """

    method: str
    base: str | None
    config: CacheConfig
    matched: bool = False
    fewer_steps: bool = False

    def with_budget(self, share: float) -> Row:
        return replace(self, config=replace(self.config, adacorr_budget=share))


def base_names() -> list[str]:
    return [name for name in POLICIES if name is not None]


def build_rows(
    names: list[str],
    thresholds: dict[str, float],
    correct_all: bool,
    correction: dict[str, Any],
    approximation: str | None,
) -> list[Row]:
    """Rows for the methods asked for; ``None`` always comes first, since everything is measured against it.

    A corrected method X brings two rows with it: X as published, and X with the correction's own approximation but
    without the correction, so that neither is credited with the other's gain. A third row opposes them all: no cache,
    but only as many steps as X evaluates. A cache that does not beat it has no reason to exist.

    Raises:
        ValueError: A name is not known.
    """
    known = base_names()
    wanted: dict[str, bool] = {}
    for name in names:
        if name == "All":
            wanted |= dict.fromkeys(known, True)
        elif name != "None":
            base, corrected = name.removesuffix(SUFFIX), name.endswith(SUFFIX)
            if base not in known:
                choices = ", ".join(["None", *known, *(known_name + SUFFIX for known_name in known), "All"])
                raise ValueError(f"--cache_methods: {name!r} is not known; choose from {choices}")
            wanted[base] = wanted.get(base, False) or corrected or correct_all
    rows = [Row("None", None, CacheConfig())]
    for base, corrected in wanted.items():
        rows += _rows_of(base, thresholds[base], corrected, correction, approximation)
    return rows


def _rows_of(
    base: str, threshold: float, corrected: bool, correction: dict[str, Any], approximation: str | None
) -> list[Row]:
    plain = CacheConfig(use_cache=base, rel_l1_thresh=threshold)
    rows = [Row(base, base, plain)]
    if not corrected:
        if approximation not in (None, plain.stand_in):
            rows.append(Row(f"{base}[{approximation}]", base, replace(plain, approximation=approximation)))
        return rows
    config = CacheConfig(use_cache=base, rel_l1_thresh=threshold, approximation=approximation, **correction)
    if config.stand_in not in ("activation", plain.stand_in):
        rows.append(Row(f"{base}[{config.stand_in}]", base, replace(plain, approximation=config.stand_in)))
    matched = config.mode == "budget" and config.adacorr_budget is None
    opponent = Row(f"None[steps of {base}]", base, CacheConfig(), fewer_steps=True)
    return [*rows, Row(base + SUFFIX, base, config, matched), opponent]
