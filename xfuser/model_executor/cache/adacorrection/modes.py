"""AdaCorrection's modes at the block level, by their names in ``adacorr_mode``."""

from __future__ import annotations

from collections.abc import Callable

from xfuser.config import CacheConfig
from xfuser.model_executor.cache.adacorrection.base import Corrector
from xfuser.model_executor.cache.adacorrection.budget import BudgetCorrector
from xfuser.model_executor.cache.adacorrection.published.blend import BlendCorrector
from xfuser.model_executor.cache.adacorrection.published.bound import BoundCorrector
from xfuser.model_executor.cache.adacorrection.published.gate import GateCorrector
from xfuser.model_executor.cache.approximation import Extrapolation

MODES: dict[str, Callable[[CacheConfig, Extrapolation], Corrector]] = {
    "blend": BlendCorrector,
    "bound": BoundCorrector,
    "budget": BudgetCorrector,
    "gate": GateCorrector,
}


def build_corrector(config: CacheConfig, approximation: Extrapolation) -> Corrector:
    """Build what the settings name: one of AdaCorrection's modes, or what takes proposals as they are."""
    return Corrector() if config.mode is None else MODES[config.mode](config, approximation)
