"""The base methods, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xfuser.config.methods import METHODS, policy_class
from xfuser.model_executor.cache.policies.base import Policy
from xfuser.model_executor.cache.policies.full import FullPolicy

if TYPE_CHECKING:
    from xfuser.config import CacheConfig
    from xfuser.model_executor.adapters import ModelSpec
    from xfuser.model_executor.cache.calibration import Calibration

POLICIES: dict[str | None, type[Policy]] = {None: FullPolicy, **{name: policy_class(name) for name in METHODS}}

__all__ = ["POLICIES", "Policy", "build_policy"]


def build_policy(
    config: CacheConfig, spec: ModelSpec, blocks: int, calibration: Calibration | None = None
) -> Policy:
    """Make the policy that the settings name."""
    return POLICIES[config.use_cache](config, spec, blocks, calibration)
