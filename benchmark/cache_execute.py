"""Compare cache methods on one model: quality, speed and hit rate, measured side by side in one run.

    python benchmark/cache_execute.py --cache_methods None Tea Tea+AdaCorrection

Writes cache_execute_results.json, the images, comparison_sheet.png and report.html into --output_dir.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.core.console import check_output_folder, quiet_libraries  # noqa: E402

quiet_libraries()

from benchmark.judge import Judge  # noqa: E402
from benchmark.measure import DEFAULT_PROMPTS, Run, Sampling, conditions_of, measure  # noqa: E402
from benchmark.rows import SUFFIX, build_rows  # noqa: E402
from xfuser.config.arguments import (  # noqa: E402
    add_correction_arguments,
    add_model_arguments,
    add_sampling_arguments,
    correction_settings,
)
from xfuser.core.distributed.environment import choose_device, describe_environment  # noqa: E402
from xfuser.model_executor.pipelines import MODEL_TYPES, LoadedPipeline, load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.generate import save_image, write_json  # noqa: E402
from xfuser.report import comparison_sheet, results_table, write_report  # noqa: E402

RESULTS = "cache_execute_results.json"
SHEET_COLUMNS = 12


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(result, list(MODEL_TYPES))
    add_sampling_arguments(result)
    result.set_defaults(num_images=128)
    group = result.add_argument_group("comparison")
    group.add_argument(
        "--cache_methods",
        nargs="+",
        default=["All"],
        metavar="METHOD",
        help="None, a base method (Tea, Fb), X+AdaCorrection, or All (default: All)",
    )
    group.add_argument(
        "--cache_ratio_threshold",
        type=float,
        help="rel_l1_thresh of every base method (default: the model type's own, by method)",
    )
    group.add_argument("--prompt", nargs="+", default=list(DEFAULT_PROMPTS), help="prompts, taken in turn")
    group.add_argument(
        "--evaluation",
        type=Path,
        help="folder with classifier.safetensors and reference.safetensors (default: the model's own "
        "evaluation folder, else the shipped one for tiny-dit)",
    )
    group.add_argument("--output_dir", type=Path, default=Path("cache_execute_results"), help="default: %(default)s")
    add_correction_arguments(result)
    return result


def evaluation_folder(loaded: LoadedPipeline, args: argparse.Namespace) -> Path | None:
    """Where the feature network and the reference statistics are; ``None`` where none fits the model."""
    candidates = [args.evaluation] if args.evaluation else []
    if args.model and not args.evaluation:
        candidates.append(Path(args.model) / "evaluation")
    for folder in candidates:
        if (folder / "classifier.safetensors").is_file() and (folder / "reference.safetensors").is_file():
            return folder
    if args.evaluation:
        raise ValueError(f"--evaluation: {args.evaluation} has no classifier.safetensors and reference.safetensors")
    if not loaded.spec.evaluated:
        return None
    default = loaded.spec.default
    return Path(default()) / "evaluation" if callable(default) else None


def write_images(runs: list[Run], folder: Path) -> dict[str, list[str]]:
    """Every image as a PNG, by method; paths are relative to the results file."""
    paths: dict[str, list[str]] = {}
    for run in runs:
        name = "".join(letter if letter.isalnum() or letter in "-+" else "_" for letter in run.row.method).strip("_")
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        paths[run.row.method] = []
        for index, pixels in enumerate(run.pixels):
            path = Path("images") / name / f"image_{index:05d}.png"
            save_image(pixels, folder / path)
            paths[run.row.method].append(str(path))
    return paths


def traces_of(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Decisions and errors of each corrected row's last batch, for the heat maps."""
    traces = {}
    for run in runs:
        if run.row.config.mode is None:
            continue
        summary = run.summary
        names = {"evaluated": "plan", "predicted": "predicted_errors", "true": "true_errors", "weights": "weights"}
        branch = next(iter(summary["plan"]))
        traces[run.row.method] = {name: summary[source][branch] for name, source in names.items()}
    return traces


def execute(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the comparison and write its files; returns the document."""
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    check_output_folder(args.output_dir)
    spec = MODEL_TYPES[args.model_type]
    thresholds = dict(spec.thresholds)
    if args.cache_ratio_threshold is not None:
        thresholds = dict.fromkeys(thresholds, args.cache_ratio_threshold)
    corrects = args.enable_adacorrection or any(name == "All" or SUFFIX in name for name in args.cache_methods)
    correction = correction_settings(args, corrects)
    rows = build_rows(args.cache_methods, thresholds, args.enable_adacorrection, correction, args.approximation)
    loaded = load_pipeline(args.model_type, args.model, device)
    folder = evaluation_folder(loaded, args)
    sampling = Sampling(
        args.num_images,
        args.batch_size,
        args.num_inference_steps,
        spec.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        args.seed,
        tuple(args.prompt),
        args.height,
        args.width,
    )
    console.print(f"{loaded.name}: {len(rows)} methods, {args.num_images} images each, on {device}")
    if loaded.name.startswith("toy-"):
        console.print("This is a toy with random weights: it shows decisions and speed, not quality. See --model.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = measure(loaded, rows, sampling)
    paths = write_images(runs, args.output_dir)
    judge = Judge(loaded, conditions_of(loaded, sampling, 0, args.num_images), folder)
    document = {
        "schema": 1,
        "environment": describe_environment(device),
        "model": {"name": loaded.name, "type": args.model_type, "dtype": str(loaded.dtype).removeprefix("torch.")},
        "settings": vars(sampling) | {"prompts": list(sampling.prompts), "cache_methods": args.cache_methods},
        "results": judge.results(runs, paths),
        "comparisons": judge.comparisons(runs),
    }
    write_json(args.output_dir / RESULTS, document)
    shown = {run.row.method: list(run.pixels[:SHEET_COLUMNS]) for run in runs}
    comparison_sheet(shown, columns=SHEET_COLUMNS).save(args.output_dir / "comparison_sheet.png")
    write_report(args.output_dir / "report.html", document, shown, traces_of(runs))
    return document


def main() -> None:
    args = parser().parse_args()
    # A log file has no width of its own; the table needs this much.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        document = execute(args, console)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise SystemExit(f"cache_execute: {error}") from error
    console.print(results_table(document, console.width))
    for line in document["comparisons"]:
        difference = line["psnr_difference"]
        console.print(
            f"{line['method']} against {line['against']}: PSNR {difference['value']:+.2f} dB "
            f"[{difference['low']:+.2f}, {difference['high']:+.2f}], images/s × {line['images_per_second_ratio']:.3f}",
            markup=False,
        )
    console.print(f"report: {args.output_dir / 'report.html'}")


if __name__ == "__main__":
    main()
