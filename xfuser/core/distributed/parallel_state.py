"""The one mesh of this process, for xDiT's functions that ask for a rank or a degree without being handed one.

The engine itself hands a `ParallelMesh` on; this module is for scripts that were written for xDiT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from xfuser.config.parallel import ParallelConfig
from xfuser.core.distributed.environment import choose_device, join_processes, leave_processes, local_rank
from xfuser.core.distributed.mesh import ParallelMesh


@dataclass
class _Process:
    device: torch.device | None = None
    mesh: ParallelMesh | None = None


_process = _Process()


@dataclass(frozen=True)
class WorldGroup:
    """All processes of the job, as seen by this one."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def rank_in_group(self) -> int:
        return self.rank

    @property
    def ranks(self) -> list[int]:
        return list(range(self.world_size))

    @property
    def first_rank(self) -> int:
        return 0

    @property
    def last_rank(self) -> int:
        return self.world_size - 1

    @property
    def is_first_rank(self) -> bool:
        return self.rank == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.world_size - 1

    def barrier(self) -> None:
        """Wait for all processes."""
        if dist.is_initialized():
            dist.barrier()


# -- starting and ending ----------------------------------------------------------------------------------------------


def init_distributed_environment(world_size: int = -1, rank: int = -1) -> None:
    """Meet the job's other processes, once.

    Args:
        world_size: What the caller takes for the number of processes; -1 leaves it to the launcher.
        rank: What the caller takes for this process's rank; -1 leaves it to the launcher.

    Raises:
        ValueError: The launcher, or who has made the process group, says otherwise.
    """
    if _process.device is None:
        device = choose_device()
        join_processes(device)
        _process.device = device
    group = get_world_group()
    for name, given, true in (("world_size", world_size, group.world_size), ("rank", rank, group.rank)):
        if given not in (-1, true):
            raise ValueError(f"{name}={given}: this process was started with {name} {true}; leave {name} out")


def initialize_model_parallel(
    data_parallel_degree: int = 1,
    classifier_free_guidance_degree: int = 1,
    sequence_parallel_degree: int | None = None,
    ulysses_degree: int = 1,
    ring_degree: int = 1,
    tensor_parallel_degree: int = 1,
    pipeline_parallel_degree: int = 1,
) -> None:
    """Place this process among all, once. Collective.

    Raises:
        ValueError: The degrees contradict each other, are not supported, or do not fit the number of processes.
    """
    if tensor_parallel_degree != 1:
        raise ValueError(f"tensor_parallel_degree={tensor_parallel_degree} is not supported; use ulysses_degree")
    if classifier_free_guidance_degree not in (1, 2):
        raise ValueError(f"classifier_free_guidance_degree={classifier_free_guidance_degree}: choose 1 or 2")
    if sequence_parallel_degree not in (None, ulysses_degree * ring_degree):
        raise ValueError(
            f"sequence_parallel_degree={sequence_parallel_degree} is not ulysses_degree {ulysses_degree} x "
            f"ring_degree {ring_degree}; leave it out"
        )
    start(
        ParallelConfig(
            data_parallel_degree=data_parallel_degree,
            use_cfg_parallel=classifier_free_guidance_degree == 2,
            pipefusion_parallel_degree=pipeline_parallel_degree,
            ring_degree=ring_degree,
            ulysses_degree=ulysses_degree,
        )
    )


def start(config: ParallelConfig) -> ParallelMesh:
    """Meet the other processes and place this one among them; again with the same settings, nothing happens.

    Raises:
        ValueError: The number of processes is not the product of the degrees, or other degrees are in force.
    """
    known = _process.mesh
    if known is not None:
        if known.config != config:
            raise ValueError(
                f"this process is placed among {known.config.shape} already (data, cfg, pipefusion, ring, ulysses), or "
                "with other settings; call get_runtime_state().destroy_distributed_env() first"
            )
        return known
    init_distributed_environment()
    assert _process.device is not None
    _process.mesh = ParallelMesh(config, _process.device)
    return _process.mesh


def destroy_distributed_environment() -> None:
    """Part from the other processes. A new start is possible."""
    _process.mesh = _process.device = None
    leave_processes()


def model_parallel_is_initialized() -> bool:
    """Whether this process is placed among all."""
    return _process.mesh is not None


# -- asking -----------------------------------------------------------------------------------------------------------


def current_mesh() -> ParallelMesh:
    """The mesh of this process.

    Raises:
        RuntimeError: There is none yet.
    """
    if _process.mesh is None:
        raise RuntimeError("this process has no degrees yet; call xFuserArgs.create_config() first")
    return _process.mesh


def get_world_group() -> WorldGroup:
    """All processes of the job.

    Raises:
        RuntimeError: They have not met yet.
    """
    if _process.device is None:
        raise RuntimeError("the processes have not met yet; call xFuserArgs.create_config() first")
    joined = dist.is_initialized()
    return WorldGroup(
        dist.get_rank() if joined else 0, dist.get_world_size() if joined else 1, local_rank(), _process.device
    )


def get_data_parallel_world_size() -> int:
    return current_mesh().degree("data")


def get_data_parallel_rank() -> int:
    return current_mesh().rank("data")


def get_classifier_free_guidance_world_size() -> int:
    return current_mesh().degree("cfg")


def get_classifier_free_guidance_rank() -> int:
    return current_mesh().rank("cfg")


def get_pipeline_parallel_world_size() -> int:
    """PipeFusion's stages."""
    return current_mesh().degree("pipefusion")


def get_pipeline_parallel_rank() -> int:
    """This process's stage."""
    return current_mesh().rank("pipefusion")


def is_pipeline_first_stage() -> bool:
    return get_pipeline_parallel_rank() == 0


def is_pipeline_last_stage() -> bool:
    return get_pipeline_parallel_rank() == get_pipeline_parallel_world_size() - 1


def get_sequence_parallel_world_size() -> int:
    """Ranks that share the tokens of a stage: ring x ulysses."""
    return current_mesh().config.sequence_degree


def get_sequence_parallel_rank() -> int:
    return current_mesh().sequence_rank


def get_ulysses_parallel_world_size() -> int:
    return current_mesh().degree("ulysses")


def get_ulysses_parallel_rank() -> int:
    return current_mesh().rank("ulysses")


def get_ring_parallel_world_size() -> int:
    return current_mesh().degree("ring")


def get_ring_parallel_rank() -> int:
    return current_mesh().rank("ring")


def get_tensor_model_parallel_world_size() -> int:
    """Always 1: there is no tensor parallelism."""
    current_mesh()
    return 1


def get_dit_world_size() -> int:
    """All processes: each of them runs the transformer."""
    return current_mesh().config.world_size


def is_dp_last_group() -> bool:
    """Whether this process is the last of those that share an image: the one that saves it in xDiT's scripts."""
    return (
        get_sequence_parallel_rank() == get_sequence_parallel_world_size() - 1
        and get_classifier_free_guidance_rank() == get_classifier_free_guidance_world_size() - 1
        and is_pipeline_last_stage()
    )
