"""The base methods, one file each."""

from __future__ import annotations

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import ModelSpec
from xfuser.model_executor.cache.calibration import Calibration
from xfuser.model_executor.cache.policies.base import Policy
from xfuser.model_executor.cache.policies.fast import FastPolicy
from xfuser.model_executor.cache.policies.first_block import FirstBlockPolicy
from xfuser.model_executor.cache.policies.full import FullPolicy
from xfuser.model_executor.cache.policies.interval import IntervalPolicy
from xfuser.model_executor.cache.policies.tea import TeaPolicy

POLICIES: dict[str | None, type[Policy]] = {
    None: FullPolicy,
    "Fast": FastPolicy,
    "Tea": TeaPolicy,
    "Fb": FirstBlockPolicy,
    "Interval": IntervalPolicy,
}

__all__ = ["POLICIES", "Policy", "build_policy"]


def build_policy(config: CacheConfig, spec: ModelSpec, blocks: int, calibration: Calibration | None = None) -> Policy:
    """The policy that the settings name.

    Raises:
        ValueError: No method of that name.
    """
    if config.use_cache not in POLICIES:
        known = ", ".join(repr(name) for name in POLICIES)
        raise ValueError(f"use_cache={config.use_cache!r} is not known; choose one of {known}")
    return POLICIES[config.use_cache](config, spec, blocks, calibration)
