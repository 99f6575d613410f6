"""`apply_cache_on_transformer` as xDiT and the FastCache authors have it: it returns the transformer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from xfuser.config import CacheConfig
from xfuser.model_executor.adapters import spec_of
from xfuser.model_executor.cache.apply import replace_cache_on_transformer

logger = logging.getLogger(__name__)

# Scripts give these to every method, and the authors' function reads them for FastCache alone.
_FAST_ONLY = ("motion_threshold", "significance", "enable_enhanced_linear_approx")
_CORRECTION = ("adacorr_gamma", "adacorr_lambda")
_TOKEN_MERGING = ("token_merge_k", "token_merge_lambda", "num_stages", "merge_ratio")


def apply_cache_on_transformer(transformer: nn.Module, use_cache: str | None = "Fb", **settings: Any) -> nn.Module:
    """Attach a cache to a transformer in place of the one that it has, and return the transformer.

    The engine is had by `xfuser.cache_engine_of`. A setting of FastCache beside another method, or of AdaCorrection
    while it is off, is named in a logged line and ignored.

    Args:
        transformer: A supported diffusers transformer.
        use_cache: The base method: ``"Fb"``, ``"Tea"``, ``"Fast"``, ``"Interval"`` or ``None``.
        **settings: The other fields of `CacheConfig`; ``significance_level``, ``enable_enhanced_linear_approx`` and,
            switched off, ``enable_token_merge`` are taken as FastCache's authors spell them.

    Raises:
        TypeError: Unknown setting, or a transformer that is not supported.
        ValueError: A value out of its range. Whatever is attached stays attached then.
    """
    settings = _translated(use_cache, settings)
    replace_cache_on_transformer(transformer, CacheConfig.from_keywords(use_cache=use_cache, **settings))
    return transformer


def _translated(use_cache: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The authors' settings as this engine's."""
    settings = dict(settings)
    if settings.pop("enable_token_merge", False):
        raise ValueError("enable_token_merge is not carried over; leave it out, and use motion_threshold with 'Fast'")
    for name in _TOKEN_MERGING:
        settings.pop(name, None)
    if "significance_level" in settings:
        settings["significance"] = settings.pop("significance_level")
    unread = [] if use_cache == "Fast" else [name for name in _FAST_ONLY if settings.pop(name, None)]
    if not settings.get("enable_adacorrection"):
        unread += [name for name in _CORRECTION if settings.pop(name, 1.0) != 1.0]
    if unread:
        logger.warning("ignored, since nothing reads it with use_cache=%r: %s", use_cache, ", ".join(unread))
    # FastCache's linear maps are always fitted here.
    settings.pop("enable_enhanced_linear_approx", None)
    return settings


def apply_for(transformer_class: str) -> Callable[..., nn.Module]:
    """`apply_cache_on_transformer` under one family's path. Another family is told so, and served all the same: the
    authors' benchmark takes FLUX's path for every model.
    """

    def apply(transformer: nn.Module, use_cache: str | None = "Fb", **settings: Any) -> nn.Module:
        found = spec_of(transformer).transformer_class
        if found != transformer_class:
            logger.warning("imported from the path of %s, and attached to a %s", transformer_class, found)
        return apply_cache_on_transformer(transformer, use_cache, **settings)

    apply.__name__ = apply.__qualname__ = "apply_cache_on_transformer"
    apply.__doc__ = apply_cache_on_transformer.__doc__
    return apply
