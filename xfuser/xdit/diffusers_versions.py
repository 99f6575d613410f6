"""The versions of diffusers that models need, as xDiT's examples ask for them."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

MINIMUM = "0.35.0"  # what this package requires
# Models that are not carried over: their scripts ask before they import the pipeline from diffusers.
_LATER = dict.fromkeys(("flux2", "hunyuanvideo_15", "zimage"), "0.36.0")


def get_minimum_diffusers_version(model_name: str | None = None) -> str:
    """Return the lowest version of diffusers that a model runs with; without a name, or for others, this package's."""
    return _LATER.get(model_name or "", MINIMUM)


def has_valid_diffusers_version(model_name: str | None = None) -> bool:
    """Tell whether the installed diffusers is new enough for a model; a release candidate counts as its release."""
    return Version(version("diffusers")).release >= Version(get_minimum_diffusers_version(model_name)).release
