"""Judge caches of blocks inside the evaluated steps against the plan of the trajectory alone.

    python benchmark/hierarchical.py --budgets .5 .38 --num_images 64 --threads 1

Steps are skipped by the trajectory's plan; within those that are evaluated, a base method skips blocks, alone or
corrected on blocks. Each such row is compared, image by image, with the trajectory alone at the same work, counted on
the blocks: its plan then evaluates fewer steps, and these in full. Result: hierarchical.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.core.console import check_output_folder, quiet_libraries  # noqa: E402

quiet_libraries()

from benchmark.common import captions_of, spread  # noqa: E402
from benchmark.compare_calibrations import SETTINGS, check, images_of, load_for  # noqa: E402
from benchmark.judge import closeness  # noqa: E402
from benchmark.measure import DEFAULT_PROMPTS, Sampling  # noqa: E402
from benchmark.peer_tools import BlockCounter  # noqa: E402
from evaluation.metrics import difference_interval, mean_interval, worst_tenth  # noqa: E402
from xfuser.config import CacheConfig  # noqa: E402
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.config.trajectory import TrajectoryConfig  # noqa: E402
from xfuser.core.distributed.environment import describe_environment  # noqa: E402
from xfuser.core.files import write_json  # noqa: E402
from xfuser.model_executor.adapters import denoisers_of, spec_of  # noqa: E402
from xfuser.model_executor.cache import apply_cache_on_transformer  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory import attach_trajectory  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration  # noqa: E402
from xfuser.model_executor.pipelines import LoadedPipeline  # noqa: E402
from xfuser.model_executor.pipelines.shipped import shipped_models, shipped_trajectory  # noqa: E402

RESULTS = "hierarchical.json"


@dataclass(frozen=True)
class Inside:
    """What caches blocks within evaluated steps: a base method, or a share of its blocks to evaluate, corrected."""

    method: str
    threshold: float | None = None
    budget: float | None = None

    def __str__(self) -> str:
        if self.budget is not None:
            return f"{self.method}+AdaCorrection, {self.budget:g} of the blocks"
        return f"{self.method}, threshold {self.threshold:g}"

    def settings(self, evaluations: int) -> dict[str, Any]:
        """Give the engine's settings, for so many evaluated steps."""
        if self.budget is None:
            return {"use_cache": self.method, "rel_l1_thresh": self.threshold}
        corrected = {"enable_adacorrection": True, "adacorr_budget": self.budget, "num_steps": evaluations}
        return {"use_cache": self.method, **corrected}


def least_work(known: Calibration) -> float:
    """Find the share of all evaluations that the calibration's smallest plan makes."""
    return min(each.plan.cost for each in known.learned.values())


