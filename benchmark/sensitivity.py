"""How much AdaCorrection's γ and λ matter: the tables of its paper (arXiv 2602.13357), on a model of one's own.

    python benchmark/sensitivity.py --use_cache Fast --adacorr_mode gate

Writes sensitivity_results.json and sensitivity.md into --output_dir. The exit code is 1 where a row failed, and 3 where
one never hit; the others are written all the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xfuser.config.parser import OneLineParser  # noqa: E402
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
from benchmark.outcomes import exit_code, failures, remarks  # noqa: E402
from benchmark.rows import Correction, Row, base_names, build_rows  # noqa: E402
from evaluation.report.columns import RESULT_COLUMNS, Column  # noqa: E402
from xfuser.config.arguments import (  # noqa: E402
    add_base_arguments,
    add_correction_arguments,
    add_model_arguments,
    add_sampling_arguments,
    correction_settings,
)
from xfuser.core.distributed.environment import choose_device  # noqa: E402
from xfuser.core.files import write_json, write_text  # noqa: E402
from xfuser.model_executor.pipelines import MODEL_TYPES, load_pipeline  # noqa: E402
from xfuser.model_executor.pipelines.choosing import resolve_model  # noqa: E402

RESULTS, MARKDOWN = "sensitivity_results.json", "sensitivity.md"
PARAMETERS = {"adacorr_gamma": "γ", "adacorr_lambda": "λ"}
VALUES = (0.5, 1.0, 2.0)
COLUMNS = ("fid", "fid_vs_uncached", "psnr", "hit_rate", "images_per_second")
# What the paper's tables say of other, larger models; where they say only which value is best, so does this.
PUBLISHED = {
    "adacorr_gamma": {0.5: "FID 4.56, hit rate 75.2%", 1.0: "best", 2.0: "FID 4.65"},
    "adacorr_lambda": {0.5: "hit rate 72.3%", 1.0: "best", 2.0: "FID 4.62"},
}
PUBLISHED_TITLE = "in the paper, other models"


def parser() -> argparse.ArgumentParser:
    result = OneLineParser(description=__doc__.splitlines()[0])
    add_model_arguments(result, list(MODEL_TYPES))
    add_sampling_arguments(result, HOW_MANY)
    group = result.add_argument_group("comparison")
    group.add_argument("--use_cache", choices=base_names(), default="Fast", help="base method (default: %(default)s)")
    group.add_argument("--rel_l1_thresh", type=float, help="its threshold (default: the model type's own)")
    add_evaluation_arguments(group, "sensitivity_results")
    add_base_arguments(result)
    add_correction_arguments(result)
    result.set_defaults(adacorr_mode="gate")
    return result


def name_of(parameter: str, value: float) -> str:
    """The row of one value, the other parameter being 1; both tables share the row where both are 1."""
    return "γ=1, λ=1" if value == 1 else f"{PARAMETERS[parameter]}={value:g}"


def sensitivity_rows(base: str, bases: dict[str, dict[str, Any]], correction: Correction) -> list[Row]:
    """None, the base method, and it corrected once for every value."""
    uncached, plain, *_, corrected, _ = build_rows({base: True}, bases, correction)
    rows = {plain.method: plain}
    for parameter in PARAMETERS:
        for value in VALUES:
            config = replace(corrected.config, **{parameter: value})
            rows.setdefault(
                name_of(parameter, value), replace(corrected, method=name_of(parameter, value), config=config)
            )
    return [uncached, *(replace(row, kept=False) for row in rows.values())]


def execute(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run all values side by side and write the files; returns the document."""
    for parameter in PARAMETERS:
        if getattr(args, parameter) is not None:
            raise ValueError(f"--{parameter} is what is varied here; leave it out")
    resolve_model(args)
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    check_output_folder(args.output_dir)
    correction = Correction(correction_settings(args, True), args.approximation)
    rows = sensitivity_rows(args.use_cache, bases_of(args, args.rel_l1_thresh), correction)
    sampling = sampling_of(args)
    loaded = load_pipeline(args.model_type, args.model, device)
    judge = Judge.of(loaded, evaluation_folder(loaded, args))
    console.print(announce(loaded, len(rows), sampling))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    everything = measure(loaded, rows, sampling, judge.see)
    runs = [run for run in everything if run.left_out is None]
    document = {
        **describe_run(loaded, sampling),
        "base": args.use_cache,
        "mode": rows[-1].config.mode,
        "tables": {
            parameter: {f"{value:g}": name_of(parameter, value) for value in VALUES} for parameter in PARAMETERS
        },
        "results": judge.results(runs, {}),
        "failures": failures(everything),
    }
    write_json(args.output_dir / RESULTS, document)
    write_text(args.output_dir / MARKDOWN, markdown(document))
    return document


def table_of(document: Mapping[str, Any], parameter: str) -> tuple[list[str], list[list[str]]]:
    """The heading and the lines of one parameter's table: no cache and the base method alone, then every value."""
    results = {row["method"]: row for row in document["results"]}
    columns = [next(column for column in RESULT_COLUMNS if column.key == key) for key in COLUMNS]
    lines = [[name, *cells(results.get(name, {}), columns), "–"] for name in ("None", document["base"])]
    for value in VALUES:
        row = results.get(document["tables"][parameter][f"{value:g}"], {})
        name = f"{PARAMETERS[parameter]} = {value:g}"
        lines.append([name, *cells(row, columns), PUBLISHED[parameter][value]])
    return ["", *(column.title for column in columns), PUBLISHED_TITLE], lines


def cells(row: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    """Values with the ends of their intervals in brackets."""
    told = [column.cell(row) for column in columns]
    return [cell.value if cell.low is None else f"{cell.value} [{cell.low}, {cell.high}]" for cell in told]


def heading_of(document: Mapping[str, Any], parameter: str) -> str:
    (other,) = (symbol for name, symbol in PARAMETERS.items() if name != parameter)
    return f"{document['base']}+AdaCorrection, mode {document['mode']}: {PARAMETERS[parameter]} at {other} = 1"


def markdown(document: Mapping[str, Any]) -> str:
    """Both tables, and what they were measured on."""
    settings, model = document["settings"], document["model"]
    parts = [
        f"{model['name']}, {settings['num_images']} images, {settings['num_inference_steps']} steps, batches of "
        f"{settings['batch_size']}, seed {settings['seed']}. Brackets are 95% bootstrap intervals; PSNR and FID vs "
        "uncached compare with the uncached images of the same seeds.\n"
    ]
    for parameter in PARAMETERS:
        heading, lines = table_of(document, parameter)
        parts.append(f"### {heading_of(document, parameter)}\n")
        rule = ["---"] * len(heading)
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in (heading, rule, *lines)) + "\n")
    return "\n".join([*parts, *(f"{remark}\n" for remark in remarks(document))])


def terminal_table(document: Mapping[str, Any], parameter: str) -> Table:
    heading, lines = table_of(document, parameter)
    table = Table(title=heading_of(document, parameter), title_justify="left", box=box.SIMPLE_HEAD)
    for title in heading:
        table.add_column(title, justify="left" if title in ("", PUBLISHED_TITLE) else "right")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    return table


def main() -> None:
    args = parser().parse_args()
    # A log file has no width of its own; the tables need this much.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    try:
        document = execute(args, console)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise SystemExit(f"sensitivity: {error}") from error
    for parameter in PARAMETERS:
        console.print(terminal_table(document, parameter))
    for remark in remarks(document):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    console.print(f"table: {args.output_dir / MARKDOWN}")
    if code := exit_code(document):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
