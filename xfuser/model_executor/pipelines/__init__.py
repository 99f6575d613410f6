"""Loading diffusers pipelines and running them."""

from xfuser.model_executor.pipelines.loading import MODEL_TYPES, LoadedPipeline, load_pipeline

__all__ = ["MODEL_TYPES", "LoadedPipeline", "load_pipeline"]
