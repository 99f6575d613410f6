"""Ray: pipelines whose processes it starts instead of torchrun, and batch generation over a cluster."""

from xfuser.lazy import lazy_attributes

_PUBLIC = {"ImageGenerator": "xfuser.ray.generator"}

__all__ = [*_PUBLIC]

# Looked up on first use: these modules import torch and Ray.
__getattr__ = lazy_attributes(__name__, _PUBLIC)
