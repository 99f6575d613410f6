"""Compare cache methods on one model: quality, speed and hit rate, measured side by side in one run.

    python benchmark/cache_execute.py --cache_methods None Tea Tea+AdaCorrection
    python benchmark/cache_execute.py --cache_methods Tea+AdaCorrection --adacorr_mode gate --match_compute
    python benchmark/cache_execute.py --sweep
    torchrun --nproc_per_node=2 benchmark/cache_execute.py --ulysses_degree 2

Writes cache_execute_results.json, the images, comparison_sheet.png and report.html into --output_dir. A row that fails
does not keep the others from being written; the exit code is then 1, and 3 where a cache never hit.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.core.console import check_output_folder, quiet_libraries  # noqa: E402

quiet_libraries()

from benchmark.common import (  # noqa: E402
    HOW_MANY,
    add_evaluation_arguments,
    announce,
    bases_of,
    describe_run,
    evaluation_folder,
    sampling_of,
)
from benchmark.judge import Judge  # noqa: E402
from benchmark.measure import measure  # noqa: E402
from benchmark.outcomes import Run, exit_code, failures, remarks  # noqa: E402
from benchmark.rows import (  # noqa: E402
    SUFFIX,
    Correction,
    Row,
    base_names,
    build_rows,
    lacks_calibration,
    on_trajectory,
    wanted_methods,
)
from benchmark.sweep import POINTS, RANGE, Sweep, build_sweep, left_out  # noqa: E402
from evaluation.report import comparison_sheet, frontier_table, results_table, write_report  # noqa: E402
from xfuser.config.arguments import (  # noqa: E402
    add_base_arguments,
    add_correction_arguments,
    add_model_arguments,
    add_parallel_arguments,
    add_sampling_arguments,
    correction_settings,
    parallel_config,
    positive,
)
from xfuser.config.parallel import ParallelConfig  # noqa: E402
from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.config.refused import refuse_unsupported  # noqa: E402
from xfuser.core.distributed.environment import (  # noqa: E402
    choose_device,
    join_processes,
    launched,
    leave_processes,
    world_size,
)
from xfuser.core.distributed.launch import start_processes  # noqa: E402
from xfuser.core.distributed.mesh import ParallelMesh  # noqa: E402
from xfuser.core.distributed.shutdown import begin_together, end, watch  # noqa: E402
from xfuser.core.files import write_json  # noqa: E402
from xfuser.model_executor.cache.adacorrection.trajectory.calibration import is_trajectory  # noqa: E402
from xfuser.model_executor.cache.policies import POLICIES  # noqa: E402
from xfuser.model_executor.parallel import check_combination  # noqa: E402
from xfuser.model_executor.pipelines import MODEL_TYPES, LoadedPipeline, load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.choosing import resolve_model  # noqa: E402
from xfuser.model_executor.pipelines.generate import save_image  # noqa: E402
from xfuser.model_executor.pipelines.geometry import geometry_of  # noqa: E402
from xfuser.model_executor.pipelines.shipped import shipped_trajectory  # noqa: E402

NAME = "cache_execute"
RESULTS = "cache_execute_results.json"
SHEET_COLUMNS = 12


def parser() -> argparse.ArgumentParser:
    result = OneLineParser(description=__doc__.splitlines()[0])
    add_model_arguments(result, list(MODEL_TYPES))
    add_sampling_arguments(result, HOW_MANY)
    group = result.add_argument_group("comparison")
    group.add_argument(
        "--cache_methods",
        nargs="+",
        default=["All"],
        metavar="METHOD",
        help=f"None, a base method ({', '.join(base_names())}), X+AdaCorrection, or All: every method that looks "
        "at what it caches, plain and corrected (default: All)",
    )
    group.add_argument(
        "--cache_ratio_threshold",
        type=float,
        help="rel_l1_thresh of every base method (default: the model type's own, by method)",
    )
    group.add_argument(
        "--match_compute",
        action="store_true",
        help="search each corrected row's tolerance or budget until it saves as many FLOPs as its base method",
    )
    group.add_argument(
        "--sweep",
        type=positive,
        nargs="?",
        const=POINTS,
        metavar="N",
        help=f"each method at N thresholds (default: {POINTS}), spaced geometrically from {RANGE[0]:g} to {RANGE[1]:g} "
        f"times its own; {swept()}",
    )
    add_evaluation_arguments(group, "cache_execute_results")
    add_base_arguments(result)
    add_correction_arguments(result)
    add_parallel_arguments(result)
    return result


def swept() -> str:
    """Say what other settings a sweep tries, by method."""
    found = ((base, POLICIES[base].sweep) for base in base_names())
    return "; ".join(f"{base} at {', '.join(f'{v:g}' for v in sweep[1])}" for base, sweep in found if sweep is not None)


def write_images(runs: list[Run], folder: Path) -> dict[str, list[str]]:
    """Every image that was kept as a PNG, by method; paths are relative to the results file."""
    paths: dict[str, list[str]] = {}
    for run in runs:
        if not run.row.kept:
            continue
        name = "".join(letter if letter.isalnum() or letter in "-+" else "_" for letter in run.row.method).strip("_")
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        paths[run.row.method] = []
        for index, pixels in enumerate(run.pixels):
            path = Path("images") / name / f"image_{index:05d}.png"
            save_image(pixels, folder / path)
            paths[run.row.method].append(str(path))
    return paths


def stills(pixels: np.ndarray) -> list[np.ndarray]:
    """Images [N, H, W, C] one by one; of videos [N, F, H, W, C], each one's frame in the middle."""
    return list(pixels if pixels.ndim == 4 else pixels[:, pixels.shape[1] // 2])


def traces_of(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Decisions and errors of each corrected row's last batch, for the heat maps."""
    traces = {}
    for run in runs:
        if run.row.config.mode is None or not run.row.kept or run.row.trajectory is not None or run.inactive:
            continue
        summary = run.summary
        names = {"evaluated": "plan", "predicted": "predicted_errors", "true": "true_errors", "weights": "weights"}
        branch = next(iter(summary["plan"]))
        traces[run.row.method] = {name: summary[source][branch] for name, source in names.items()}
    return traces


def trajectories_of(runs: list[Run], judge: Judge) -> dict[str, dict[str, Any]]:
    """The last plan and its weights of each row on the trajectory, and what was predicted of its images."""
    return {
        run.row.method: {
            "kinds": run.summary["plan"],
            "weights": run.summary["weights"],
            "psnr": [(run.summary["predicted"]["psnr"], judge.psnr_of(run).tolist())],
        }
        for run in runs
        if run.row.trajectory is not None and not run.inactive and run.summary.get("predicted")
    }


def trajectory_calibration(args: argparse.Namespace, corrects: bool, named: str | None) -> Path | None:
    """The calibration with which corrected rows work on the trajectory: the one named, or the one shipped.

    ``None`` where a setting of the block level is named, ranks share the images, or there is none.

    Raises:
        ValueError: A calibration of the trajectory is named where nothing would read it.
    """
    ours = named if args.calibration is None else None
    blocks = correction_settings(args, corrects).keys() - {"enable_adacorrection"} or args.approximation
    blocks = blocks or args.match_compute or args.sweep or parallel_config(args).world_size > 1
    if not corrects or blocks:
        if ours is not None:
            raise ValueError(
                f"--calibration {ours} is of the trajectory: it goes with X+AdaCorrection on one process, without "
                "settings of the blocks' correction, --match_compute and --sweep"
            )
        return None
    if named is not None:
        return None if ours is None else Path(ours)
    return None if args.model is not None else shipped_trajectory(args.model_type, args.num_inference_steps)


def rows_to_run(args: argparse.Namespace) -> tuple[list[Row], Sweep | None]:
    """The rows that a command line asks for.

    Raises:
        ValueError: Its settings are unknown or contradict each other.
    """
    named = args.calibration
    if named is not None and Path(named).is_file() and is_trajectory(Path(named)):
        args.calibration = None  # nothing of it is for the base methods
    bases = bases_of(args, args.cache_ratio_threshold)
    corrects = args.enable_adacorrection or any(name == "All" or SUFFIX in name for name in args.cache_methods)
    if args.match_compute and not corrects:
        raise ValueError("--match_compute matches corrected rows; name X+AdaCorrection, or --enable_adacorrection")
    calibration = trajectory_calibration(args, corrects, named)
    correction = Correction(correction_settings(args, corrects), args.approximation, args.match_compute)
    wanted = wanted_methods(args.cache_methods, bases, args.enable_adacorrection)
    if args.sweep is None:
        rows = build_rows(wanted, bases, correction)
        return (rows if calibration is None else on_trajectory(rows, calibration)), None
    for dial, values in (POLICIES[base].sweep or ("", ()) for base in base_names()):
        if dial and getattr(args, dial) is not None:
            raise ValueError(f"--{dial}: --sweep takes {', '.join(map(str, values))} in turn; leave one of them out")
    sweep = build_sweep(wanted, bases, correction, args.sweep)
    return sweep.rows, sweep


def check_parallel(args: argparse.Namespace, parallel: ParallelConfig, rows: list[Row]) -> None:
    """Refuse degrees that do not fit the processes, the model or the rows, before anything is loaded (ValueError)."""
    if parallel.data_parallel_degree > 1:
        raise ValueError("--data_parallel_degree: rows are compared image by image on the same ranks; leave it out")
    if parallel.pipefusion_parallel_degree > 1 and args.calibration is not None:
        raise ValueError(
            "--calibration is checked against all weights, and a stage of --pipefusion_parallel_degree keeps only its "
            "own from row to row; leave one of them out"
        )
    for row in rows:
        check_combination(row.config, parallel)
    if launched():
        parallel.check_world(world_size())
    if parallel.world_size > 1:
        geometry_of(args.model_type, args.model, args.height, args.width).check(parallel)


def execute(args: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    """Run the comparison and write its files; returns the document, on the first rank."""
    resolve_model(args)
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    check_output_folder(args.output_dir)
    rows, sweep = rows_to_run(args)
    sampling = sampling_of(args)
    parallel = parallel_config(args)
    if parallel.pipefusion_parallel_degree > 1 and parallel.pipefusion_max_lag is None:
        # Else the uncached row alone would read old keys and values, and all others be measured against that.
        parallel = replace(parallel, pipefusion_max_lag=0)
    check_parallel(args, parallel, rows)
    if parallel.world_size > 1 and not launched():
        raise SystemExit(start_processes(parallel.world_size, sys.argv[1:], Path(__file__).resolve()))
    if launched():
        watch(NAME)
    join_processes(device)
    mesh = ParallelMesh(parallel, device)

    def begin() -> tuple[LoadedPipeline, Judge]:
        loaded = load_pipeline(args.model_type, args.model, device)
        return loaded, Judge.of(loaded, evaluation_folder(loaded, args))

    loaded, judge = begin_together(begin)
    if not mesh.is_first:
        measure(loaded, rows, sampling, lenient=sweep is not None, mesh=mesh)
        return None
    console.print(announce(loaded, len(rows), sampling))
    if "All" in args.cache_methods:
        for base, settings in bases_of(args, args.cache_ratio_threshold).items():
            if lacks_calibration(base, settings):
                console.print(f"{base} is left out: it needs --calibration, a file of `xdit calibrate`", markup=False)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    everything = measure(loaded, rows, sampling, judge.see, lenient=sweep is not None, mesh=mesh)
    runs = [run for run in everything if run.left_out is None]
    results = judge.results(runs, write_images(runs, args.output_dir))
    spread = {"parallel": vars(parallel)} if parallel.world_size > 1 else {}
    document = {
        **describe_run(loaded, sampling, {"cache_methods": args.cache_methods} | spread),
        "distance": judge.distance,
        "results": results,
        "comparisons": judge.comparisons(runs),
        "failures": failures(everything),
    }
    if sweep is not None:
        document["sweep"] = sweep.to_dict(left_out(everything), results)
    write_json(args.output_dir / RESULTS, document)
    shown = {run.row.method: stills(run.pixels[:SHEET_COLUMNS]) for run in runs if run.row.kept}
    comparison_sheet(shown, columns=SHEET_COLUMNS).save(args.output_dir / "comparison_sheet.png")
    write_report(args.output_dir / "report.html", document, shown, traces_of(runs), trajectories_of(runs, judge))
    return document


def print_comparisons(document: dict[str, Any], console: Console) -> None:
    for line in document["comparisons"]:
        difference = line["psnr_difference"]
        console.print(
            f"{line['method']} against {line['against']}: PSNR {difference['value']:+.2f} dB "
            f"[{difference['low']:+.2f}, {difference['high']:+.2f}], images/s × {line['images_per_second_ratio']:.3f}",
            markup=False,
        )


def main() -> None:
    # A log file has no width of its own; the table needs this much.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        refuse_unsupported(sys.argv[1:])
        args = parser().parse_args()
        document = execute(args, console)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if world_size() > 1:
            end(NAME, error)
        raise SystemExit(f"{NAME}: {error}") from error
    leave_processes()
    if document is None:
        return
    if "sweep" in document:
        # What belongs to a base method is left out with it, for the same reason.
        for reason in dict.fromkeys(document["sweep"]["left_out"].values()):
            console.print(f"left out: {reason}", markup=False)
        console.print(frontier_table(document))
    else:
        console.print(results_table(document, console.width))
        print_comparisons(document, console)
    console.print(f"Fréchet distances: {document['distance']}", markup=False)
    for remark in remarks(document):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {args.output_dir / 'report.html'}")
    if code := exit_code(document):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
