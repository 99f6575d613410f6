"""The model families that the engine knows, one file each. Needs no torch until a model is at hand."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xfuser.model_executor.adapters.arguments import BoundArguments
from xfuser.model_executor.adapters.family import Family, ModelType, SmallPipeline
from xfuser.model_executor.adapters.spec import BlockGroup, KnownModel, ModelSpec, TokenArgument

if TYPE_CHECKING:
    import torch

Streams = tuple["torch.Tensor", ...]

FAMILIES: tuple[Family, ...] = tuple(
    importlib.import_module(f"{__name__}.{name}").FAMILY
    for name in (
        "dit",
        "flux",
        "pixart",
        "sd3",
        "hunyuan_dit",
        "auraflow",
        "wan",
        "unet",
    )
)
SPECS: dict[str, ModelSpec] = {family.spec.transformer_class: family.spec for family in FAMILIES}
TYPES: dict[str, ModelType] = {name: kind for family in FAMILIES for name, kind in family.types.items()}
SMALL: dict[str, SmallPipeline] = {name: small for family in FAMILIES for name, small in family.small.items()}

__all__ = [
    "FAMILIES",
    "SMALL",
    "SPECS",
    "TYPES",
    "BlockGroup",
    "BoundArguments",
    "Family",
    "KnownModel",
    "ModelSpec",
    "ModelType",
    "SmallPipeline",
    "Streams",
    "TokenArgument",
    "denoisers_of",
    "spec_of",
]


def spec_of(transformer: Any) -> ModelSpec:
    """The spec of a denoiser, found through its class and the classes it derives from.

    Raises:
        TypeError: It is no module, or no spec covers its class.
    """
    from torch import nn

    from xfuser.core.modules import uncompiled

    transformer = uncompiled(transformer)
    supported = ", ".join(sorted(SPECS))
    if isinstance(transformer, nn.Module):
        for ancestor in type(transformer).__mro__:
            if ancestor.__name__ in SPECS:
                return SPECS[ancestor.__name__]
    raise TypeError(
        f"cannot cache a {type(transformer).__name__}; pass pipeline.transformer (not pipeline.unet.transformer) "
        f"of a supported class: {supported}"
    )


def denoisers_of(pipeline: Any) -> list[Any]:
    """The denoisers of a pipeline, in the order in which they are used: one, or several of a family.

    Raises:
        TypeError: It has none, or one that no spec covers.
    """
    names = dict.fromkeys(name for spec in SPECS.values() for name in spec.components)
    found = {name: part for name in names if (part := getattr(pipeline, name, None)) is not None}
    if not found:
        raise TypeError(f"{type(pipeline).__name__} has no {', '.join(names)}; this needs a pipeline with one of them")
    spec = spec_of(next(iter(found.values())))
    return [found[name] for name in spec.components if name in found]
