"""The base methods, one file each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from xfuser.config.methods import METHODS, policy_class
from xfuser.model_executor.cache.policies.base import Policy
from xfuser.model_executor.cache.policies.full import FullPolicy

if TYPE_CHECKING:
    from torch import nn

    from xfuser.config import CacheConfig
    from xfuser.model_executor.adapters import ModelSpec
    from xfuser.model_executor.cache.calibration.store import Calibration

POLICIES: dict[str | None, type[Policy]] = {None: FullPolicy, **{name: policy_class(name) for name in METHODS}}

__all__ = ["POLICIES", "Policy", "build_policy", "with_threshold"]


def build_policy(config: CacheConfig, spec: ModelSpec, blocks: int, calibration: Calibration | None = None) -> Policy:
    """Make the policy that the settings name."""
    return POLICIES[config.use_cache](config, spec, blocks, calibration)


def with_threshold(config: CacheConfig, spec: ModelSpec, transformer: nn.Module) -> CacheConfig:
    """Take the base method's default threshold for this transformer where the settings name none."""
    if config.rel_l1_thresh is not None:
        return config
    own = spec.threshold(config.use_cache, transformer)
    return replace(config, rel_l1_thresh=POLICIES[config.use_cache].common_threshold if own is None else own)