def judge(
    loaded: LoadedPipeline,
    file: Path,
    budgets: Sequence[float],
    within: Sequence[Inside],
    sampling: Sampling,
    done: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Generate all images without a cache, and under every budget and cache of blocks.

    Returns:
        A row for every budget, alone and with each cache of blocks; the latter with the trajectory alone at their work,
        where the file has a plan of so little.
    """
    (denoiser,) = denoisers_of(loaded.pipeline)
    counter = BlockCounter((block, 1.0) for block in spec_of(denoiser).blocks(denoiser))
    least = least_work(Calibration.load(file))
    uncached = images_of(loaded, sampling)
    whole = counter.take()

    def near(budget: float, inside: Inside | None = None) -> tuple[np.ndarray, float]:
        with ExitStack() as attached:
            if inside is not None:
                settings = inside.settings(int(budget * sampling.num_inference_steps))
                attached.callback(apply_cache_on_transformer(denoiser, **settings).remove)
            attached.callback(attach_trajectory(loaded.pipeline, adacorr_budget=budget, calibration=str(file)).remove)
            found = closeness(images_of(loaded, sampling), uncached)[0]
        return found, counter.take() / whole

    rows = []
    for budget in budgets:
        for inside in (None, *within):
            found, work = near(budget, inside)
            alone = None if inside is None or work < least else near(work)
            rows.append(_row(budget, inside, found, work, alone))
            done(rows[-1])
    counter.undo()
    return rows


def _row(
    budget: float, inside: Inside | None, near: np.ndarray, work: float, alone: tuple[np.ndarray, float] | None
) -> dict[str, Any]:
    row = {
        "budget": budget,
        "inside": str(inside or "–"),
        "work": work,
        "psnr": mean_interval(near).to_dict(),
        "psnr_worst_tenth": worst_tenth(near),
    }
    if alone is not None:
        row["alone"] = {
            "work": alone[1],
            "psnr": mean_interval(alone[0]).to_dict(),
            "psnr_worst_tenth": worst_tenth(alone[0]),
            "psnr_difference": difference_interval(near, alone[0]).to_dict(),
        }
    return row


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay the rows out; brackets are 95% intervals."""
    table = Table(title="PSNR to the uncached images (dB), mean / worst tenth")
    names = ("steps evaluated", "inside", "work", "PSNR", "work, alone", "PSNR, alone", "difference")
    for name in names:
        table.add_column(name, justify="left" if name == "inside" else "right")
    for row in rows:
        cells = [f"{row['budget']:.2f}", row["inside"], f"{row['work']:.3f}", _closeness(row)]
        if "alone" in row:
            alone = row["alone"]
            differs = alone["psnr_difference"]
            cells += [f"{alone['work']:.3f}", _closeness(alone)]
            cells.append(f"{differs['value']:+.1f} [{differs['low']:+.1f}, {differs['high']:+.1f}]")
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return table


def _closeness(entry: Mapping[str, Any]) -> str:
    return f"{entry['psnr']['value']:.1f} / {entry['psnr_worst_tenth']:.1f}"


def main() -> None:
    """Run the command."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=sorted(shipped_models()), default="tiny-flux", help="default: %(default)s")
    add(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.5, 0.38],
        help="shares of steps to evaluate (default: .5 .38)",
    )
    add("--method", default="Fb", help="the base method inside (default: %(default)s)")
    add("--thresholds", type=float, nargs="*", default=[0.05, 0.1], help="its rel_l1_thresh (default: .05 .1)")
    add(
        "--block_budgets",
        type=float,
        nargs="*",
        default=[0.9, 0.8],
        help="shares of the blocks of evaluated steps to evaluate, with + AdaCorrection (default: .9 .8)",
    )
    add("--num_images", type=positive, default=64, help="to judge by (default: %(default)s)")
    add("--num_inference_steps", type=positive, default=50, help="denoising steps (default: %(default)s)")
    add("--seed", type=int, default=820_000, help="of the first image (default: %(default)s)")
    add("--batch_size", type=positive, default=16, help="images at once (default: %(default)s)")
    add("--threads", type=positive, help="CPU threads (default: torch's own choice)")
    add("--output_dir", type=Path, default=Path("hierarchical"), help="default: %(default)s")
    args = parser.parse_args()
    within = [Inside(args.method, threshold=each) for each in args.thresholds]
    within += [Inside(args.method, budget=each) for each in args.block_budgets]
    try:
        for budget in args.budgets:
            TrajectoryConfig(adacorr_budget=budget)
            for inside in within:
                CacheConfig(**inside.settings(max(1, int(budget * args.num_inference_steps))))
        steps = args.num_inference_steps
        file = shipped_trajectory(args.model, steps)
        if file is None:
            raise ValueError(f"{args.model} brings no calibration of the trajectory for {steps} steps; name others")
        (known,) = check([file], args.num_images, args.seed)
        if len(known.places) > 1:
            # A cache of blocks takes half a batch for the begin of another generation.
            raise ValueError(f"{args.model} is guided, and its plans evaluate single branches; choose one without")
        if min(args.budgets) < least_work(known):
            raise ValueError(f"--budgets: {file.name} has plans from {least_work(known):.2f} on; name none below")
        check_output_folder(args.output_dir)
    except ValueError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load_for(known, args.model)
    prompts = spread(captions_of(args.model), args.num_images) or DEFAULT_PROMPTS
    guidance = loaded.spec.guidance_scale
    sampling = Sampling(args.num_images, args.batch_size, steps, guidance, args.seed, prompts)
    console = Console() if sys.stdout.isatty() else Console(width=140)

    def tell(row: dict[str, Any]) -> None:
        line = f"{row['budget']:.2f} {row['inside']}: {row['psnr']['value']:.2f} dB at {row['work']:.3f}"
        Console(stderr=True).print(line, markup=False, highlight=False)

    rows = judge(loaded, file, args.budgets, within, sampling, tell)
    document = {
        "schema": 1,
        "environment": describe_environment(loaded.pipeline.device),
        "settings": {name: getattr(sampling, name) for name in SETTINGS} | {"model": args.model, "file": file.name},
        "results": rows,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / RESULTS, document)
    console.print(table_of(rows))


if __name__ == "__main__":
    main()
