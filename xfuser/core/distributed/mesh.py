"""This process's place among all: a DeviceMesh of data, cfg, pipefusion, ring and ulysses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from xfuser.config.parallel import DIMENSIONS, ParallelConfig
from xfuser.core.distributed.environment import limit_waiting


class ParallelMesh:
    """Ranks and groups along every dimension, for one process or many.

    Making one is collective: all processes of the job must do it, with the same degrees. With one process there are
    no groups, and every group is ``None``.

    Args:
        config: The degrees.
        device: Where this process computes.

    Attributes:
        sequence: Group of the ranks that share a stage's tokens: ring × ulysses.
        peers: Group of the ranks that hold the same blocks for one image: cfg × ring × ulysses.
        control: gloo group of all ranks that share an image, for decisions; never carries activations.
        image: Group of the same ranks for what they compute, where the autoencoder is spread over them.
        replicas: gloo group of the ranks at this one's place in every data-parallel group, for finished images.

    Raises:
        ValueError: The number of processes is not the product of the degrees.
    """

    def __init__(self, config: ParallelConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        config.check_world(self.world_size)
        self.mesh: DeviceMesh | None = None
        self.sequence = self.peers = self.control = self.image = self.replicas = None
        if dist.is_initialized():
            self.mesh = init_device_mesh(device.type, config.shape, mesh_dim_names=DIMENSIONS)
            self.sequence = self._group("ring", "ulysses")
            self.peers = self._group("cfg", "ring", "ulysses")
            self.control = self._group("cfg", "pipefusion", "ring", "ulysses", backend="gloo")
            self.replicas = self._group("data", backend="gloo")
            if config.use_parallel_vae:
                self.image = self._group("cfg", "pipefusion", "ring", "ulysses")
            for name in DIMENSIONS:
                limit_waiting(self.mesh.get_group(name))

    def close(self) -> None:
        """Give the groups back; nothing may use the mesh afterwards. For all of its ranks.

        An idle gloo group costs three threads a process, one of which wakes a hundred times a second.
        """
        if self.mesh is None:
            return
        named = [self.sequence, self.peers, self.control, self.image, self.replicas]
        groups = [*named, *(self.mesh.get_group(name) for name in DIMENSIONS)]
        self.mesh = self.sequence = self.peers = self.control = self.image = self.replicas = None
        for group in {id(group): group for group in groups if group is not None}.values():
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    def rank(self, dimension: str) -> int:
        """This process's coordinate along a dimension."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(dimension)

    def degree(self, dimension: str) -> int:
        return self.config.shape[DIMENSIONS.index(dimension)]

    def group(self, dimension: str) -> dist.ProcessGroup | None:
        return None if self.mesh is None else self.mesh.get_group(dimension)

    @property
    def sequence_rank(self) -> int:
        """Which shard of the tokens this process holds."""
        return self.rank("ring") * self.config.ulysses_degree + self.rank("ulysses")

    @property
    def shares_image(self) -> bool:
        """Whether other ranks work on the same image."""
        return self.config.image_degree > 1

    @property
    def writes(self) -> bool:
        """Whether this process is the one, of those that share an image, that writes it."""
        return self.mesh is None or dist.get_rank(self.control) == 0

    @property
    def is_first(self) -> bool:
        """Whether this is the job's first process."""
        return self.mesh is None or dist.get_rank() == 0

    def coordinates(self) -> dict[str, int]:
        return {dimension: self.rank(dimension) for dimension in DIMENSIONS}

    def _group(self, *dimensions: str, backend: str | None = None) -> dist.ProcessGroup:
        """The group of all ranks that differ from this one in these dimensions only."""
        assert self.mesh is not None
        ranks = self.mesh.mesh
        inner = [DIMENSIONS.index(name) for name in dimensions]
        outer = [index for index in range(len(DIMENSIONS)) if index not in inner]
        members = ranks.permute(*outer, *inner).reshape(-1, self._size(dimensions))
        mine = None
        for row in members.tolist():  # every process makes every group, in the same order
            group = dist.new_group(row, backend=backend)
            if dist.get_rank() in row:
                mine = group
        assert mine is not None
        limit_waiting(mine)
        return mine

    def _size(self, dimensions: tuple[str, ...]) -> int:
        size = 1
        for name in dimensions:
            size *= self.degree(name)
        return size
