"""Compare each base method with + AdaCorrection at equal compute, on every trained model that comes with the package.

    python benchmark/cross_model.py                                    # the paper's cross-model table, in small
    python benchmark/cross_model.py --models tiny-dit --cache_methods Tea Fb --num_images 128

A cell is one model and one base method: its rows are made side by side from the same noise, with the uncached images,
and written at once into MODEL/METHOD.json. A run that was stopped goes on with the cells that are not there. At the
end cross_model.json and cross_model.md hold them all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.core.console import check_output_folder, quiet_libraries  # noqa: E402

quiet_libraries()

from benchmark import cache_execute  # noqa: E402
from benchmark.common import HOW_MANY, bases_of, describe_run, evaluation_folder, sampling_of  # noqa: E402
from benchmark.judge import Judge  # noqa: E402
from benchmark.measure import measure  # noqa: E402
from benchmark.outcomes import failures  # noqa: E402
from benchmark.rows import SUFFIX, base_names, lacks_calibration, wanted_methods  # noqa: E402
from evaluation.metrics.colour import ColourFeatures  # noqa: E402
from xfuser.config.arguments import positive  # noqa: E402
from xfuser.config.parser import OneLineParser  # noqa: E402
from xfuser.config.spelling import not_known  # noqa: E402
from xfuser.core.files import write_json, write_text  # noqa: E402
from xfuser.model_executor.pipelines import MODEL_TYPES, load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.choosing import resolve_model  # noqa: E402
from xfuser.model_executor.pipelines.shipped import (  # noqa: E402
    shipped_models,
    shipped_trajectory,
)

NAME = "cross_model"
COLUMNS = ("model", "method", "speed-up", "evaluated", "PSNR (dB)", "worst tenth", "SSIM", "Fréchet", "FID", "KID ×10³")
COLUMNS += ("PSNR over base (dB)", "Fréchet, ratio to base")


def parser() -> OneLineParser:
    """Make the parser of the command line."""
    result = OneLineParser(description=__doc__.splitlines()[0])
    result.add_argument("--models", nargs="+", help="shipped models (default: all that are in this installation)")
    result.add_argument("--cache_methods", nargs="+", default=["All"], help="base methods (default: the paper's five)")
    result.add_argument("--num_images", type=positive, help=HOW_MANY)
    result.add_argument("--batch_size", type=positive, default=16, help="images at once (default: %(default)s)")
    result.add_argument("--num_inference_steps", type=positive, help="denoising steps (default: each model's own)")
    result.add_argument("--seed", type=int, default=400000, help="no calibration's seeds (default: %(default)s)")
    result.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")
    result.add_argument("--output_dir", type=Path, default=Path("cross_model_results"), help="default: %(default)s")
    return result


def command_of(args: argparse.Namespace, model: str) -> argparse.Namespace:
    """What one model's cells would be on the command line of cache_execute, settled."""
    given = ["--model", model, "--cache_methods", *args.cache_methods, "--enable_adacorrection"]
    for name in ("num_images", "batch_size", "num_inference_steps", "seed"):
        if getattr(args, name) is not None:
            given += [f"--{name}", str(getattr(args, name))]
    command = cache_execute.parser().parse_args(given)
    resolve_model(command)
    return command


def methods_of(command: argparse.Namespace) -> list[str]:
    """The base methods of a model's cells; those that need a calibration which is not there are left out of All."""
    bases = bases_of(command, None)
    wanted = list(wanted_methods(command.cache_methods, bases, True))
    lacking = [base for base in wanted if lacks_calibration(base, bases[base])]
    if lacking:
        raise ValueError(f"--cache_methods {lacking[0]} needs a calibration that {command.model_type} does not bring")
    return wanted


def cells_of(args: argparse.Namespace) -> list[tuple[argparse.Namespace, str]]:
    """All cells of the table, each with the command line of its model (ValueError for a model that is not there)."""
    there = list(shipped_models())
    cells = []
    for model in args.models or there:
        if model not in there:
            raise ValueError(f"--models: {model!r} {not_known(model, there)}")
        command = command_of(args, model)
        cells += [(command, method) for method in methods_of(command)]
    return cells


def settings_of(command: argparse.Namespace, method: str) -> dict[str, Any]:
    """What a cell's results depend on, as its file says it; a cell with the same is not made again."""
    sampling = sampling_of(command)
    names = ("num_images", "batch_size", "num_inference_steps", "seed")
    calibration = shipped_trajectory(command.model_type, command.num_inference_steps)
    named = {"model_type": command.model_type, "method": method} | {name: getattr(sampling, name) for name in names}
    if MODEL_TYPES[command.model_type].conditioned_on != "label":
        named["prompt"] = list(sampling.prompts)
    colour = ColourFeatures.installed() and not MODEL_TYPES[command.model_type].evaluated
    return named | {"trajectory": calibration.name if calibration else None, "colour": colour}


