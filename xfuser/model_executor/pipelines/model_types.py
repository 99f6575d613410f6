"""The models that the command lines know: the families' types, and published models by name. Needs neither torch nor
diffusers until one is loaded.
"""

from __future__ import annotations

from pathlib import Path

from xfuser.model_executor.adapters import TYPES, ModelType
from xfuser.model_executor.adapters.family import shipped
from xfuser.model_executor.pipelines.presets import PRESETS

__all__ = ["DEFAULT_MODEL_TYPE", "MODEL_TYPES", "SHORT_NAMES", "ModelType", "shipped_tiny_dit", "shipped_tiny_flux"]

DEFAULT_MODEL_TYPE = "tiny-dit"
MODEL_TYPES: dict[str, ModelType] = TYPES | {name: preset.kind for name, preset in PRESETS.items()}

# Names under which xDiT's own command knows models of these families.
SHORT_NAMES = {
    "FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
    "FLUX.1-schnell": "black-forest-labs/FLUX.1-schnell",
    "SD3.5": "stabilityai/stable-diffusion-3.5-large",
    "stable-diffusion-3.5-large": "stabilityai/stable-diffusion-3.5-large",
}


def shipped_tiny_dit() -> Path:
    """The folder of the tiny-dit that comes with the package."""
    return shipped("tiny-dit")


def shipped_tiny_flux() -> Path:
    """The folder of the tiny-flux that comes with the package, where it does."""
    return shipped("tiny-flux")
