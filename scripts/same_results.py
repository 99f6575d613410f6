"""Run methods, modes and meshes on an earlier state of this repository and on the present one, and compare.

    python scripts/same_results.py HEAD~5            # images bit for bit, plan digests, what summaries count
    python scripts/same_results.py v1 --only mesh    # the runs on several ranks only

Fixed seeds, one thread. The reference is checked out beside the working tree and runs with this interpreter's packages.
Exits with 1 where a run differs, or exists on one side only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
SEED = 7
# What is compared of a summary; fields may be renamed or added, and times differ.
COUNTED = ("hit_rate", "flops_saved", "evaluated_share", "proposed_share", "denoiser_calls", "non_finite", "steps")
TOYS = ("flux", "pixart", "sd3")
CALIBRATED = 20  # steps of a calibration that is shipped

_TINY = {
    "no cache": {},
    "Tea": {"use_cache": "Tea", "rel_l1_thresh": 0.2},
    "Fb": {"use_cache": "Fb", "rel_l1_thresh": 0.2},
    "Fast": {"use_cache": "Fast", "rel_l1_thresh": 0.3, "significance": 0},
    "Fast with moving tokens": {"use_cache": "Fast", "rel_l1_thresh": 0.1, "motion_threshold": 0.2},
    "Interval": {"use_cache": "Interval"},
}
_CORRECTED = {
    "budget": {"enable_adacorrection": True},
    "budget .4, taylor-2": {"enable_adacorrection": True, "adacorr_budget": 0.4, "approximation": "taylor-2"},
    "bound": {"enable_adacorrection": True, "adacorr_mode": "bound"},
    "gate": {"enable_adacorrection": True, "adacorr_mode": "gate"},
    "blend": {"enable_adacorrection": True, "adacorr_mode": "blend"},
}
_MESHES = {
    "ulysses 2": ["--ulysses_degree", "2"],
    "ring 2": ["--ring_degree", "2"],
    "cfg 2": ["--use_cfg_parallel"],
    "pipefusion 2": ["--pipefusion_parallel_degree", "2", "--num_pipeline_patch", "2"],
    "data 2": ["--data_parallel_degree", "2"],
}
_ON_MESHES = {
    "Tea": ["--use_cache", "Tea", "--rel_l1_thresh", "0.2"],
    "Fb+budget": ["--use_cache", "Fb", "--enable_adacorrection", "--adacorr_budget", "0.5"],
}


def single_cases() -> dict[str, tuple[str, dict[str, Any], int]]:
    """List the runs in one process: model type, settings of the cache, steps."""
    cases = {f"tiny-dit, {name}": ("tiny-dit", settings, STEPS) for name, settings in _TINY.items()}
    for method in ("Tea", "Fb"):
        for mode, settings in _CORRECTED.items():
            cases[f"tiny-dit, {method}+{mode}"] = ("tiny-dit", _TINY[method] | settings, STEPS)
    for toy in TOYS:
        cases[f"{toy}, Fb"] = (toy, {"use_cache": "Fb", "rel_l1_thresh": 0.5}, STEPS)
        settings = {"use_cache": "Tea", "rel_l1_thresh": 0.5, "enable_adacorrection": True, "adacorr_budget": 0.5}
        cases[f"{toy}, Tea+budget"] = (toy, settings, STEPS)
    for budget in (0.3, 0.5):
        cases[f"tiny-dit, trajectory {budget}"] = ("tiny-dit", {"adacorr_budget": budget}, CALIBRATED)
    return cases


def run_single(tree: Path) -> dict[str, Any]:
    """Run all cases of one process with the package of a tree, in this process."""
    sys.path.insert(0, str(tree))
    import torch

    torch.set_num_threads(1)
    import xfuser
    from xfuser.model_executor.pipelines import load_pipeline

    if Path(xfuser.__file__).parent.parent != tree:
        raise RuntimeError(f"the package was imported from {xfuser.__file__} and not from {tree}")
    shipped = tree / "xfuser" / "assets" / "tiny-dit" / "calibration" / "trajectory" / f"ddim-{CALIBRATED}.safetensors"
    loaded: dict[str, Any] = {}
    found = {}
    for name, (model, settings, steps) in single_cases().items():
        if model not in loaded:
            loaded[model] = load_pipeline(model)
        pipeline = loaded[model].pipeline
        pipeline.set_progress_bar_config(disable=True)
        if steps == CALIBRATED:
            settings = settings | {"calibration": str(shipped)}
        engine = xfuser.apply_cache_on_pipeline(pipeline, **settings) if settings else None
        generator = torch.Generator().manual_seed(SEED)
        condition: dict[str, Any] = {"class_labels": [1, 8]} if model == "tiny-dit" else {"prompt": ["a", "b"]}
        if model != "tiny-dit":
            condition |= {"height": 64, "width": 64}
        if model == "pixart":  # its size bins start at 512 pixels
            condition |= {"use_resolution_binning": False}
        images = pipeline(**condition, num_inference_steps=steps, generator=generator, output_type="np").images
        summary = {} if engine is None else engine.summary()
        found[name] = _result(images.tobytes(), summary)
        if engine is not None:
            engine.remove()
    return found


def run_meshes(tree: Path) -> dict[str, Any]:
    """Run the cases on two ranks, each through the tree's own command."""
    found = {}
    for mesh, degrees in _MESHES.items():
        for method, settings in _ON_MESHES.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(tree / "scripts" / "generate.py"), *degrees, *settings]
                command += ["--class_label", "1", "8", "--num_images", "2", "--threads", "1", "--save_raw"]
                command += ["--num_inference_steps", str(STEPS), "--output_dir", f"{folder}/out"]
                ended = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=_environment(tree))
                if ended.returncode:
                    raise RuntimeError(f"{mesh}, {method} in {tree}: {ended.stderr.strip()[-400:]}")
                document = json.loads(Path(folder, "out", "statistics.json").read_text(encoding="utf-8"))
                images = Path(folder, "out", "images.npy").read_bytes()
                found[f"mesh {mesh}, {method}"] = _result(images, document["cache"])
    return found


