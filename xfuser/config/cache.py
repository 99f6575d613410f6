"""What a cached run may be told, checked once and in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

MODES = ("blend", "bound", "budget")
SCORES = ("relative", "absolute")
APPROXIMATIONS = ("residual", "taylor-1", "taylor-2")
DEFAULT_TOLERANCE = 0.02


@dataclass(frozen=True)
class CacheConfig:
    """Settings of one cached run.

    Args:
        use_cache: The base method: ``None`` (evaluate everything), ``"Tea"`` (TeaCache, arXiv 2411.19108) or ``"Fb"``
            (First Block Cache).
        rel_l1_thresh: The base method's threshold, a relative L1 distance without unit, at least 0. 0 never hits.
        num_steps: Denoising steps of a generation. Needed only where no pipeline tells it.
        return_hidden_states_first: Whether a block of two streams returns ``hidden_states`` before
            ``encoder_hidden_states``. The declaration of the model knows; a value that contradicts it is refused.
        enable_adacorrection: Let AdaCorrection (arXiv 2602.13357) review the base method's proposals.
        adacorr_gamma: Scale of the correction, above 0. In ``blend`` it is the paper's γ (equation 4). In ``bound`` it
            multiplies the predicted error. In ``budget`` it is the exponent with which a step's unusual drift
            moves a refresh forward or back.
        adacorr_lambda: Weight of the spatial variation in the offset score (equation 3), at least 0.
        adacorr_mode: ``"blend"``, ``"bound"`` or ``"budget"``; by default ``bound`` where a tolerance is named, else
            ``budget``.
        adacorr_score: ``"relative"`` offsets (comparable between models) or ``"absolute"`` ones (as published).
        adacorr_tolerance: For ``bound``: the relative error that a stand-in for a block may have, at least 0.
        adacorr_budget: For ``budget``: the share of all block evaluations that may be spent, 0 to 1. By default the
            share that the base method itself proposes.
        approximation: What stands in for a block: ``"residual"`` (its last residual), ``"taylor-1"`` or ``"taylor-2"``
            (the residual extrapolated over the evaluated steps). By default ``"residual"`` for a base method alone, as
            its authors publish it, and ``"taylor-1"`` under AdaCorrection.

    Raises:
        ValueError: A value is out of its range, or two settings contradict each other.
    """

    use_cache: str | None = None
    rel_l1_thresh: float = 0.05
    num_steps: int | None = None
    return_hidden_states_first: bool | None = None
    enable_adacorrection: bool = False
    adacorr_gamma: float = 1.0
    adacorr_lambda: float = 1.0
    adacorr_mode: str | None = None
    adacorr_score: str = "relative"
    adacorr_tolerance: float | None = None
    adacorr_budget: float | None = None
    approximation: str | None = None

    def __post_init__(self) -> None:
        _one_of("adacorr_mode", self.adacorr_mode, (None, *MODES))
        _one_of("adacorr_score", self.adacorr_score, SCORES)
        _one_of("approximation", self.approximation, (None, *APPROXIMATIONS))
        _one_of("return_hidden_states_first", self.return_hidden_states_first, (None, True, False))
        _one_of("enable_adacorrection", self.enable_adacorrection, (True, False))
        _number("rel_l1_thresh", self.rel_l1_thresh, 0, math.inf)
        _number("adacorr_lambda", self.adacorr_lambda, 0, math.inf)
        _number("adacorr_gamma", self.adacorr_gamma, 0, math.inf)
        if self.adacorr_gamma == 0:
            raise ValueError("adacorr_gamma=0 would switch the correction off; use enable_adacorrection=False")
        if self.num_steps is not None and (isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int)):
            raise ValueError(f"num_steps={self.num_steps!r}: expected a whole number of denoising steps, 1 or more")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps}: expected 1 or more")
        if self.adacorr_tolerance is not None:
            _number("adacorr_tolerance", self.adacorr_tolerance, 0, math.inf)
        if self.adacorr_budget is not None:
            _number("adacorr_budget", self.adacorr_budget, 0, 1)
        self._check_adacorrection()

    def _check_adacorrection(self) -> None:
        if not self.enable_adacorrection:
            for name in ("adacorr_mode", "adacorr_tolerance", "adacorr_budget"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is set, but AdaCorrection is off; add enable_adacorrection=True")
            return
        if self.adacorr_tolerance is not None and self.adacorr_budget is not None:
            raise ValueError("adacorr_tolerance and adacorr_budget exclude each other: name one of them")
        for name, mode in (("adacorr_tolerance", "bound"), ("adacorr_budget", "budget")):
            if getattr(self, name) is not None and self.adacorr_mode not in (None, mode):
                raise ValueError(f"{name} belongs to adacorr_mode={mode!r}, not to {self.adacorr_mode!r}")

    @property
    def mode(self) -> str | None:
        """The mode in force: ``None`` without AdaCorrection."""
        if not self.enable_adacorrection:
            return None
        if self.adacorr_mode is not None:
            return self.adacorr_mode
        return "bound" if self.adacorr_tolerance is not None else "budget"

    @property
    def tolerance(self) -> float:
        return DEFAULT_TOLERANCE if self.adacorr_tolerance is None else self.adacorr_tolerance

    @property
    def stand_in(self) -> str:
        """The approximation in force. ``blend`` takes the stored activation itself unless another one is named."""
        if self.approximation is not None:
            return self.approximation
        return {None: "residual", "blend": "activation"}.get(self.mode, "taylor-1")

    @classmethod
    def from_keywords(cls, **keywords: Any) -> CacheConfig:
        """As the constructor, with an error for an unknown keyword that lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(keywords) - set(known))
        if unknown:
            raise TypeError(f"unknown cache setting {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**keywords)


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is option or (isinstance(option, str) and value == option) for option in allowed):
        raise ValueError(
            f"{name}={value!r} is not known; choose one of {', '.join(repr(option) for option in allowed)}"
        )


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name}={value!r}: expected a number, {limits}")
