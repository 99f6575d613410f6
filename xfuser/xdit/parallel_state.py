"""The one mesh of this process, for xDiT's functions that ask for a rank or a degree without being handed one.

The engine itself hands a `ParallelMesh` on; this module is for scripts that were written for xDiT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from xfuser.config.parallel import ParallelConfig
from xfuser.core.distributed.agreement import Agreement
from xfuser.core.distributed.environment import (
    Meeting,
    check_backend,
    choose_device,
    join_processes,
    launched,
    leave_processes,
    numbered,
)
from xfuser.core.distributed.environment import local_rank as local_rank_of_launcher
from xfuser.core.distributed.groups import Group, SequenceGroup, WeakGroup
from xfuser.core.distributed.mesh import ParallelMesh


@dataclass
class _Process:
    device: torch.device | None = None
    local_rank: int = 0
    mesh: ParallelMesh | None = None


_process = _Process()


# -- starting and ending ----------------------------------------------------------------------------------------------


def init_distributed_environment(
    world_size: int = -1,
    rank: int = -1,
    distributed_init_method: str = "env://",
    local_rank: int = -1,
    backend: str | None = None,
) -> None:
    """Meet the job's other processes, once.

    Args:
        world_size: Number of processes; -1 leaves it to the launcher.
        rank: This process's rank; -1 leaves it to the launcher.
        distributed_init_method: Where processes meet that no launcher has started: a URL that torch knows.
        local_rank: This process's number on its machine; -1 leaves it to the launcher, and without one to the rank.
        backend: torch's name of what carries the tensors; by default what this device needs.

    Raises:
        ValueError: The launcher, or who has made the process group, says otherwise, or the backend does not fit.
    """
    device = choose_device() if _process.device is None else _process.device
    check_backend(backend, device)
    joins = _process.device is None
    if joins:
        by_hand = not launched() and world_size > 1 and rank >= 0
        place = local_rank if local_rank >= 0 else rank if by_hand else local_rank_of_launcher()
        device = numbered(device, place)
        join_processes(device, meeting=Meeting(distributed_init_method, rank, world_size) if by_hand else None)
        _process.device, _process.local_rank = device, place
    group = get_world_group()
    true = {"world_size": group.world_size, "rank": group.rank, "local_rank": group.local_rank}

    def check() -> None:
        for name, given in (("world_size", world_size), ("rank", rank), ("local_rank", local_rank)):
            if given not in (-1, true[name]):
                raise ValueError(f"{name}={given}: this process was started with {name} {true[name]}; leave {name} out")

    # Where processes meet, what one of them has wrong is everybody's; later calls are its own.
    Agreement(dist.group.WORLD if joins and dist.is_initialized() else None).attempt(check)


def initialize_model_parallel(
    data_parallel_degree: int = 1,
    classifier_free_guidance_degree: int = 1,
    sequence_parallel_degree: int | None = None,
    ulysses_degree: int = 1,
    ring_degree: int = 1,
    tensor_parallel_degree: int = 1,
    pipeline_parallel_degree: int = 1,
    vae_parallel_size: int = 0,
    backend: str | None = None,
) -> None:
    """Place this process among all, once; with the same degrees again, nothing happens. Collective.

    Args:
        data_parallel_degree: Groups of processes that generate different images.
        classifier_free_guidance_degree: 2 evaluates the two branches of guidance on different ranks.
        sequence_parallel_degree: ulysses_degree x ring_degree; it may be left out.
        ulysses_degree: Ranks that exchange tokens for heads.
        ring_degree: Ranks that pass keys and values round.
        tensor_parallel_degree: Always 1.
        pipeline_parallel_degree: PipeFusion's stages.
        vae_parallel_size: Always 0: the ranks that share an image decode it.
        backend: torch's name of what carries the tensors; by default what this device needs.

    Raises:
        ValueError: The degrees contradict each other, are not supported, or do not fit the number of processes, or
            the backend does not fit the device.
    """
    init_distributed_environment(backend=backend)
    if vae_parallel_size != 0:
        raise ValueError(
            f"vae_parallel_size={vae_parallel_size} is not supported: the ranks that share an image decode it; use "
            "--use_parallel_vae"
        )
    if tensor_parallel_degree != 1:
        raise ValueError(f"tensor_parallel_degree={tensor_parallel_degree} is not supported; use ulysses_degree")
    if classifier_free_guidance_degree not in (1, 2):
        raise ValueError(f"classifier_free_guidance_degree={classifier_free_guidance_degree}: choose 1 or 2")
    if sequence_parallel_degree not in (None, ulysses_degree * ring_degree):
        raise ValueError(
            f"sequence_parallel_degree={sequence_parallel_degree} is not ulysses_degree {ulysses_degree} x "
            f"ring_degree {ring_degree}; leave it out"
        )
    config = ParallelConfig(
        data_parallel_degree=data_parallel_degree,
        use_cfg_parallel=classifier_free_guidance_degree == 2,
        pipefusion_parallel_degree=pipeline_parallel_degree,
        ring_degree=ring_degree,
        ulysses_degree=ulysses_degree,
    )
    # Scripts name the degrees after create_config() once more; its other settings stay in force.
    if _process.mesh is None or _process.mesh.config.shape != config.shape:
        start(config)


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


def destroy_model_parallel() -> None:
    """Forget this process's place among all; the processes stay together. Other degrees are possible then."""
    _process.mesh = None


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


