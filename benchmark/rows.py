"""The rows of the comparison: which settings each named method stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xfuser.config import CacheConfig
from xfuser.config.cache import reads_calibration
from xfuser.model_executor.cache.policies import POLICIES

SUFFIX = "+AdaCorrection"
BLOCKS = "[blocks]"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: Its name.
        base: Name of the base method it belongs to; ``None`` for the run without a cache.
        config: Its settings.
        matched: Whether its budget is set to what the base method spends on the same batch.
        searched: Whether a setting of its correction is searched so that it saves as many FLOPs as the base method.
        fewer_steps: Whether it runs without a cache, on the share of the steps that the base method evaluates.
        kept: Whether all its images are kept and shown, not only scored.
        trajectory: A calibration; what the base method spends is then spent on the trajectory instead of on blocks.
    """

    method: str
    base: str | None
    config: CacheConfig
    matched: bool = False
    searched: bool = False
    fewer_steps: bool = False
    kept: bool = True
    trajectory: Path | None = None

    @property
    def spends_as_base(self) -> bool:
        """Whether its base method's spending on the same batch is its own."""
        return self.matched or self.trajectory is not None

    @property
    def needs_base(self) -> bool:
        """Whether it cannot be measured without its base method."""
        return self.spends_as_base or self.searched or self.fewer_steps


def dial_of(method: str | None) -> str:
    """Name the setting by which a base method trades speed for quality."""
    sweep = POLICIES[method].sweep
    return "rel_l1_thresh" if sweep is None else sweep[0]


def base_names() -> list[str]:
    return [name for name in POLICIES if name is not None]


@dataclass(frozen=True)
class Correction:
    """What the corrected rows have in common.

    Attributes:
        settings: AdaCorrection's, for `CacheConfig`.
        approximation: What stands in; ``None`` for the method's own.
        match_compute: Whether a setting is searched for each row.
    """

    settings: dict[str, Any]
    approximation: str | None = None
    match_compute: bool = False


def wanted_methods(names: list[str], bases: dict[str, dict[str, Any]], correct_all: bool) -> dict[str, bool]:
    """Which base methods were asked for, in order, and whether with their correction.

    ``bases`` are the settings of every base method. ``All`` names those that look at what they cache, the paper's main
    table: a schedule is left out, and so is what needs a calibration that is not there (`lacks_calibration`).

    Raises:
        ValueError: A name is not known.
    """
    known = base_names()
    wanted: dict[str, bool] = {}
    for name in names:
        if name == "All":
            shown = (base for base in known if base in bases and not lacks_calibration(base, bases[base]))
            wanted |= {base: True for base in shown if not POLICIES[base].by_step_number}
        elif name != "None":
            base, corrected = name.removesuffix(SUFFIX), name.endswith(SUFFIX)
            if base not in known:
                choices = ", ".join(["None", *known, *(known_name + SUFFIX for known_name in known), "All"])
                raise ValueError(f"--cache_methods: {name!r} is not known; choose from {choices}")
            wanted[base] = wanted.get(base, False) or corrected or correct_all
    return wanted


def lacks_calibration(base: str, settings: dict[str, Any]) -> bool:
    """Whether a base method needs a calibration that its settings do not name."""
    return POLICIES[base].needs_calibration and settings.get("calibration") is None


def build_rows(wanted: dict[str, bool], bases: dict[str, dict[str, Any]], correction: Correction) -> list[Row]:
    """Rows for the methods asked for; ``None`` always comes first, since everything is measured against it.

    A corrected method X brings two rows with it: X as published, and X with the correction's own approximation but
    without the correction, so that neither is credited with the other's gain. A third row opposes them all: no cache,
    but only as many steps as X evaluates. A cache that does not beat it has no reason to exist.
    """
    rows = [uncached()]
    for base, corrected in wanted.items():
        rows += rows_of(base, bases[base], corrected, correction)
    return rows


def on_trajectory(rows: list[Row], calibration: Path) -> list[Row]:
    """Let each corrected row spend its base's compute on the trajectory; the blocks' own follows as X+…[blocks]."""
    spread: list[Row] = []
    for row in rows:
        if row.matched:
            spread.append(replace(row, trajectory=calibration))
            row = replace(row, method=f"{row.method}{BLOCKS}")
        spread.append(row)
    return spread


def uncached() -> Row:
    return Row("None", None, CacheConfig())


def rows_of(base: str, settings: dict[str, Any], corrected: bool, correction: Correction) -> list[Row]:
    """The rows of one base method under one name, which need not be the method's own."""
    plain = _readable(settings)
    approximation = correction.approximation
    rows = [Row(base, base, plain)]
    if not corrected:
        if approximation not in (None, plain.predictor) and not POLICIES[plain.use_cache].skips_modules:
            rows.append(Row(f"{base}[{approximation}]", base, _readable(settings, approximation)))
        return rows
    # How the base method alone exchanges its sums is no concern of its reviewer.
    reviewed = {name: value for name, value in settings.items() if name != "sync"}
    config = CacheConfig(**(reviewed | {"approximation": approximation} | correction.settings))
    if config.predictor not in ("activation", plain.predictor) and not POLICIES[plain.use_cache].skips_modules:
        if config.predictor == "fitted":
            rows.append(Row(f"{base}[taylor-1]", base, _readable(settings, "taylor-1")))
        rows.append(Row(f"{base}[{config.predictor}]", base, _readable(settings, config.predictor)))
    if correction.match_compute:
        _check_searchable(config)
    matched = config.mode == "budget" and config.adacorr_budget is None and not correction.match_compute
    opponent = Row(f"None[steps of {base}]", base, CacheConfig(), fewer_steps=True)
    return [*rows, Row(base + SUFFIX, base, config, matched, correction.match_compute), opponent]


def _readable(settings: dict[str, Any], approximation: str | None = None) -> CacheConfig:
    """A base method's settings; without the calibration where nothing of it would be read."""
    without = {name: value for name, value in settings.items() if name != "calibration"}
    if approximation != "fitted" and not POLICIES[settings["use_cache"]].needs_calibration:
        plain = CacheConfig(**without, approximation=approximation)
        if not reads_calibration(plain.use_cache, plain.predictor):
            return plain
    return CacheConfig(**settings, approximation=approximation)


def _check_searchable(config: CacheConfig) -> None:
    if config.mode == "blend":
        raise ValueError("--match_compute: mode blend evaluates everything, so it cannot save what its base saves")
    for name in ("adacorr_budget", "adacorr_tolerance"):
        if getattr(config, name) is not None:
            raise ValueError(f"--match_compute searches {name}; leave --{name} out (--adacorr_mode names the mode)")
