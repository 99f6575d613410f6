"""Make the calibrations of the trajectory that come with tiny-dit: 16 images, of seeds that no benchmark uses.

    python scripts/calibrate_tiny_dit.py --threads 1

Seconds a step belong to the machine and to what else it did. On a busy one, ``--timing_of`` takes those of earlier
files. benchmark/compare_calibrations.py tells whether new files are better than the old ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler

from xfuser.model_executor.cache.adacorrection.trajectory import attach_trajectory
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import Calibration
from xfuser.model_executor.pipelines.calibrate import arguments_of, choices
from xfuser.model_executor.pipelines.generate import Generation
from xfuser.model_executor.pipelines.loading import load_pipeline, shipped_tiny_dit

SEED = 1 << 29
IMAGES = 16
BUDGETS = (0.6, 0.5, 0.44, 0.4, 0.38, 0.35, 0.3, 0.26, 0.23, 0.22, 0.2, 0.16)
GRIDS = {"ddim-20": 20, "ddim-28": 28, "ddim-50": 50, "dpm++2m-25": 25}


def take_timing(calibration: Calibration, path: Path) -> None:
    """Take the seconds a step of another file of the same model, scheduler and steps (ValueError for any other)."""
    other = Calibration.load(path)
    if other.key != calibration.key:
        raise ValueError(f"{path} is of another model, scheduler or number of steps; its seconds are not for this one")
    calibration.timing = other.timing


def main() -> None:
    """Write one file for every grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--only", choices=GRIDS, nargs="+", default=list(GRIDS), help="grids (default: all)")
    parser.add_argument("--output_dir", type=Path, default=shipped_tiny_dit() / "calibration" / "trajectory")
    parser.add_argument("--timing_of", type=Path, metavar="FOLDER", help="take the seconds a step from its files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.only:
        loaded = load_pipeline("tiny-dit")
        if name.startswith("dpm"):
            config = loaded.pipeline.scheduler.config
            loaded.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
        request = Generation(list(range(10)), IMAGES, IMAGES, SEED, GRIDS[name])
        engine = attach_trajectory(loaded.pipeline, adacorr_budget=BUDGETS[0], store=args.output_dir / "unused")
        engine.stores = False
        calibration = engine.learn_from([arguments_of(loaded, request, range(IMAGES))], BUDGETS[1:])
        engine.remove()
        calibration.notes |= {"model": "tiny-dit", "seed": SEED, "guidance_scale": 1.5}
        if args.timing_of is not None:
            take_timing(calibration, args.timing_of / f"{name}.safetensors")
        calibration.save(args.output_dir / f"{name}.safetensors", compact=True)
        print(name)
        for row in choices(calibration).columns[:4]:
            print("  ", row.header, *row.cells)


if __name__ == "__main__":
    main()
