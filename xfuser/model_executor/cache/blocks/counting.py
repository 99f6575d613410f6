"""Count what a base method would spend, while everything is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import denoisers_of, spec_of
from xfuser.model_executor.cache.engine import CacheEngine
from xfuser.model_executor.cache.policies import with_threshold

_NOT_THE_BASE_S = ("use_cache", "enable_adacorrection", "adacorr_budget")


class BaseCounter:
    """Counts a base method's proposals in a pipeline that evaluates every block. For `Spending`.

    Args:
        pipeline: With a transformer of a supported family.
        config: The base method's settings.

    Raises:
        TypeError: The transformer is not supported.
    """

    def __init__(self, pipeline: Any, config: CacheConfig) -> None:
        self._pipeline = pipeline
        denoiser = denoisers_of(pipeline)[0]
        self._spec = spec_of(denoiser)
        # With the whole budget nothing is skipped, while the base method goes on as if it were obeyed.
        whole = replace(config, enable_adacorrection=True, adacorr_budget=1.0)
        self._config = with_threshold(whole, self._spec, denoiser)
        self.name = " ".join([str(config.use_cache), *_differing(self._config)])
        self._engine: CacheEngine | None = None

    def attach(self) -> None:
        """Begin to count; nothing is skipped."""
        first, *others = denoisers_of(self._pipeline)
        self._engine = CacheEngine(first, self._spec, self._config, others=others)
        self._engine.follow_pipeline(self._pipeline)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not see the calls that are made within."""
        assert self._engine is not None
        self._engine.paused = True
        try:
            yield
        finally:
            self._engine.paused = False

    def detach(self) -> float | None:
        """Leave the pipeline alone again, and tell the share of block evaluations; ``None`` where none was seen."""
        assert self._engine is not None
        engine, self._engine = self._engine, None
        engine.remove()
        summary = engine.summary()
        if not summary["calls"]:
            return None
        probed = engine.policy.probe_blocks / len(engine.blocks)
        return probed + (1 - probed) * summary["proposed_share"]


def _differing(config: CacheConfig) -> list[str]:
    """List the settings that are not the defaults: with any other one, the base method may propose other steps."""
    said = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in _NOT_THE_BASE_S}
    defaults = {each.name: each.default for each in fields(config)}
    return [f"{name}={value}" for name, value in said.items() if value != defaults[name]]
