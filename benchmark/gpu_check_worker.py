"""One process of `benchmark/gpu_check.py`: one mesh, without and with the cache, held against one process."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import _get_current_dispatch_mode

from xfuser.core.console import quiet_libraries

quiet_libraries()

from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel  # noqa: E402

from xfuser.config import ParallelConfig  # noqa: E402
from xfuser.core.distributed.environment import (  # noqa: E402
    choose_device,
    join_processes,
    leave_processes,
    memory_peak,
    synchronize,
)
from xfuser.core.distributed.mesh import ParallelMesh  # noqa: E402
from xfuser.core.files import write_json  # noqa: E402
from xfuser.model_executor.adapters import spec_of  # noqa: E402
from xfuser.model_executor.adapters.small import smooth_in_time  # noqa: E402
from xfuser.model_executor.parallel import parallelize  # noqa: E402

CACHES: dict[str, dict[str, Any]] = {
    "none": {},
    "Fb+AdaCorrection": {"use_cache": "Fb", "enable_adacorrection": True, "adacorr_budget": 0.5},
}
TOY = {
    "num_layers": 3,
    "num_single_layers": 5,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "in_channels": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
TOKENS = {"full": (4096, 512), "toy": (64, 16)}  # image and text


@dataclass
class BarePipeline:
    """What `parallelize` needs of a pipeline: no text encoder, no autoencoder, nothing to download."""

    transformer: FluxTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler
    size: str

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @torch.no_grad()
    def __call__(self, steps: int, guided: bool) -> tuple[torch.Tensor, float]:
        """Latents of one image, and the seconds of a step."""
        image, text = TOKENS[self.size]
        side = int(image**0.5)
        generator = torch.Generator().manual_seed(1)
        config, device, dtype = self.transformer.config, self.device, self.transformer.dtype

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        latents = noise(1, image, config.in_channels)
        prompts = [noise(1, text, config.joint_attention_dim) for _ in range(2 if guided else 1)]
        pooled = noise(1, config.pooled_projection_dim)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(device, dtype)
        self.scheduler.set_timesteps(steps, device=device)
        synchronize(device)
        begin = time.perf_counter()
        for timestep in self.scheduler.timesteps:
            predicted = []
            for name, prompt in zip(("cond", "uncond"), prompts, strict=False):
                with self.transformer.cache_context(name):
                    predicted += self.transformer(
                        hidden_states=latents,
                        timestep=timestep.expand(1).to(dtype) / 1000,
                        guidance=torch.full((1,), 3.5, device=device, dtype=dtype),
                        pooled_projections=pooled,
                        encoder_hidden_states=prompt,
                        txt_ids=torch.zeros(text, 3, device=device, dtype=dtype),
                        img_ids=places,
                        return_dict=False,
                    )
            noise_seen = predicted[0] if not guided else predicted[1] + 3.0 * (predicted[0] - predicted[1])
            latents = self.scheduler.step(noise_seen, timestep, latents).prev_sample
        synchronize(device)
        return latents, (time.perf_counter() - begin) / steps


def build(size: str, device: torch.device) -> BarePipeline:
    """FLUX.1-dev's sizes, or a toy's, with the same random weights in every process, made on the device."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
        with torch.device(device):
            model = FluxTransformer2DModel(guidance_embeds=True, **(TOY if size == "toy" else {}))
    finally:
        torch.set_default_dtype(before)
    smooth_in_time(model.time_text_embed.timestep_embedder)
    return BarePipeline(model.eval(), FlowMatchEulerDiscreteScheduler(), size)


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """Compile each block's own forward, before anything is attached: decisions stay outside the compiled region.

    The engine counts a first call's FLOPs in a dispatch mode. Inside one torch gives up compiling a function for good,
    and a compiled one would hide its operators, so that call runs as it was written.
    """
    for block in spec_of(transformer).blocks(transformer):
        block.forward = _compiled(block.forward)


def _compiled(eager: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(eager)

    @wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        counts = _get_current_dispatch_mode() is not None
        return (eager if counts else compiled)(*args, **kwargs)

    return forward


def run(job: dict[str, Any], device: torch.device, reference: Path) -> list[dict[str, Any]]:
    """One row a cache."""
    pipeline = build(job["size"], device)
    if job["compile"]:
        compile_blocks(pipeline.transformer)
    mesh = ParallelMesh(ParallelConfig(**job["degrees"]), device)
    rows = []
    for name, settings in CACHES.items():
        spread = parallelize(pipeline, mesh, **settings)
        for _ in range(2 if job["compile"] else 1):
            pipeline(job["steps"], job["guided"])  # counts FLOPs, connects; then compiles what was counted before
        timed = [pipeline(job["steps"], job["guided"]) for _ in range(job["repeats"])]
        latents = timed[-1][0].float().cpu().contiguous()
        summary = spread.summary()
        digest = decisions_of(summary)
        digests = spread.gather(summary["plan_digest"])
        spread.remove()
        row = {
            "cache": name,
            "seconds": statistics.median(seconds for _, seconds in timed),
            "low": min(seconds for _, seconds in timed),
            "high": max(seconds for _, seconds in timed),
            "hit_rate": summary["hit_rate"],
            "digests_equal": len(set(digests)) == 1,
            "finite": bool(latents.isfinite().all()),
            "graphs": counters["stats"]["unique_graphs"],
            "memory_peak": memory_peak(device),
        }
        file = reference / f"{name}-{'guided' if job['guided'] else 'plain'}.safetensors"
        if job["writes_reference"]:
            save_file({"latents": latents}, file, {"digest": digest})
        rows.append(row | compared(latents, digest, file))
    return rows


def decisions_of(summary: dict[str, Any]) -> str:
    """The last generation's plan, as text to compare with another run's."""
    return json.dumps(summary["plan"])


def compared(latents: torch.Tensor, digest: str, file: Path) -> dict[str, Any]:
    expected = load_file(file)["latents"]
    with safe_open(file, "pt") as opened:
        plan = opened.metadata()["digest"]
    error = (latents - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    return {
        "largest": float((latents - expected).abs().max()),
        "relative": float(error),
        "same_plan": digest == plan,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", help="JSON")
    parser.add_argument("folder", type=Path, help="of the reference")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    job = json.loads(args.job)
    device = choose_device(job["device"])
    if device.type == "cpu":
        torch.set_num_threads(1)
    join_processes(device, job["timeout"])
    rows = run(job, device, args.folder)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, rows)
    if dist.get_rank() == 0:
        # The slowest and the worst rank speak for all.
        for index, row in enumerate(rows):
            for key in ("seconds", "high", "largest", "relative"):
                row[key] = max(each[index][key] for each in every)
            row["low"] = min(each[index]["low"] for each in every)
            for key in ("digests_equal", "finite", "same_plan"):
                row[key] = all(each[index][key] for each in every)
        write_json(args.output, {"rows": rows})
    leave_processes()


if __name__ == "__main__":
    main()
