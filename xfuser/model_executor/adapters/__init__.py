"""The models that the engine knows, one declaration each."""

from __future__ import annotations

from typing import Any

from torch import nn

from xfuser.core.modules import uncompiled
from xfuser.model_executor.adapters import dit, flux, pixart, sd3
from xfuser.model_executor.adapters.declaration import BoundArguments, KnownModel, ModelDeclaration, Streams

DECLARATIONS = {module.DECLARATION.transformer_class: module.DECLARATION for module in (dit, flux, pixart, sd3)}

__all__ = ["DECLARATIONS", "BoundArguments", "KnownModel", "ModelDeclaration", "Streams", "declaration_of"]


def declaration_of(transformer: Any) -> ModelDeclaration:
    """The declaration of a transformer, found through its class and the classes it derives from.

    Raises:
        TypeError: It is no module, or no declaration covers its class.
    """
    transformer = uncompiled(transformer)
    supported = ", ".join(sorted(DECLARATIONS))
    if isinstance(transformer, nn.Module):
        for ancestor in type(transformer).__mro__:
            if ancestor.__name__ in DECLARATIONS:
                return DECLARATIONS[ancestor.__name__]
    raise TypeError(
        f"cannot cache a {type(transformer).__name__}; pass pipeline.transformer (not pipeline.unet.transformer) "
        f"of a supported class: {supported}"
    )
