"""Judge calibrations of a shipped model's trajectory on images that none of them was learned from, pair by pair.

    python benchmark/compare_calibrations.py OLD.safetensors NEW.safetensors --budgets .38 .30 .23 --threads 1

All files have to be of one scheduler and number of steps, which are taken from them. Each is given every budget; the
cost is counted on the blocks. Differences are to the first file, image by image. Result: compare_calibrations.json.

    python benchmark/compare_calibrations.py FILE.safetensors --model tiny-flux --opponents

adds, at as many whole evaluations, fewer steps of the same scheduler and straight lines through the denoiser's outputs
at evenly spaced steps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.console import check_output_folder, quiet_libraries  # noqa: E402

quiet_libraries()

from benchmark.common import captions_of, spread  # noqa: E402
from benchmark.judge import closeness  # noqa: E402
from benchmark.measure import DEFAULT_PROMPTS, Sampling, conditions_of  # noqa: E402
from benchmark.peer_tools import BlockCounter, Polynomial, StepCache, evenly  # noqa: E402
from evaluation.metrics import difference_interval, mean_interval, worst_tenth  # noqa: E402
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.core.distributed.environment import describe_environment  # noqa: E402
from xfuser.core.files import write_json  # noqa: E402
from xfuser.model_executor.adapters import denoisers_of, spec_of  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory import attach_trajectory  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration  # noqa: E402
from xfuser.model_executor.pipelines import LoadedPipeline, load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.shipped import shipped_models  # noqa: E402

RESULTS = "compare_calibrations.json"
SETTINGS = ("num_images", "batch_size", "num_inference_steps", "guidance_scale", "seed")
# What a scheduler of this class is set to beside the model's own configuration.
OPTIONS = {"DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++"}}


def check(files: Sequence[Path], num_images: int, seed: int) -> list[Calibration]:
    """Read the calibrations.

    Raises:
        ValueError: One cannot be read, they are of different kinds of runs, or an image to judge by was learned from.
    """
    known = [Calibration.load(path) for path in files]
    for path, each in zip(files, known, strict=True):
        if each.fingerprint["scheduler"] != known[0].fingerprint["scheduler"]:
            raise ValueError(f"{path} is of another scheduler or number of steps than {files[0]}; leave it out")
        first = each.notes.get("seed")
        if first is not None and first < seed + num_images and seed < first + each.images:
            raise ValueError(
                f"{path} was learned from the seeds {first} to {first + each.images - 1}; judge by others (--seed)"
            )
    return known


def load_for(calibration: Calibration, model: str = "tiny-dit") -> LoadedPipeline:
    """Load a model with the calibration's scheduler."""
    loaded = load_pipeline(model)
    name = calibration.fingerprint["scheduler"]["class"]
    config = loaded.pipeline.scheduler.config
    loaded.pipeline.scheduler = getattr(diffusers, name).from_config(config, **OPTIONS.get(name, {}))
    return loaded


def judge(
    loaded: LoadedPipeline,
    files: Sequence[Path],
    budgets: Sequence[float],
    sampling: Sampling,
    done: Callable[[dict[str, Any]], None] = lambda row: None,
    opponents: bool = False,
) -> list[dict[str, Any]]:
    """Generate all images without a cache, and under every file and budget.

    Args:
        loaded: The model.
        files: The calibrations.
        budgets: Shares of the denoiser's evaluations.
        sampling: The images.
        done: Called with every row, as it is finished.
        opponents: Whether fewer steps and evenly spaced straight lines are judged too.

    Returns:
        A row for every budget and file, in this order; then a budget's opponents.
    """
    (denoiser,) = denoisers_of(loaded.pipeline)
    counter = BlockCounter((block, 1.0) for block in spec_of(denoiser).blocks(denoiser))
    calls: list[None] = []
    counted = denoiser.register_forward_hook(lambda *call: calls.append(None))
    uncached = images_of(loaded, sampling)
    counted.remove()
    branches = len(calls) // (sampling.num_inference_steps * math.ceil(sampling.num_images / sampling.batch_size))
    work = counter.take()
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        first: np.ndarray | None = None
        for path in files:
            engine = attach_trajectory(loaded.pipeline, adacorr_budget=budget, calibration=str(path))
            try:
                near = closeness(images_of(loaded, sampling), uncached)[0]
            finally:
                engine.remove()
            first = near if first is None else first
            name = path.name if len({each.name for each in files}) == len(files) else str(path)
            rows.append(_row(budget, name, counter.take() / work, near, first))
            done(rows[-1])
        if opponents and first is not None:
            evaluations = int(budget * sampling.num_inference_steps)
            for name, images in _opponents(loaded, sampling, denoiser, evaluations, branches):
                rows.append(_row(budget, name, counter.take() / work, closeness(images, uncached)[0], first))
                done(rows[-1])
    counter.undo()
    return rows


