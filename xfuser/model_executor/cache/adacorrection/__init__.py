"""AdaCorrection (arXiv 2602.13357): measure drift and error per layer and step, and correct where it is needed."""

from __future__ import annotations

from collections.abc import Callable

from xfuser.config import CacheConfig
from xfuser.model_executor.cache.adacorrection.blending import BlendReviewer
from xfuser.model_executor.cache.adacorrection.bound import BoundReviewer
from xfuser.model_executor.cache.adacorrection.budget import BudgetReviewer
from xfuser.model_executor.cache.adacorrection.gate import GateReviewer
from xfuser.model_executor.cache.approximation import Extrapolation
from xfuser.model_executor.cache.review import Reviewer

REVIEWERS: dict[str, Callable[[CacheConfig, Extrapolation], Reviewer]] = {
    "blend": BlendReviewer,
    "bound": BoundReviewer,
    "budget": BudgetReviewer,
    "gate": GateReviewer,
}


def build_reviewer(config: CacheConfig, approximation: Extrapolation) -> Reviewer:
    """The reviewer that the settings name: none, or one of AdaCorrection's modes."""
    return Reviewer() if config.mode is None else REVIEWERS[config.mode](config, approximation)
