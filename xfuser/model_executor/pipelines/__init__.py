"""Loading diffusers pipelines and running them."""

from xfuser.lazy import lazy_attributes

__all__ = ["MODEL_TYPES", "LoadedPipeline", "load_pipeline"]

_LOADING = dict.fromkeys(("LoadedPipeline", "load_pipeline"), "xfuser.model_executor.pipelines.loading")
_LOADING["MODEL_TYPES"] = "xfuser.model_executor.pipelines.model_types"
_XDIT = tuple(
    f"xFuser{name}Pipeline" for name in ("Flux", "HunyuanDiT", "PixArtAlpha", "PixArtSigma", "StableDiffusion3")
)

# Looked up on first use: they import torch and diffusers, which takes seconds.
__getattr__ = lazy_attributes(__name__, _LOADING | dict.fromkeys(_XDIT, "xfuser.xdit.pipelines"))
