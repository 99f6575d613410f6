"""Make the calibrations of the trajectory that come with a model, from images of seeds that no benchmark uses.

    python scripts/calibrate_shipped.py --model tiny-dit --threads 1

Seconds a step belong to the machine and to what else it did. On a busy one, ``--timing_of`` takes those of earlier
files. benchmark/compare_calibrations.py tells whether new files are better than the old ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark.common import captions_of  # noqa: E402
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory import attach_trajectory  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration  # noqa: E402
from xfuser.model_executor.pipelines.calibrate import arguments_of, choices  # noqa: E402
from xfuser.model_executor.pipelines.generate import Generation  # noqa: E402
from xfuser.model_executor.pipelines.loading import load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.shipped import shipped_models  # noqa: E402

SEED = 1 << 29
AT_ONCE = 16
BUDGETS = (0.6, 0.5, 0.44, 0.4, 0.38, 0.35, 0.3, 0.26, 0.23, 0.22, 0.2, 0.16)
# By name the steps; the first word is the scheduler's.
GRIDS = {
    "tiny-dit": {"ddim-20": 20, "ddim-28": 28, "ddim-50": 50, "dpm++2m-25": 25},
    "tiny-dit-l": {"ddim-50": 50},
    "tiny-flux": {"euler-28": 28, "euler-50": 50},
    "tiny-pixart": {"ddim-50": 50},
    "tiny-sd": {"ddim-50": 50},
    "tiny-sgdiff": {"ddim-50": 50},
    "tiny-wan": {"unipc-50": 50},
}


def take_timing(calibration: Calibration, path: Path) -> None:
    """Take the seconds a step of another file of the same model, scheduler and steps (ValueError for any other)."""
    other = Calibration.load(path)
    if other.key != calibration.key:
        raise ValueError(f"{path} is of another model, scheduler or number of steps; its seconds are not for this one")
    calibration.timing = other.timing


def conditions_of(model: str, count: int) -> list[object]:
    """Choose what is drawn: all labels in turn, or captions spread over those that the model was trained on."""
    captions = captions_of(model)
    if not captions:
        return list(range(10))
    # The middles of as many equal stretches: the seeds are no benchmark's, and few of the captions are.
    distance = len(captions) / count
    return [captions[int((place + 0.5) * distance)] for place in range(count)]


def main() -> None:
    """Write one file for every grid."""
    there = shipped_models()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(GRIDS), default="tiny-dit", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="GRID", help="grids of the model (default: all)")
    parser.add_argument("--num_images", type=positive, default=16, help="to learn from (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, help="default: the model's folder calibration/trajectory")
    parser.add_argument("--timing_of", type=Path, metavar="FOLDER", help="take the seconds a step from its files")
    args = parser.parse_args()
    if args.model not in there:
        parser.error(f"--model: {args.model} is not in this installation")
    grids = GRIDS[args.model]
    for name in args.only or grids:
        if name not in grids:
            parser.error(f"--only: {args.model} has no grid {name!r}, but {', '.join(grids)}")
    output = args.output_dir or there[args.model] / "calibration" / "trajectory"
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for name in args.only or grids:
        loaded = load_pipeline(args.model)
        if name.startswith("dpm"):
            config = loaded.pipeline.scheduler.config
            loaded.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
        count = args.num_images
        request = Generation(conditions_of(args.model, count), count, AT_ONCE, SEED, grids[name])
        batches = [range(first, min(first + AT_ONCE, count)) for first in range(0, count, AT_ONCE)]
        engine = attach_trajectory(loaded.pipeline, adacorr_budget=BUDGETS[0], store=output / "unused")
        engine.stores = False
        calibration = engine.learn_from([arguments_of(loaded, request, batch) for batch in batches], BUDGETS[1:])
        engine.remove()
        calibration.notes |= {"model": args.model, "seed": SEED, "guidance_scale": loaded.spec.guidance_scale}
        if args.timing_of is not None:
            take_timing(calibration, args.timing_of / f"{name}.safetensors")
        calibration.save(output / f"{name}.safetensors", compact=True)
        print(name)
        for row in choices(calibration).columns[:4]:
            print("  ", row.header, *row.cells)


if __name__ == "__main__":
    main()
