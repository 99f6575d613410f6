"""What the per-model import paths share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from xfuser.model_executor.adapters import declaration_of
from xfuser.model_executor.cache.apply import apply_cache_on_transformer
from xfuser.model_executor.cache.engine import CacheEngine


def apply_for(transformer_class: str) -> Callable[..., CacheEngine]:
    """`apply_cache_on_transformer`, refusing transformers of another family with a TypeError."""

    def apply(transformer: nn.Module, use_cache: str | None = None, **settings: Any) -> CacheEngine:
        found = declaration_of(transformer).transformer_class
        if found != transformer_class:
            raise TypeError(f"this path is for {transformer_class}, got {found}; import from its own module")
        return apply_cache_on_transformer(transformer, use_cache, **settings)

    apply.__name__ = "apply_cache_on_transformer"
    apply.__doc__ = apply_cache_on_transformer.__doc__
    return apply
