"""AdaCorrection (arXiv 2602.13357): measure drift and error per layer and step, and correct where it is needed."""

from __future__ import annotations

from xfuser.config import CacheConfig
from xfuser.model_executor.cache.adacorrection.blending import BlendReviewer
from xfuser.model_executor.cache.policies import Policy
from xfuser.model_executor.cache.review import Reviewer


def build_reviewer(config: CacheConfig, policy: Policy) -> Reviewer:
    """The reviewer that the settings name: none, or one of AdaCorrection's modes."""
    if config.mode == "blend":
        return BlendReviewer(config)
    return Reviewer()
