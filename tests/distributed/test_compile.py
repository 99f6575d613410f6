"""Compiled blocks: the same images, compiled once, alone and with tokens on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import run, torchrun

STEPS = 16


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_compiled_blocks(processes: int, tmp_path: Path) -> None:
    """Twelve blocks are compiled in the first generation, and none again in the second."""
    arguments = (Path(__file__), str(processes), tmp_path / "told.json")
    ended = torchrun(processes, *arguments, limit=500) if processes > 1 else run(*arguments, limit=500)
    assert ended.code == 0, ended.err
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["difference"] < 1e-3
    assert told["plans"][0] == told["plans"][1] and told["hit_rate"] > 0.1
    assert told["graphs"][0] >= 12 and told["graphs"][0] == told["graphs"][1]


def work(processes: int, path: Path) -> None:
    from torch._dynamo.utils import counters

    from xfuser.config import ParallelConfig
    from xfuser.core.distributed.environment import choose_device, join_processes, leave_processes, rank
    from xfuser.core.distributed.mesh import ParallelMesh
    from xfuser.core.files import write_json
    from xfuser.model_executor.parallel import parallelize
    from xfuser.model_executor.pipelines import load_pipeline

    device = choose_device("cpu")
    join_processes(device, 400)
    loaded = load_pipeline("tiny-dit")
    mesh = ParallelMesh(ParallelConfig(ulysses_degree=processes), device)
    images, plans, graphs, hit_rate = [], [], [], 0.0
    for compiled in (False, True):
        spread = parallelize(loaded.pipeline, mesh, "Tea", rel_l1_thresh=0.15, use_torch_compile=compiled)
        for _ in range(1 + compiled):
            spread.engine.reset()
            images.append(loaded.generate([0, 1], [7, 8], STEPS))
            graphs.append(counters["stats"]["unique_graphs"])
        plans.append(spread.engine.summary()["plan_digest"])
        hit_rate = spread.engine.summary()["hit_rate"]
        spread.remove()
    if rank() == 0:
        difference = max(float(np.abs(images[0] - each).max()) for each in images[1:])
        write_json(path, {"difference": difference, "plans": plans, "graphs": graphs[1:], "hit_rate": hit_rate})
    leave_processes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(int(sys.argv[1]), Path(sys.argv[2]))
