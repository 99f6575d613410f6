"""Draw what the trajectory level does on tiny-dit: error over the steps, plan, weights, predicted against true PSNR.

python benchmark/trajectory_figure.py --budget 0.3 --threads 1 --output docs/images/trajectory.png
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.core.files import replacing  # noqa: E402
from xfuser.metrics import psnr  # noqa: E402
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


def figure(seen: dict[str, Any], path: Path) -> None:
    """Draw the four panels."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, ((top, scatter), (strip, heat)) = pyplot.subplots(
        2, 2, figsize=(11, 6), gridspec_kw={"height_ratios": [3, 2]}, layout="constrained"
    )
    top.semilogy(seen["forecast"], color="#b04a3a", label="forecast alone")
    top.semilogy(seen["corrected"], color="#2b6cb0", label="with learned correction")
    top.set(xlabel="step", ylabel="relative error", title="The latent's distance to the uncached run")
    top.legend(frameon=False)
    for predicted, true in seen["scatter"]:
        scatter.plot([predicted] * len(true), true, ".", color="#2b6cb0", alpha=0.4)
        scatter.plot(predicted, np.mean(true), "o", color="#1a202c")
    ends = scatter.get_xlim()
    scatter.plot(ends, ends, "--", color="#888888", linewidth=0.8)
    scatter.set(xlabel="predicted PSNR (dB)", ylabel="true PSNR (dB)", title="New images, five budgets; mean in black")
    plan = seen["learned"].plan
    strip.bar(range(plan.steps), [kind / 2 for kind in plan.kinds], width=0.9, color="#2b6cb0")
    strip.set(xlabel="step", yticks=[0, 0.5, 1], ylabel="evaluated", title=f"The plan: {plan.cost:.0%} of evaluations")
    size = max(len(weights) for weights in seen["learned"].weights)
    table = np.full((size, plan.steps), np.nan)
    for index, weights in enumerate(seen["learned"].weights):
        table[: len(weights), index] = weights.numpy()
    limit = float(np.nanquantile(np.abs(table), 0.98))
    shown = heat.imshow(table, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    heat.set(xlabel="step", ylabel="feature", title="Learned weights: outputs by branch, newest first; the latent")
    picture.colorbar(shown, ax=heat)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.savefig(temporary, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.3, help="of the first three panels (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("trajectory.png"), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figure(run(args.budget), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
