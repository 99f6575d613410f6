"""Published models by name: what is loaded, and the steps, guidance and sizes that their authors recommend.

None of them was run here on its weights. Thresholds and TeaCache's polynomial are the family's; ``thresholds`` says
what of them somebody has published for this model. An explicit flag or argument goes before all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from xfuser.model_executor.adapters import TYPES, ModelType

_FAST_ONLY = "Fast .05 (FastCache's default); the others are the family's defaults, the polynomial is the identity"
_COMMON = "Fast .05 (FastCache's default) and Fb .05 (diffusers' default); for Tea .05 and the identity stand in"


@dataclass(frozen=True)
class Preset:
    """One published model.

    Attributes:
        kind: What the command lines know of it.
        numbers: Where steps, guidance and size come from.
        thresholds: Which of its thresholds are published, and which stand in.
    """

    kind: ModelType
    numbers: str
    thresholds: str


def _kind(model_type: str, hub_id: str | None, steps: int, guidance_scale: float, **settings: Any) -> ModelType:
    return replace(
        TYPES[model_type],
        default=hub_id,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        toy=None,
        preset=True,
        **settings,
    )


def _square(side: int, **others: Any) -> dict[str, Any]:
    return {"height": side, "width": side} | others


def _unpublished(title: str) -> str:
    return (
        f"the authors of DiT publish weights of XL/2 only, and none of {title}; name the folder of a DiTPipeline with "
        "--model"
    )


PRESETS: dict[str, Preset] = {
    "dit-b-2": Preset(
        _kind("dit", None, 50, 1.5, unpublished=_unpublished("B/2")),
        "AdaCorrection's 50 steps (arXiv 2602.13357); DiT's guidance (arXiv 2212.09748)",
        _FAST_ONLY,
    ),
    "dit-l-2": Preset(
        _kind("dit", None, 50, 1.5, unpublished=_unpublished("L/2")),
        "AdaCorrection's 50 steps (arXiv 2602.13357); DiT's guidance (arXiv 2212.09748)",
        _FAST_ONLY,
    ),
    "dit-xl-2": Preset(
        _kind("dit", "facebook/DiT-XL-2-256", 50, 1.5),
        "AdaCorrection's 50 steps (arXiv 2602.13357); DiT's guidance (arXiv 2212.09748)",
        _FAST_ONLY,
    ),
    "pixart-alpha": Preset(
        _kind("pixart", "PixArt-alpha/PixArt-XL-2-1024-MS", 20, 4.5, call_arguments=_square(1024)),
        "the defaults of diffusers' pipeline",
        _FAST_ONLY,
    ),
    "pixart-sigma": Preset(
        _kind("pixart", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 20, 4.5, call_arguments=_square(1024)),
        "the defaults of diffusers' pipeline",
        _FAST_ONLY,
    ),
    "sd-1.5": Preset(
        _kind("sd", "stable-diffusion-v1-5/stable-diffusion-v1-5", 50, 7.5, call_arguments=_square(512)),
        "the defaults of diffusers' pipeline",
        _COMMON,
    ),
    "sd-3.5": Preset(
        _kind("sd3", "stabilityai/stable-diffusion-3.5-large", 28, 3.5, call_arguments=_square(1024)),
        "the model's card",
        _FAST_ONLY,
    ),
    "flux-dev": Preset(
        _kind(
            "flux",
            "black-forest-labs/FLUX.1-dev",
            50,
            3.5,
            call_arguments=_square(1024, max_sequence_length=512),
        ),
        "the model's card",
        "Tea .4 with its polynomial (arXiv 2411.19108: 1.8 times faster; .25, .6 and .8 are published too), Fb .08 and "
        "Fast .05",
    ),
    "flux-schnell": Preset(
        _kind(
            "flux",
            "black-forest-labs/FLUX.1-schnell",
            4,
            0.0,
            call_arguments=_square(1024, max_sequence_length=256),
        ),
        "the model's card",
        "none published: FLUX.1-dev's stand in, whose polynomial was fitted to many steps; of 4 steps TeaCache "
        "computes two anyhow",
    ),
    "wan-2.1": Preset(
        _kind(
            "wan",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            50,
            5.0,
            call_arguments={"height": 480, "width": 832, "num_frames": 81},
        ),
        "the defaults of diffusers' pipeline",
        "TeaCache's polynomial and thresholds for Wan belong to the change of the time embedding, and "
        f"what is compared here is the first block's modulated input. {_COMMON}",
    ),
}
