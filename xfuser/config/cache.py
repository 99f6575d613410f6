"""What a cached run may be told, checked once and in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from os import PathLike
from typing import Any

from xfuser.config.spelling import did_you_mean, not_known

METHODS = (None, "Fast", "Tea", "Fb", "Interval")
WITH_THRESHOLD = ("Fast", "Tea", "Fb")
MODES = ("blend", "bound", "budget", "gate")
SCORES = ("relative", "absolute")
APPROXIMATIONS = ("residual", "linear", "taylor-1", "taylor-2", "fitted")
GRANULARITIES = ("layer", "token")
SYNCS = ("step", "layer")
DEFAULT_TOLERANCE = 0.02
FIRST = "first"


@dataclass(frozen=True)
class CacheConfig:
    """Settings of one cached run.

    Args:
        use_cache: The base method: ``None`` (evaluate everything), ``"Fast"`` (FastCache, arXiv 2505.20353), ``"Tea"``
            (TeaCache, arXiv 2411.19108), ``"Fb"`` (First Block Cache) or ``"Interval"`` (every N-th step).
        rel_l1_thresh: The base method's threshold, a relative distance without unit, at least 0. 0 never skips a block;
            ``None`` takes the method's own for the model's family (`ModelSpec.threshold`).
        motion_threshold: Fast: tokens that moved less, as a share of the fastest one's squared change, are not
            evaluated; at least 0. ``None`` and 0 evaluate all tokens, above 1 none is.
        significance: Fast: α of the χ² test, between 0 and 1.
        adaptive_threshold: Fast: let the published adaptive threshold bound the drift too.
        interval: Interval: every how many steps everything is evaluated, at least 1.
        num_steps: Denoising steps of a generation. Needed only where no pipeline tells it.
        return_hidden_states_first: Whether a block of two streams returns ``hidden_states`` before
            ``encoder_hidden_states``. The declaration of the model knows; a value that contradicts it is refused.
        enable_adacorrection: Let AdaCorrection (arXiv 2602.13357) review the base method's proposals.
        adacorr_gamma: Scale of the correction, above 0. In ``blend`` it is the paper's γ (equation 4), and so in
            ``gate``, times what each layer was found to need. In ``bound`` it multiplies the predicted error. In
            ``budget`` it is the exponent with which a step's unusual drift moves a refresh forward or back.
        adacorr_lambda: Weight of the spatial variation in the offset score (equation 3), at least 0.
        adacorr_mode: ``"blend"``, ``"bound"``, ``"gate"`` or ``"budget"``; by default ``bound`` where a tolerance is
            named, else ``budget``.
        adacorr_score: ``"relative"`` offsets (comparable between models) or ``"absolute"`` ones (as published). By
            default absolute in ``blend``, which is the published algorithm, and relative elsewhere.
        adacorr_tolerance: For ``bound`` and ``gate``: the relative error that a stand-in for a block may have, at
            least 0.
        adacorr_budget: For ``budget``: the share of all block evaluations that may be spent, 0 to 1. By default the
            share that the base method itself proposes.
        approximation: What stands in for a block: ``"residual"`` (its last residual), ``"linear"`` (that, plus a fitted
            linear map of the input's change), ``"taylor-1"`` or ``"taylor-2"`` (the residual extrapolated over the
            evaluated steps), or ``"fitted"`` (weights on them from a calibration). By default ``"linear"`` for Fast
            and ``"residual"`` for the other base methods alone, as their authors publish them, and ``"taylor-1"``
            under AdaCorrection, or ``"fitted"`` where a calibration is given.
        granularity: For ``gate``: ``"layer"`` evaluates whole blocks, ``"token"`` also the tokens of an approximated
            block whose own drift asks for it.
        sync: For Fast and ``gate``: ``"step"`` decides once a step, from the sums of the step before; ``"layer"``
            before every block, from the current ones, at the price of an exchange a block.
        calibration: A file that ``xdit calibrate`` wrote, or ``"first"``: learn from the first generation, which is
            evaluated in full.

    Raises:
        ValueError: A value is out of its range, or two settings contradict each other.
    """

    use_cache: str | None = None
    rel_l1_thresh: float | None = None
    num_steps: int | None = None
    return_hidden_states_first: bool | None = None
    enable_adacorrection: bool = False
    adacorr_gamma: float = 1.0
    adacorr_lambda: float = 1.0
    adacorr_mode: str | None = None
    adacorr_score: str | None = None
    adacorr_tolerance: float | None = None
    adacorr_budget: float | None = None
    approximation: str | None = None
    motion_threshold: float | None = None
    significance: float = 0.05
    adaptive_threshold: bool = False
    interval: int = 3
    granularity: str = "layer"
    sync: str = "step"
    calibration: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "use_cache", base_method(self.use_cache))
        for each in fields(self):
            object.__setattr__(self, each.name, plain_number(getattr(self, each.name)))
        _one_of("adacorr_mode", self.adacorr_mode, (None, *MODES))
        _one_of("adacorr_score", self.adacorr_score, (None, *SCORES))
        _one_of("approximation", self.approximation, (None, *APPROXIMATIONS))
        _one_of("return_hidden_states_first", self.return_hidden_states_first, (None, True, False))
        _one_of("enable_adacorrection", self.enable_adacorrection, (True, False))
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("sync", self.sync, SYNCS)
        _one_of("adaptive_threshold", self.adaptive_threshold, (True, False))
        if self.rel_l1_thresh is not None:
            _number("rel_l1_thresh", self.rel_l1_thresh, 0, math.inf)
        _number("significance", self.significance, 0, 1)
        if self.motion_threshold is not None:
            _number("motion_threshold", self.motion_threshold, 0, math.inf)
        _number("adacorr_lambda", self.adacorr_lambda, 0, math.inf)
        _number("adacorr_gamma", self.adacorr_gamma, 0, math.inf)
        if self.adacorr_gamma == 0:
            raise ValueError("adacorr_gamma=0 would switch the correction off; use enable_adacorrection=False")
        _count("interval", self.interval)
        if self.num_steps is not None:
            _count("num_steps", self.num_steps)
        if self.adacorr_tolerance is not None:
            _number("adacorr_tolerance", self.adacorr_tolerance, 0, math.inf)
        if self.adacorr_budget is not None:
            _number("adacorr_budget", self.adacorr_budget, 0, 1)
        self._check_adacorrection()
        self._check_belongings()

    def _check_belongings(self) -> None:
        """A setting that nothing would read is refused, not ignored."""
        if self.rel_l1_thresh is not None and self.use_cache not in WITH_THRESHOLD:
            named = "None, which skips nothing" if self.use_cache is None else repr(self.use_cache)
            known = ", ".join(map(repr, WITH_THRESHOLD))
            raise ValueError(f"rel_l1_thresh belongs to use_cache one of {known}, not to {named}; leave it out")
        if self.use_cache != "Fast":
            for name, default in (("motion_threshold", None), ("adaptive_threshold", False), ("significance", 0.05)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} belongs to use_cache='Fast', not to {self.use_cache!r}")
        if self.use_cache != "Interval" and self.interval != 3:
            raise ValueError(f"interval belongs to use_cache='Interval', not to {self.use_cache!r}")
        if self.granularity == "token" and self.mode != "gate":
            raise ValueError("granularity='token' belongs to adacorr_mode='gate'")
        if self.sync == "layer" and self.mode != "gate" and (self.use_cache, self.mode) != ("Fast", None):
            raise ValueError("sync='layer' belongs to use_cache='Fast' alone, or to adacorr_mode='gate'")
        if self.approximation == "linear" and self.mode is not None:
            raise ValueError("approximation='linear' belongs to a base method alone, not under AdaCorrection")
        if self.calibration is not None and not isinstance(self.calibration, (str, PathLike)):
            raise ValueError(f"calibration={self.calibration!r}: expected a file's path or 'first'")
        if self.calibration is not None and not reads_calibration(self.use_cache, self.stand_in):
            raise ValueError(
                f"calibration: nothing reads it with use_cache={self.use_cache!r} and approximation={self.stand_in!r}"
            )
        if self.approximation == "fitted" and self.calibration is None:
            raise ValueError("approximation='fitted' needs calibration: a file from `xdit calibrate`, or 'first'")

    def _check_adacorrection(self) -> None:
        if not self.enable_adacorrection:
            for name in ("adacorr_mode", "adacorr_tolerance", "adacorr_budget"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is set, but AdaCorrection is off; add enable_adacorrection=True")
            for name, default in (("adacorr_gamma", 1.0), ("adacorr_lambda", 1.0), ("adacorr_score", None)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} is set, but AdaCorrection is off; add enable_adacorrection=True")
            return
        if self.adacorr_tolerance is not None and self.adacorr_budget is not None:
            raise ValueError("adacorr_tolerance and adacorr_budget exclude each other: name one of them")
        for name, modes in (("adacorr_tolerance", ("bound", "gate")), ("adacorr_budget", ("budget",))):
            if getattr(self, name) is not None and self.adacorr_mode not in (None, *modes):
                allowed = " or ".join(repr(mode) for mode in modes)
                raise ValueError(f"{name} belongs to adacorr_mode={allowed}, not to {self.adacorr_mode!r}")

    @property
    def mode(self) -> str | None:
        """The mode in force: ``None`` without AdaCorrection."""
        if not self.enable_adacorrection:
            return None
        if self.adacorr_mode is not None:
            return self.adacorr_mode
        return "bound" if self.adacorr_tolerance is not None else "budget"

    @property
    def score(self) -> str:
        """The kind of offset score in force."""
        if self.adacorr_score is not None:
            return self.adacorr_score
        return "absolute" if self.mode == "blend" else "relative"

    @property
    def tolerance(self) -> float:
        return DEFAULT_TOLERANCE if self.adacorr_tolerance is None else self.adacorr_tolerance

    @property
    def stand_in(self) -> str:
        """The approximation in force. ``blend`` takes the stored activation itself unless another one is named."""
        if self.approximation is not None:
            return self.approximation
        if self.mode is None:
            return "linear" if self.use_cache == "Fast" else "residual"
        if self.mode == "blend":
            return "activation"
        return "taylor-1" if self.calibration is None else "fitted"

    @classmethod
    def from_keywords(cls, **keywords: Any) -> CacheConfig:
        """As the constructor, with an error for an unknown keyword that lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(keywords) - set(known))
        if unknown:
            meant = did_you_mean(unknown[0], known) or ";"
            raise TypeError(f"unknown cache setting {', '.join(unknown)}{meant} known are {', '.join(known)}")
        return cls(**keywords)


def reads_calibration(use_cache: str | None, stand_in: str) -> bool:
    """Whether a base method or an approximation takes anything from a calibration."""
    return use_cache in ("Fast", "Tea") or stand_in in ("fitted", "linear")


def base_method(name: Any) -> str | None:
    """Read the name of a base method; ``"None"`` is ``None``, as on the command line (ValueError where unknown)."""
    method = None if isinstance(name, str) and name == "None" else name
    _one_of("use_cache", method, METHODS)
    return method


def plain_number(value: Any) -> Any:
    """Turn a number of any library (numpy's) into Python's own; everything else is left as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if any(value is option or (isinstance(option, str) and value == option) for option in allowed):
        return
    raise ValueError(f"{name}={value!r} {not_known(value, allowed, repr)}")


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name}={value!r}: expected a number, {limits}")