def finished(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a cell that is there; ``None`` where it is not.

    Raises:
        ValueError: It was made with other settings.
    """
    if not path.is_file():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    made = document.get("cell", {})
    for name, value in settings.items():
        if made.get(name) != value:
            raise ValueError(
                f"--output_dir: {path} was made with {name} {made.get(name)!r}, and this is {value!r}; name another "
                "folder, or remove the file"
            )
    return document


def measure_cell(command: argparse.Namespace, method: str) -> dict[str, Any]:
    """Make one cell: the uncached images, the base method, its corrections and fewer steps, side by side."""
    one = argparse.Namespace(**vars(command))
    one.cache_methods = [method + SUFFIX]
    rows, _ = cache_execute.rows_to_run(one)
    loaded, sampling = load_pipeline(one.model_type), sampling_of(one)
    judge = Judge.of(loaded, evaluation_folder(loaded, one))
    everything = measure(loaded, rows, sampling, judge.see)
    runs = [run for run in everything if run.left_out is None]
    return {
        **describe_run(loaded, sampling, {"cache_methods": one.cache_methods}),
        "cell": settings_of(command, method),
        "distance": judge.distance,
        "results": judge.results(runs, {}),
        "comparisons": judge.comparisons(runs),
        "failures": failures(everything),
    }


def lines_of(cells: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table's lines, a row each; the uncached row stands in a model's first cell only."""
    lines, seen = [], set()
    for cell in cells:
        model = cell["cell"]["model_type"]
        for row in cell["results"]:
            if row["base"] is None and model in seen:
                continue
            seen.add(model)
            lines.append(line_of(model, row, cell["comparisons"]))
    return lines


def line_of(model: str, row: Mapping[str, Any], comparisons: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """One row's cells as text, in the order of `COLUMNS`."""
    over = next((x for x in comparisons if (x["method"], x["against"]) == (row["method"], row["base"])), {})
    worst = row["psnr_worst_tenth"]
    inactive = bool(row["inactive"])
    return (
        model,
        row["method"] + (" (never hit)" if inactive else ""),
        f"{row['speedup']:.2f}",
        f"{1 - row['hit_rate']:.0%}" if row["settings"].get("num_inference_steps") is None else f"{fewer(row):.0%}",
        interval(None if inactive else row["psnr"], 2),
        "–" if worst is None or inactive else f"{worst:.1f}",
        interval(row["ssim"], 4),
        interval(row["fid_vs_uncached"], 4),
        interval(row["fid"], 2),
        interval(row["kid"], 2, 1000),
        interval(over.get("psnr_difference"), 2),
        interval(over.get("fid_vs_uncached_ratio"), 3),
    )


def fewer(row: Mapping[str, Any]) -> float:
    """The share of the steps that a row with fewer of them runs."""
    return 1 - row["flops_saved"]


def interval(entry: Mapping[str, Any] | None, digits: int, scale: float = 1) -> str:
    """A value with its interval, or a dash where it was not measured."""
    if entry is None or entry["value"] is None:
        return "–"
    ends = [entry[name] for name in ("low", "high")]
    told = ", ".join("∞" if end is None else f"{end * scale:.{digits}f}" for end in ends)
    return f"{entry['value'] * scale:.{digits}f} [{told}]"


def markdown(cells: list[Mapping[str, Any]]) -> str:
    """The table with what has to be known to read it."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(line)} |" for line in lines_of(cells)]
    notes = []
    for cell in cells:
        told = cell["cell"]
        notes.append(
            f"{told['model_type']}: {told['num_images']} images, {told['num_inference_steps']} steps, seed "
            f"{told['seed']}; Fréchet: {cell['distance']}, to the uncached images"
            + ("" if told["trajectory"] else "; no calibration of the trajectory, so that corrections are on blocks")
        )
    failed = failures_of(cells)
    return "\n".join([*lines, "", *dict.fromkeys(notes), *failed]) + "\n"


def failures_of(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why rows are missing, a line each."""
    return [f"{cell['cell']['model_type']}: {line}" for cell in cells for line in cell["failures"].values()]


def table(cells: list[Mapping[str, Any]]) -> Table:
    """The same for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("model", "method") else "right")
    for line in lines_of(cells):
        shown.add_row(*(cell.replace("[", r"\[") for cell in line))
    return shown


def execute(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Make the cells that are not there, and write them all."""
    unknown = set(args.cache_methods) - {"All", *base_names()}
    if unknown:
        raise ValueError(f"--cache_methods: {min(unknown)!r} {not_known(min(unknown), ['All', *base_names()])}")
    check_output_folder(args.output_dir)
    if args.threads:
        torch.set_num_threads(args.threads)
    wanted = cells_of(args)
    places = [args.output_dir / command.model_type / f"{method}.json" for command, method in wanted]
    known = [finished(path, settings_of(*cell)) for path, cell in zip(places, wanted, strict=True)]
    for index, (path, (command, method)) in enumerate(zip(places, wanted, strict=True)):
        if known[index] is None:
            console.print(f"{index + 1} of {len(wanted)}: {command.model_type}, {method}", markup=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            known[index] = measure_cell(command, method)
            write_json(path, known[index])
    document = {"schema": 1, "cells": known}
    write_json(args.output_dir / f"{NAME}.json", document)
    write_text(args.output_dir / f"{NAME}.md", markdown(known))
    return document


def main() -> None:
    """Run the command."""
    console = Console() if sys.stdout.isatty() else Console(width=220)
    try:
        document = execute(parser().parse_args(), console)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise SystemExit(f"{NAME}: {error}") from error
    console.print(table(document["cells"]))
    failed = failures_of(document["cells"])
    for line in failed:
        console.print(line, markup=False, soft_wrap=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
