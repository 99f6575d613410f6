"""How many processes Ray starts, and what each of them is for: the flags of xDiT's Ray scripts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass
class WorkerArguments:
    """The flags that place work on Ray's processes.

    Attributes:
        use_ray: Ray starts the processes, and the script runs in one of its own.
        ray_world_size: Processes that Ray starts; 1 leaves it to the degrees.
        dit_parallel_size: Those of them that run the transformer; 0 leaves it to the degrees, whose product it is.
        vae_parallel_size: Those of them that do nothing but decode.
    """

    use_ray: bool = False
    ray_world_size: int = 1
    dit_parallel_size: int = 0
    vae_parallel_size: int = 0

    def check_workers(self, degrees: int, use_parallel_vae: bool, launched: bool) -> None:
        """Refuse numbers of processes that contradict each other.

        Args:
            degrees: The product of the parallel degrees.
            use_parallel_vae: Whether several processes decode one image together.
            launched: Whether torchrun has started this process.

        Raises:
            ValueError: They do, or Ray's flags are given without ``--use_ray``, or Ray under torchrun.
        """
        if self.dit_parallel_size not in (0, degrees):
            raise ValueError(
                f"--dit_parallel_size {self.dit_parallel_size}: the transformer runs on as many processes as the "
                f"degrees make, {degrees}; leave it out"
            )
        if not self.use_ray:
            if self.vae_parallel_size:
                raise ValueError(
                    f"--vae_parallel_size {self.vae_parallel_size} goes with --use_ray; here the ranks that share an "
                    "image decode it: use --use_parallel_vae"
                )
            if self.ray_world_size != 1:
                raise ValueError(f"--ray_world_size {self.ray_world_size} goes with --use_ray; add it, or leave it out")
            return
        if launched:
            raise ValueError("--use_ray starts the processes itself; start the script with python, not with torchrun")
        if self.vae_parallel_size < 0:
            raise ValueError(f"--vae_parallel_size {self.vae_parallel_size}: give 0 or more")
        if self.vae_parallel_size > 1 and not use_parallel_vae:
            raise ValueError(
                f"--vae_parallel_size {self.vae_parallel_size}: several processes decode an image together with "
                "--use_parallel_vae; add it, or give 1"
            )
        wanted = degrees + self.vae_parallel_size
        if self.ray_world_size not in (1, wanted):
            raise ValueError(
                f"--ray_world_size {self.ray_world_size}: the degrees make {degrees} processes, and "
                f"--vae_parallel_size {self.vae_parallel_size} more; give {wanted}, or leave it out"
            )


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `WorkerArguments` to a parser."""
    group = parser.add_argument_group("Ray")
    group.add_argument("--use_ray", action="store_true", help="Ray starts the processes (see RayDiffusionPipeline)")
    group.add_argument("--ray_world_size", type=int, default=1, help="its processes (default: what the degrees make)")
    group.add_argument("--dit_parallel_size", type=int, default=0, help="those with the transformer (default: degrees)")
    group.add_argument("--vae_parallel_size", type=int, default=0, help="those that only decode (default: none)")