def _result(images: bytes, summary: dict[str, Any]) -> dict[str, Any]:
    counted = {name: summary[name] for name in COUNTED if name in summary}
    return {"images": hashlib.sha256(images).hexdigest(), "plan": summary.get("plan_digest"), **counted}


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}


def _measured(tree: Path, only: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if only != "mesh":
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(tree)]
        ended = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, text=True, env=_environment(tree))
        if ended.returncode:
            raise SystemExit(f"same_results: the runs in {tree} have failed; see above")
        found |= json.loads(ended.stdout.splitlines()[-1])
    if only != "single":
        found |= run_meshes(tree)
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List what differs, a line each."""
    lines = [f"{name}: only in the reference" for name in before if name not in after]
    lines += [f"{name}: not in the reference" for name in after if name not in before]
    for name in (each for each in before if each in after):
        both = before[name].keys() & after[name].keys()
        differ = sorted(key for key in both if before[name][key] != after[name][key])
        lines += [f"{name}: {key} {before[name][key]} -> {after[name][key]}" for key in differ]
    return lines


def main() -> None:
    """Compare the working tree with a reference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("reference", nargs="?", default="HEAD", help="a git reference; default: %(default)s")
    parser.add_argument("--only", choices=("single", "mesh"), help="the runs in one process, or on several ranks")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(run_single(args.worker)))
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "reference"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), args.reference], check=True)
        try:
            before = _measured(tree, args.only)
            after = _measured(ROOT, args.only)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    lines = compare(before, after)
    print("\n".join(lines) if lines else f"{len(after)} runs: images, plans and counts are the same")
    raise SystemExit(1 if lines else 0)


if __name__ == "__main__":
    main()
