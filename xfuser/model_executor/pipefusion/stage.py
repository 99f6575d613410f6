"""One stage of PipeFusion (arXiv 2405.14430): which blocks it holds, and how streams come to it and go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from xfuser.core.distributed.clock import Clock
from xfuser.core.distributed.mesh import ParallelMesh
from xfuser.core.tokens import Streams, TokenView


def split_blocks(blocks: int, stages: int, sizes: Sequence[int] | None = None) -> list[range]:
    """The blocks of every stage: as named, or as evenly as possible, the first stages the larger ones."""
    if sizes is None:
        size, larger = divmod(blocks, stages)
        sizes = [size + (index < larger) for index in range(stages)]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


@dataclass(eq=False)
class Stage:
    """This process's stage; one that is alone holds all blocks.

    Attributes:
        stages: The blocks of every stage.
        index: Which of them is this process's.
        group: The ranks of all stages, in order; ``None`` for a stage that is alone.
        clock: Where the time of sending and waiting is booked.
    """

    stages: list[range]
    index: int = 0
    group: dist.ProcessGroup | None = None
    clock: Clock = field(default_factory=Clock)
    _sending: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def alone(cls, blocks: int) -> Stage:
        return cls([range(blocks)])

    @classmethod
    def of(cls, mesh: ParallelMesh, blocks: int, clock: Clock) -> Stage:
        """The stage of this process in a mesh."""
        degree = mesh.degree("pipefusion")
        stages = split_blocks(blocks, degree, mesh.config.attn_layer_num_for_pp)
        return cls(stages, mesh.rank("pipefusion"), mesh.group("pipefusion") if degree > 1 else None, clock)

    @property
    def blocks(self) -> range:
        return self.stages[self.index]

    @property
    def is_alone(self) -> bool:
        return self.group is None

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == len(self.stages) - 1

    def holds(self, block: int) -> bool:
        return block in self.blocks

    def starts(self) -> frozenset[int]:
        """First blocks of all stages but the first."""
        return frozenset(each.start for each in self.stages[1:])

    def receive(self, view: TokenView, like: Streams) -> Streams:
        """The view's part of the streams from the stage before, shaped as that part of ``like``."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in view.take(like)]
        with self.clock("waiting"):
            for part in parts:
                if part.numel():
                    dist.recv(part, src=self._global(self.index - 1), group=self.group)
        return tuple(parts)

    def send(self, streams: Streams) -> None:
        """Hand streams on to the next stage, without waiting for it."""
        with self.clock("pipeline"):
            for part in streams:
                if part.numel():
                    whole = part.contiguous()
                    work = dist.isend(whole, dst=self._global(self.index + 1), group=self.group)
                    if work is not None:
                        self._sending.append((work, whole))

    def drain(self) -> None:
        """Wait until all that was sent has left."""
        with self.clock("waiting"):
            for work, _ in self._sending:
                work.wait()
        self._sending.clear()

    def broadcast(self, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        """A stage's tensor, on all of them; it is changed in place elsewhere."""
        with self.clock("waiting"):
            tensor = tensor.contiguous()
            dist.broadcast(tensor, src=self._global(stage), group=self.group)
        return tensor

    def _global(self, stage: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, stage)


def drop_other_blocks(blocks: Sequence[nn.Module], stage: Stage, kept: Sequence[str]) -> None:
    """Free the weights of blocks that other stages hold, but for the parts of block 0 that the model reads elsewhere.

    Args:
        blocks: All blocks of the transformer.
        stage: This process's.
        kept: Names of submodules of block 0 that every stage needs.
    """
    for index, block in enumerate(blocks):
        if stage.holds(index):
            continue
        needed = [block.get_submodule(name) for name in kept] if index == 0 else []
        shared = {id(tensor) for module in needed for tensor in (*module.parameters(), *module.buffers())}
        for tensor in (*block.parameters(), *block.buffers()):
            if id(tensor) not in shared:
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