def get_world_group() -> Group:
    """All processes of the job.

    Raises:
        RuntimeError: They have not met yet.
    """
    if _process.device is None:
        raise RuntimeError("the processes have not met yet; call xFuserArgs.create_config() first")
    return Group(*_group(dist.group.WORLD if dist.is_initialized() else None))


def get_dit_group() -> dist.ProcessGroup | None:
    """torch's group of all processes, each of which runs the transformer; ``None`` where one is alone."""
    current_mesh()
    return dist.group.WORLD if dist.is_initialized() else None


def get_dp_group() -> Group:
    """The ranks at this one's place in every data-parallel group."""
    return Group(*_group(current_mesh().group("data")))


def get_cfg_group() -> Group:
    """The ranks that evaluate the branches of guidance for the same tokens."""
    return Group(*_group(current_mesh().group("cfg")))


def get_pp_group() -> Group:
    """PipeFusion's stages that this process works with."""
    return Group(*_group(current_mesh().group("pipefusion")))


def get_sp_group() -> SequenceGroup:
    """The ranks that share this process's tokens: ring x ulysses."""
    mesh = current_mesh()
    return SequenceGroup(
        *_group(mesh.sequence),
        ulysses=WeakGroup(mesh.group("ulysses")),
        ring=WeakGroup(mesh.group("ring")),
        ulysses_rank=mesh.rank("ulysses"),
        ulysses_world_size=mesh.degree("ulysses"),
        ring_rank=mesh.rank("ring"),
        ring_world_size=mesh.degree("ring"),
    )


def _group(
    members: dist.ProcessGroup | None,
) -> tuple[tuple[int, ...], int, int, torch.device, WeakGroup]:
    """What a `Group` consists of."""
    assert _process.device is not None
    ranks = (0,) if members is None else tuple(dist.get_process_group_ranks(members))
    rank = 0 if members is None else dist.get_rank()
    return ranks, rank, _process.local_rank, _process.device, WeakGroup(members)


def _asks(question: Callable[[ParallelMesh], int | bool]) -> Callable[[], Any]:
    """Return a function without arguments that asks this process's mesh (RuntimeError where there is none)."""
    return lambda: question(current_mesh())


# PipeFusion's stages are xDiT's pipeline; the ranks that share a stage's tokens (ring x ulysses) its sequence group.
get_data_parallel_world_size = _asks(lambda mesh: mesh.degree("data"))
get_data_parallel_rank = _asks(lambda mesh: mesh.rank("data"))
get_classifier_free_guidance_world_size = _asks(lambda mesh: mesh.degree("cfg"))
get_classifier_free_guidance_rank = _asks(lambda mesh: mesh.rank("cfg"))
get_pipeline_parallel_world_size = _asks(lambda mesh: mesh.degree("pipefusion"))
get_pipeline_parallel_rank = _asks(lambda mesh: mesh.rank("pipefusion"))
is_pipeline_first_stage = _asks(lambda mesh: mesh.rank("pipefusion") == 0)
is_pipeline_last_stage = _asks(lambda mesh: mesh.rank("pipefusion") == mesh.degree("pipefusion") - 1)
get_sequence_parallel_world_size = _asks(lambda mesh: mesh.config.sequence_degree)
get_sequence_parallel_rank = _asks(lambda mesh: mesh.sequence_rank)
get_ulysses_parallel_world_size = _asks(lambda mesh: mesh.degree("ulysses"))
get_ulysses_parallel_rank = _asks(lambda mesh: mesh.rank("ulysses"))
get_ring_parallel_world_size = _asks(lambda mesh: mesh.degree("ring"))
get_ring_parallel_rank = _asks(lambda mesh: mesh.rank("ring"))
get_tensor_model_parallel_world_size = _asks(lambda mesh: 1)  # there is no tensor parallelism
get_tensor_model_parallel_rank = _asks(lambda mesh: 0)
get_dit_world_size = _asks(lambda mesh: mesh.config.world_size)  # each of them runs the transformer


def is_dp_last_group() -> bool:
    """Whether this process is the last of those that share an image: the one that saves it in xDiT's scripts."""
    return (
        get_sequence_parallel_rank() == get_sequence_parallel_world_size() - 1
        and get_classifier_free_guidance_rank() == get_classifier_free_guidance_world_size() - 1
        and is_pipeline_last_stage()
    )
