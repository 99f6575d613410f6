"""AdaCorrection on the trajectory: learned correction of the latent, once a step, at the denoiser's output."""

from xfuser.lazy import lazy_attributes

__all__ = ["TrajectoryConfig", "TrajectoryEngine", "attach_trajectory"]

_ROOM = "xfuser.model_executor.cache.adacorrection.trajectory"
__getattr__ = lazy_attributes(
    __name__,
    {
        "TrajectoryConfig": "xfuser.config.trajectory",
        "TrajectoryEngine": f"{_ROOM}.engine",
        "attach_trajectory": f"{_ROOM}.engine",
    },
)
