"""Loading diffusers pipelines and running them."""

from xfuser.model_executor.pipelines.loading import MODEL_TYPES, LoadedPipeline, load_pipeline
from xfuser.names import looked_up

__all__ = ["MODEL_TYPES", "LoadedPipeline", "load_pipeline"]

_XDIT = tuple(f"xFuser{name}Pipeline" for name in ("Flux", "PixArtAlpha", "PixArtSigma", "StableDiffusion3"))

# Looked up on first use: they import what starts processes.
__getattr__ = looked_up(__name__, dict.fromkeys(_XDIT, "xfuser.model_executor.pipelines.upstream"))
