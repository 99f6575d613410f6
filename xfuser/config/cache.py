"""What a cached run may be told, checked once and in one place."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from os import PathLike
from typing import Any

from xfuser.config import methods
from xfuser.config.settings import (
    check_values,
    choice,
    count,
    help_of,
    number,
    one_of,
    path,
    setting_of,
    switch,
    word,
)
from xfuser.config.spelling import did_you_mean

METHODS = (None, *methods.METHODS)
MODES = ("blend", "bound", "budget", "gate")
APPROXIMATIONS = ("residual", "linear", "taylor-1", "taylor-2", "fitted")
DEFAULT_TOLERANCE = 0.02
FIRST = "first"


def base_method(name: Any) -> str | None:
    """Read the name of a base method; ``"None"`` is ``None``, as on the command line (ValueError where unknown)."""
    method = None if isinstance(name, str) and name == "None" else name
    one_of("use_cache", method, METHODS)
    return method


@dataclass(frozen=True)
class SharedSettings:
    """Those that no base method has for itself."""

    use_cache: str | None = word(
        "the base method, which decides at every step which blocks are evaluated",
        lambda name, value: None,  # `base_method` has read it
        allowed=", ".join(f"`{each}`" for each in methods.METHODS),
    )
    rel_l1_thresh: float | None = number(
        None,
        "threshold of the base method, a relative distance; lower is nearer to no cache, 0 skips no block",
        otherwise="by method and family",
        readers=methods.with_threshold(),
    )
    num_steps: int | None = count(
        None,
        "denoising steps of a generation",
        otherwise="from the scheduler; without a pipeline unknown",
        flag=False,
    )
    return_hidden_states_first: bool | None = switch(
        None,
        "whether a block of two streams returns hidden_states first; a value that contradicts the model is refused",
        otherwise="as the model does",
    )
    approximation: str | None = choice(
        None,
        APPROXIMATIONS,
        "what stands in for a block: its last residual; that, plus a fitted linear map of the input's change; the "
        "residual extrapolated over the evaluated steps; or weights on them from a calibration",
        otherwise="linear for Fast, residual for others; under AdaCorrection fitted where calibrated, else taylor-1; "
        "in blend the stored output",
    )
    calibration: str | PathLike[str] | None = path(
        "a file of `xdit calibrate`; 'first': learn from the first generation, which is evaluated in full; 'auto', for "
        "a goal: a stored one, or learn from the first generation and store it",
        (FIRST,),
        otherwise="none, and auto for a goal",
    )
    sync: str = choice(
        "step",
        ("step", "layer"),
        "decide once a step, from the sums of the step before, or at every layer, from the current ones, at the price "
        "of an exchange a block",
        readers=("gate", "Fast"),
    )


@dataclass(frozen=True)
class CorrectionSettings:
    """Those of AdaCorrection (arXiv 2602.13357) on blocks."""

    enable_adacorrection: bool = switch(False, "review the base method's proposals")
    adacorr_mode: str | None = choice(
        None, MODES, "how AdaCorrection reviews", otherwise="bound with a tolerance, else budget"
    )
    adacorr_budget: float | None = number(
        None, "share of all block evaluations", 0, 1, otherwise="the base method's", readers=("budget",)
    )
    adacorr_tolerance: float | None = number(
        None,
        "allowed relative error of a stand-in, 0 or more",
        otherwise=f"{DEFAULT_TOLERANCE:g}",
        readers=("bound", "gate"),
    )
    adacorr_gamma: float = number(
        1.0,
        "scale of the correction, above 0: the paper's γ (equation 4) in blend and, times what each layer needs, in "
        "gate; multiplies the predicted error in bound; the exponent of a step's unusual drift in budget",
    )
    adacorr_lambda: float = number(1.0, "weight of the spatial variation in the offset score (equation 3)")
    adacorr_score: str | None = choice(
        None,
        ("relative", "absolute"),
        "offsets that compare between models, or as published",
        otherwise="absolute in blend, else relative",
    )
    granularity: str = choice(
        "layer",
        ("layer", "token"),
        "whole blocks, or tokens of them too whose own drift asks for it",
        readers=("gate",),
    )


_SECTIONS = [methods.policy_class(name).Config for name in methods.METHODS if methods.settings_of(name)]


@dataclass(frozen=True)
class CacheConfig(*reversed(_SECTIONS), CorrectionSettings, SharedSettings):  # type: ignore[misc]
    """Settings of one cached run: those that all share, AdaCorrection's, and every base method's own.

    Raises:
        ValueError: A value is out of its range, or two settings contradict each other.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "use_cache", base_method(self.use_cache))
        check_values(self)
        if self.adacorr_gamma == 0:
            raise ValueError("adacorr_gamma=0 would switch the correction off; use enable_adacorrection=False")
        self._check_adacorrection()
        self._check_belongings()
        self._check_calibration()

    def _check_belongings(self) -> None:
        """A setting that nothing would read is refused, not ignored."""
        if self.rel_l1_thresh is not None and self.use_cache not in methods.with_threshold():
            named = "None, which skips nothing" if self.use_cache is None else repr(self.use_cache)
            known = ", ".join(map(repr, methods.with_threshold()))
            raise ValueError(f"rel_l1_thresh belongs to use_cache one of {known}, not to {named}; leave it out")
        for method in methods.METHODS:
            for each in methods.settings_of(method):
                if method != self.use_cache and getattr(self, each.name) != each.default:
                    raise ValueError(f"{each.name} belongs to use_cache={method!r}, not to {self.use_cache!r}")
        if self.granularity == "token" and self.mode != "gate":
            raise ValueError("granularity='token' belongs to adacorr_mode='gate'")
        if self.sync == "layer" and self.mode != "gate" and (self.use_cache, self.mode) != ("Fast", None):
            raise ValueError("sync='layer' belongs to use_cache='Fast' alone, or to adacorr_mode='gate'")
        if self.approximation == "linear" and self.mode is not None:
            raise ValueError("approximation='linear' belongs to a base method alone, not under AdaCorrection")

    def _check_calibration(self) -> None:
        if self.calibration is not None and not reads_calibration(self.use_cache, self.predictor):
            raise ValueError(
                f"calibration: nothing reads it with use_cache={self.use_cache!r} and approximation={self.predictor!r}"
            )
        if self.approximation == "fitted" and self.calibration is None:
            raise ValueError("approximation='fitted' needs calibration: a file from `xdit calibrate`, or 'first'")
        if self.calibration is None and self.use_cache is not None and self._policy.needs_calibration:
            raise ValueError(
                f"use_cache={self.use_cache!r} needs calibration: a file from `xdit calibrate`, or 'first'"
            )

    def _check_adacorrection(self) -> None:
        if not self.enable_adacorrection:
            for each in fields(CorrectionSettings):
                if each.name != "granularity" and getattr(self, each.name) != each.default:
                    raise ValueError(f"{each.name} is set, but AdaCorrection is off; add enable_adacorrection=True")
            return
        if self.adacorr_tolerance is not None and self.adacorr_budget is not None:
            raise ValueError("adacorr_tolerance and adacorr_budget exclude each other: name one of them")
        for each in fields(CorrectionSettings):
            modes = setting_of(each).readers
            if each.name == "granularity" or not modes or getattr(self, each.name) is None:
                continue
            if self.adacorr_mode not in (None, *modes):
                allowed = " or ".join(repr(mode) for mode in modes)
                raise ValueError(f"{each.name} belongs to adacorr_mode={allowed}, not to {self.adacorr_mode!r}")

    @property
    def _policy(self) -> Any:
        return methods.policy_class(self.use_cache)

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
    def predictor(self) -> str:
        """The approximation in force. ``blend`` takes the stored activation itself unless another one is named."""
        if self.approximation is not None:
            return self.approximation
        if self.mode is None:
            return "residual" if self.use_cache is None else self._policy.approximation
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


def by_reader() -> list[tuple[str, tuple[Field[Any], ...]]]:
    """List all settings in the order of `CacheConfig`, each group with what it belongs to, or ""."""
    own = [(method, methods.settings_of(method)) for method in methods.METHODS]
    return [("", fields(SharedSettings)), ("AdaCorrection", fields(CorrectionSettings)), *own]


CacheConfig.__doc__ = (CacheConfig.__doc__ or "") + "".join(
    f"\n    {each.name}: {help_of(each, reader)}." for reader, settings in by_reader() for each in settings
)


def settings_read_by(method: str | None) -> tuple[Field[Any], ...]:
    """List the settings of a base method alone, and those that it shares with a mode."""
    shared = (each for each in fields(SharedSettings) if method in setting_of(each).readers)
    return (*methods.settings_of(method), *(each for each in shared if each.name != "rel_l1_thresh"))


def reads_calibration(use_cache: str | None, approximation: str) -> bool:
    """Whether a base method or an approximation takes anything from a calibration."""
    return approximation in ("fitted", "linear") or (
        use_cache is not None and methods.policy_class(use_cache).reads_calibration
    )
