"""Draw what the trajectory level does on tiny-dit: error over the steps, plan, weights, predicted against true PSNR.

python benchmark/trajectory_figure.py --budget 0.3 --threads 1 --output docs/images/trajectory.png
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.metrics import psnr  # noqa: E402
from evaluation.report.trajectory import trajectory_panel  # noqa: E402
from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.files import replacing  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory import attach_trajectory  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory.generation import prev_sample_of  # noqa: E402
from xfuser.model_executor.pipelines.loading import LoadedPipeline, load_pipeline  # noqa: E402

STEPS, IMAGES = 50, 16
LEARNED_FROM, DRAWN = 600_000, 500_000
BUDGETS = (0.5, 0.38, 0.3, 0.22, 0.16)


def draw(loaded: LoadedPipeline, seed: int) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Generate a batch; its images, and its latent after every step."""
    scheduler, latents = loaded.pipeline.scheduler, []
    step = scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        latents.append(prev_sample_of(result).clone())
        return result

    watched.__wrapped__ = step  # type: ignore[attr-defined]
    had = "step" in vars(scheduler)
    scheduler.step = watched
    try:
        images = loaded.generate([index % 10 for index in range(IMAGES)], [seed + i for i in range(IMAGES)], STEPS)
    finally:
        if had:
            scheduler.step = step
        else:
            del scheduler.step
    return images, latents


def errors(latents: list[torch.Tensor], reference: list[torch.Tensor]) -> list[float]:
    """Compute each step's relative distance to the uncached run's latent."""
    return [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(latents, reference, strict=True)]


def run(budget: float) -> dict[str, Any]:
    """Learn and draw at every budget, with the corrections and, at the one named, without."""
    loaded = load_pipeline("tiny-dit")
    reference, exact = draw(loaded, DRAWN)
    seen: dict[str, Any] = {"scatter": []}
    for each in dict.fromkeys((budget, *BUDGETS)):
        with tempfile.TemporaryDirectory() as store:
            engine = attach_trajectory(loaded.pipeline, adacorr_budget=each, store=store)
            draw(loaded, LEARNED_FROM)
            images, latents = draw(loaded, DRAWN)
            learned = engine.chosen
            assert learned is not None
            seen["scatter"].append((learned.predicted_psnr, psnr(images, reference)))
            if each == budget:
                seen |= {"learned": learned, "corrected": errors(latents, exact)}
                kept, learned.weights = learned.weights, [torch.zeros_like(weights) for weights in learned.weights]
                _, latents = draw(loaded, DRAWN)
                seen["forecast"], learned.weights = errors(latents, exact), kept
            engine.remove()
    return seen


def record_of(seen: dict[str, Any]) -> dict[str, Any]:
    """Say it as `trajectory_panel` reads it."""
    learned = seen["learned"]
    return {
        "kinds": learned.plan.kinds,
        "weights": [weights.tolist() for weights in learned.weights],
        "psnr": seen["scatter"],
        "errors": {"with learned correction": seen["corrected"], "forecast alone": seen["forecast"]},
    }


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.3, help="of the first three panels (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("trajectory.png"), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output) as temporary:
        temporary.write_bytes(trajectory_panel(record_of(run(args.budget))))
    print(args.output)


if __name__ == "__main__":
    main()