def _row(budget: float, name: str, cost: float, near: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    return {
        "budget": budget,
        "calibration": name,
        "cost": cost,
        "psnr": mean_interval(near).to_dict(),
        "psnr_worst_tenth": worst_tenth(near),
        "psnr_difference": difference_interval(near, first).to_dict(),
        "images": near.tolist(),
    }


def _opponents(
    loaded: LoadedPipeline, sampling: Sampling, denoiser: nn.Module, evaluations: int, branches: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Make the images of what anyone can do without a calibration, with so many evaluations."""
    yield f"{evaluations} steps", images_of(loaded, replace(sampling, num_inference_steps=evaluations))
    steps = sampling.num_inference_steps
    StepCache(denoiser, steps, evenly(evaluations, steps), Polynomial(1), branches)
    try:
        yield f"order 1 at {evaluations} even steps", images_of(loaded, sampling)
    finally:
        del denoiser.forward  # its class's own again


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay the rows out; brackets are 95% intervals."""
    table = Table(title="PSNR to the uncached images (dB)")
    for name in ("budget", "cost", "calibration", "PSNR", "worst 10%", "difference to the first"):
        table.add_column(name, justify="left" if name == "calibration" else "right", no_wrap=name != "calibration")
    for row in rows:
        mean, differs = row["psnr"], row["psnr_difference"]
        table.add_row(
            f"{row['budget']:.2f}",
            f"{row['cost']:.3f}",
            row["calibration"],
            f"{mean['value']:.2f} [{mean['low']:.2f}, {mean['high']:.2f}]",
            f"{row['psnr_worst_tenth']:.2f}",
            f"{differs['value']:+.2f} [{differs['low']:+.2f}, {differs['high']:+.2f}]",
        )
    return table


def images_of(loaded: LoadedPipeline, sampling: Sampling) -> np.ndarray:
    """Generate the images of a sampling under whatever is attached, float32 [N, …, H, W, 3] in [0, 1]."""
    images = []
    for start in range(0, sampling.num_images, sampling.batch_size):
        size = min(sampling.batch_size, sampling.num_images - start)
        seeds = [sampling.seed + start + index for index in range(size)]
        conditions = conditions_of(loaded, sampling, start, size)
        steps, guidance = sampling.num_inference_steps, sampling.guidance_scale
        images.append(loaded.generate(conditions, seeds, steps, guidance_scale=guidance))
    return np.concatenate(images)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="calibrations of the trajectory")
    parser.add_argument("--model", choices=sorted(shipped_models()), default="tiny-dit", help="default: %(default)s")
    parser.add_argument("--opponents", action="store_true", help="judge fewer steps and evenly spaced forecasts too")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.38, 0.3, 0.23], help="default: .38 .3 .23")
    parser.add_argument("--num_images", type=positive, default=256, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=500_000, help="of the first image (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--guidance_scale", type=float, help="default: the model's own")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--output_dir", type=Path, default=Path("compare_calibrations"), help="default: %(default)s")
    args = parser.parse_args()
    try:
        known = check(args.files, args.num_images, args.seed)
    except ValueError as error:
        parser.error(str(error))
    check_output_folder(args.output_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load_for(known[0], args.model)
    guidance = loaded.spec.guidance_scale if args.guidance_scale is None else args.guidance_scale
    prompts = spread(captions_of(args.model), args.num_images) or DEFAULT_PROMPTS
    sampling = Sampling(args.num_images, args.batch_size, known[0].steps, guidance, args.seed, prompts)
    # The table has its own width: piped into a file it would be cut at 80 columns otherwise.
    console = Console() if sys.stdout.isatty() else Console(width=140)

    def tell(row: dict[str, Any]) -> None:
        line = f"{row['budget']:.2f} {row['calibration']}: {row['psnr']['value']:.2f} dB"
        Console(stderr=True).print(line, markup=False, highlight=False)

    rows = judge(loaded, args.files, args.budgets, sampling, tell, args.opponents)
    document = {
        "schema": 1,
        "environment": describe_environment(loaded.pipeline.device),
        "settings": {name: getattr(sampling, name) for name in SETTINGS} | {"model": args.model},
        "results": rows,
    }
    write_json(args.output_dir / RESULTS, document)
    console.print(table_of(rows))


if __name__ == "__main__":
    main()
