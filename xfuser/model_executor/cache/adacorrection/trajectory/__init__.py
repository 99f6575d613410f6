"""AdaCorrection on the trajectory: learned correction of the latent, once a step, at the denoiser's output."""

from xfuser.names import looked_up

__all__ = ["TrajectoryConfig", "TrajectoryEngine", "attach_trajectory"]

_ROOM = "xfuser.model_executor.cache.adacorrection.trajectory"
__getattr__ = looked_up(
    __name__,
    {
        "TrajectoryConfig": f"{_ROOM}.settings",
        "TrajectoryEngine": f"{_ROOM}.engine",
        "attach_trajectory": f"{_ROOM}.engine",
    },
)
