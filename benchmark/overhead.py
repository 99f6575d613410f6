"""What the engine itself costs, and how much of the saved computing arrives as saved time.

    python benchmark/overhead.py

Three measurements of the denoising loop alone (no autoencoder), alternating with the loop without a cache, medians:
``attached``: every statistic on and nothing ever skipped, on tiny-dit and on a random DiT-B/2-sized model, a ratio of
times; ``speed-up``: a budget, against 1 / (1 - flops_saved).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.console import quiet_libraries  # noqa: E402

quiet_libraries()

from diffusers import DDIMScheduler, DiTTransformer2DModel  # noqa: E402

from benchmark.measure import timed  # noqa: E402
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.core.distributed.environment import choose_device, describe_environment  # noqa: E402
from xfuser.model_executor.cache import CacheEngine, apply_cache_on_transformer  # noqa: E402
from xfuser.model_executor.pipelines import load_pipeline  # noqa: E402

NULL_LABEL = 1000


@torch.no_grad()
def denoise(transformer: torch.nn.Module, scheduler: DDIMScheduler, batch: int, guided: bool, steps: int) -> None:
    """One denoising loop from fixed noise; with guidance both branches go through in one batch."""
    config, device = transformer.config, transformer.device
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, transformer.dtype)
    labels = torch.arange(batch, device=device) % 10
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
    scheduler = deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latents, latents]) if guided else latents
        times = timestep.expand(len(inputs)).to(device)
        predicted = transformer(inputs, timestep=times, class_labels=labels, return_dict=False)[0]
        if guided:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + 1.5 * (conditional - unconditional)
        latents = scheduler.step(predicted[:, : config.in_channels], timestep, latents).prev_sample


def alternate(
    transformer: torch.nn.Module, loop: Callable[[], None], settings: dict[str, Any], pairs: int, name: str
) -> tuple[list[float], dict[str, Any]]:
    """Ratios time with / time without the cache, pair by pair, and the last summary; a first pair is not counted."""
    ratios, known, summary = [], None, {}
    for index in track(range(pairs + 1), description=f"{name:32}"):
        plain = timed(loop, transformer.device)[0]
        engine: CacheEngine = apply_cache_on_transformer(transformer, **settings)
        engine.learn_flops(known)
        cached = timed(loop, transformer.device)[0]
        summary, known = engine.summary(), engine.known_flops()
        engine.remove()
        if index:
            ratios.append(cached / plain)
    return ratios, summary


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=positive, default=30, help="counted pairs of loops (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=6, help="steps of an attached loop (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    tiny = load_pipeline("tiny-dit", device=device).pipeline
    scheduler = tiny.scheduler
    torch.manual_seed(0)
    base = DiTTransformer2DModel(12, 64, in_channels=4, out_channels=8, num_layers=12, sample_size=32, patch_size=2)
    base = base.eval().to(device)
    table = Table(title=str(describe_environment(device)))
    for column in ("what", "median", "min", "max", "expected"):
        table.add_column(column)

    def attached(name: str, model: torch.nn.Module, batch: int, guided: bool, settings: dict[str, Any]) -> None:
        loop = lambda: denoise(model, scheduler, batch, guided, args.steps)  # noqa: E731
        ratios, summary = alternate(model, loop, settings, args.pairs, name)
        if summary["hit_rate"] != 0:
            raise SystemExit(f"overhead: {name} skipped something; this measurement needs a cache that never hits")
        low, high = min(ratios), max(ratios)
        table.add_row(name, f"{statistics.median(ratios):.4f}", f"{low:.4f}", f"{high:.4f}", "at most 1.03")

    def faster(name: str, settings: dict[str, Any]) -> None:
        loop = lambda: denoise(tiny.transformer, scheduler, 16, True, 50)  # noqa: E731
        ratios, summary = alternate(tiny.transformer, loop, settings | {"num_steps": 50}, 5, name)
        speed = sorted(1 / ratio for ratio in ratios)
        ideal = 1 / (1 - summary["flops_saved"])
        median = statistics.median(speed)
        expected = f"{ideal:.3f} from FLOPs; reached {median / ideal:.3f} of it, wanted 0.9"
        table.add_row(name, f"{median:.3f}", f"{speed[0]:.3f}", f"{speed[-1]:.3f}", expected)

    for method in ("Tea", "Fb"):
        never = {"use_cache": method, "rel_l1_thresh": 0.0, "enable_adacorrection": True}
        attached(f"attached {method}, tiny-dit, batch 16", tiny.transformer, 16, True, never)
        attached(f"attached {method}, DiT-B/2, batch 1", base, 1, False, never)
        for budget in (0.74, 0.5):
            named = {"use_cache": method, "enable_adacorrection": True, "adacorr_budget": budget}
            faster(f"speed-up {method}, budget {budget}", named)
        faster(f"speed-up {method} alone, threshold 0.2", {"use_cache": method, "rel_l1_thresh": 0.2})
    Console().print(table)


if __name__ == "__main__":
    main()
