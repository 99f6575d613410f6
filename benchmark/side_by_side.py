"""Draw prompts without a cache, with the calibration that comes with a model, and with fewer steps at the same cost.

    python benchmark/side_by_side.py --model tiny-flux --threads 1 --output docs/images/side_by_side.png

A row is a way to generate, a column a prompt; every row starts from the same noise. Beside each image stands how far it
is from the uncached one, ten times as strong, on white. A row's number is the mean PSNR of the images that are shown.
The cost is counted in evaluations of the denoiser.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.console import quiet_libraries  # noqa: E402

quiet_libraries()

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from evaluation.metrics import psnr  # noqa: E402
from evaluation.report.style import DPI, png  # noqa: E402
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.core.files import replacing  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory import attach_trajectory  # noqa: E402
from xfuser.model_executor.pipelines import MODEL_TYPES, LoadedPipeline, load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.shipped import shipped_models, shipped_trajectory  # noqa: E402

PROMPTS = ("red apple", "blue heart", "cat face", "japan flag", "watermelon")
AMPLIFIED = 10  # times a difference to the uncached image


def rows_of(
    loaded: LoadedPipeline, prompts: list[str], seed: int, steps: int, speeds: list[float]
) -> list[tuple[str, np.ndarray]]:
    """Generate every row.

    Returns:
        (what it is, images [N, H, W, 3]), the uncached one first.

    Raises:
        ValueError: No calibration for so many steps comes with the model.
    """
    calibration = shipped_trajectory(loaded.model_type, steps)
    if calibration is None:
        raise ValueError(f"no calibration for {steps} steps comes with {loaded.model_type}; name other --steps")
    seeds = [seed + index for index in range(len(prompts))]
    uncached = loaded.generate(prompts, seeds, steps)
    rows = [(f"no cache\n{steps} steps", uncached)]
    for speed in speeds:
        evaluated = int(steps / speed)
        engine = attach_trajectory(loaded.pipeline, adacorr_budget=evaluated / steps, calibration=str(calibration))
        try:
            images = loaded.generate(prompts, seeds, steps)
        finally:
            engine.remove()
        rows.append((f"AdaCorrection\n{evaluated} of {steps} steps\n{psnr(images, uncached).mean():.1f} dB", images))
        images = loaded.generate(prompts, seeds, evaluated)
        rows.append((f"no cache\n{evaluated} steps\n{psnr(images, uncached).mean():.1f} dB", images))
    return rows


def picture_of(rows: list[tuple[str, np.ndarray]], prompts: list[str]) -> bytes:
    """Lay the rows out, prompts above, what each row is to the left; a PNG."""
    uncached = rows[0][1]
    figure = Figure(figsize=(1.1 + 1.5 * len(prompts), 0.25 + 0.75 * len(rows)), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(prompts), squeeze=False)
    left = 1.1 / figure.get_figwidth()
    figure.subplots_adjust(left=left, right=0.995, top=0.96, bottom=0.005, wspace=0.04, hspace=0.04)
    for axes_row, (name, images) in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
        for axes, image, reference in zip(axes_row, images, uncached, strict=True):
            off = 1 - AMPLIFIED * np.abs(image - reference)
            axes.imshow(np.concatenate([image, off], axis=1).clip(0, 1), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, prompt in zip(grid[0], prompts, strict=True):
        axes.set_title(prompt, fontsize=8)
    return png(figure)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    drawing = [name for name in sorted(shipped_models()) if MODEL_TYPES[name].conditioned_on == "prompt"]
    drawing = [name for name in drawing if MODEL_TYPES[name].makes == "images"]
    parser.add_argument("--model", choices=drawing, default="tiny-flux", help="default: %(default)s")
    parser.add_argument("--prompt", nargs="+", default=list(PROMPTS), help="one a column (default: five)")
    parser.add_argument(
        "--speeds", type=float, nargs="+", default=[2, 3, 4.5], help="times fewer evaluations (default: 2 3 4.5)"
    )
    parser.add_argument("--steps", type=positive, default=50, help="of the uncached images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first column (default: %(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--output", type=Path, default=Path("side_by_side.png"), help="default: %(default)s")
    args = parser.parse_args()
    if not 1 < min(args.speeds) <= max(args.speeds) <= args.steps:
        parser.error(f"--speeds: expected numbers above 1 and up to --steps {args.steps}")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        rows = rows_of(load_pipeline(args.model), args.prompt, args.seed, args.steps, args.speeds)
    except ValueError as error:
        parser.error(str(error))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output) as temporary:
        temporary.write_bytes(picture_of(rows, args.prompt))
    print(args.output)


if __name__ == "__main__":
    main()
