"""The ``xdit`` command: its flags. What they ask for is imported only when it is done, so that help needs no torch."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from xfuser.config.arguments import (
    add_base_arguments,
    add_correction_arguments,
    add_goal_arguments,
    add_model_arguments,
    add_parallel_arguments,
    add_run_arguments,
    add_sampling_arguments,
    cache_method,
    cache_settings,
    from_to,
    not_negative,
    positive,
)
from xfuser.config.cache import METHODS
from xfuser.config.methods import learning_settings
from xfuser.config.parser import OneLineParser, with_underscores
from xfuser.config.refused import refuse_unsupported
from xfuser.config.settings import add_flags
from xfuser.core.console import quiet_libraries
from xfuser.core.files import IMAGE_FORMATS
from xfuser.model_executor.adapters import TYPES
from xfuser.model_executor.pipelines.model_types import MODEL_TYPES

__all__ = ["build_parser", "cache_method", "cache_settings", "main", "run_batch", "run_calibrate", "run_generate"]

COMMANDS = ("generate", "batch", "calibrate")
START = """start with:
  xdit generate --class_label bag shirt --target_speedup 3
      the model that comes with the package: the first batch in full, the others 3 times faster
  xdit generate --model FOLDER --prompt "a red fox" --target_speedup 3
      any DiT, FLUX, PixArt, Stable Diffusion or Wan; `xdit --model ...` is the same
  xdit generate --class_label bag shirt --use_cache Tea --enable_adacorrection --adacorr_budget 0.5
      a base method, layer by layer, and AdaCorrection to review it
"""
START_BATCH = """start with:
  xdit batch --prompts prompts.jsonl --output_dir job --groups 2 --target_speedup 3
      where a line is {"id": "a1", "class_label": "bag", "seed": 7}, or has "prompt", and any argument of the pipeline;
      run the same command again where it was stopped

exit codes: 0 all images are there; 1 stopped, the same command goes on; 2 refused, nothing was begun; 3 all are there
but those in rejected.jsonl, with file, line and reason; 130 and 143 stopped by Ctrl-C or SIGTERM, the same command
goes on
"""
START_CALIBRATE = """start with:
  xdit calibrate --level trajectory --num_images 16 --output mine.safetensors
      prints a table to choose from; then: xdit generate --adacorr_budget 0.3 --calibration mine.safetensors
"""


class _Version(argparse.Action):
    """Looks the version up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from xfuser.version import __version__

        parser._print_message(f"{parser.prog} {__version__}\n", sys.stdout)
        parser.exit()


def build_parser() -> OneLineParser:
    """Make the parser of all commands."""
    parser = OneLineParser(
        prog="xdit",
        usage="xdit [generate] ... | xdit batch ... | xdit calibrate ... | xdit --version",
        description="Diffusion transformers with quality-controlled caching.",
        epilog=START + "\nxdit generate --help lists all settings.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command", prog="xdit")
    _add_generate(commands)
    _add_batch(commands)
    _add_calibrate(commands)
    return parser


def _add_generate(commands: argparse._SubParsersAction[OneLineParser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="generate images (the default)",
        usage='xdit generate --class_label BAG ... | --prompt "TEXT" ... | --scene_graph FILE ... [settings]',
        description="Generate images.",
        epilog=START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(generate, list(MODEL_TYPES))
    add_sampling_arguments(generate)
    add_condition_arguments(generate)
    generate.add_argument("--negative_prompt", nargs="+", help="what not to show, taken in turn (prompt models)")
    generate.add_argument(
        "--true_cfg_scale", type=not_negative, help="flux: guidance by --negative_prompt, above 1 (default: 1, none)"
    )
    group = generate.add_argument_group("output")
    group.add_argument(
        "--output_dir", "--output_directory", type=Path, default=Path("outputs"), help="default: %(default)s"
    )
    group.add_argument("--image_format", choices=list(IMAGE_FORMATS), default="png", help="default: %(default)s")
    group.add_argument("--save_raw", action="store_true", help="write images.npy too: float32 [N, H, W, C], 0 to 1")
    group.add_argument(
        "--output_type", choices=("pil", "np"), help="xDiT's name: pil writes images only, np is --save_raw"
    )
    left = group.add_mutually_exclusive_group()
    left.add_argument("--overwrite", action="store_true", help="replace the images of an earlier run")
    left.add_argument(
        "--resume", action="store_true", help="go on where a run with the same settings was stopped, or begin one"
    )
    _add_engine_arguments(generate)
    generate.set_defaults(run=run_generate)


def _add_engine_arguments(parser: OneLineParser) -> None:
    """Every setting of a cache, of the degrees, and of how it runs."""
    parser.add_argument("--use_cache", choices=[str(name) for name in METHODS], help="base method (default: None)")
    parser.add_argument("--rel_l1_thresh", type=float, help=threshold_help())
    add_goal_arguments(parser)
    add_base_arguments(parser)
    add_correction_arguments(parser)
    add_parallel_arguments(parser)
    add_run_arguments(parser)


def _add_batch(commands: argparse._SubParsersAction[OneLineParser]) -> None:
    batch = commands.add_parser(
        "batch",
        help="generate from a file of prompts, on worker groups that Ray starts",
        usage="xdit batch --prompts FILE --output_dir FOLDER [settings]",
        description="Generate images from files of prompts, on worker groups that Ray starts. What is there is not\n"
        "made again. The sampling settings are those of lines that do not say; the degrees are a group's.",
        epilog=START_BATCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_batch_arguments(batch)
    add_model_arguments(batch, list(MODEL_TYPES))
    add_sampling_arguments(batch, images=None)
    batch.add_argument(
        "--max_sequence_length", type=positive, help="text tokens of a prompt (default: the pipeline's own)"
    )
    _add_engine_arguments(batch)
    batch.set_defaults(run=run_batch)


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """What is made, where it goes, and who makes it."""
    group = parser.add_argument_group("job")
    group.add_argument(
        "--prompts",
        type=Path,
        required=True,
        help="a .jsonl, .csv or .parquet file, or a folder of them: id, prompt or class_label, seed, height, width, "
        "num_inference_steps, and other arguments of the pipeline",
    )
    group.add_argument("--output_dir", type=Path, required=True, help="the job's folder, seen by all machines")
    group.add_argument("--image_format", choices=list(IMAGE_FORMATS), default="png", help="default: %(default)s")
    left = group.add_mutually_exclusive_group()
    left.add_argument("--resume", action="store_true", default=True, help="go on where a job was stopped (default)")
    left.add_argument("--no_resume", dest="resume", action="store_false", help="refuse a folder that holds a job")
    left.add_argument("--overwrite", action="store_true", help="remove the job that is there, and begin anew")
    group.add_argument(
        "--calibration_images",
        type=positive,
        default=4,
        metavar="N",
        help="for a goal: images that the job's calibration is learned from, before any is made (default: %(default)s)",
    )
    workers = parser.add_argument_group("worker groups")
    workers.add_argument(
        "--groups",
        type=from_to,
        default=(1, 1),
        metavar="N|MIN,MAX",
        help="how many; with two numbers they come and go with an autoscaling cluster (default: 1)",
    )
    workers.add_argument("--ray_address", help="of a Ray cluster, or auto (default: an embedded Ray on this machine)")
    workers.add_argument(
        "--max_attempts", type=positive, default=3, help="tries of a batch, then of each of its images (default: 3)"
    )
    workers.add_argument(
        "--grace",
        type=not_negative,
        default=30,
        metavar="SECONDS",
        help="for what is in flight, after Ctrl-C or SIGTERM; a second one does not wait (default: 30)",
    )


def _add_calibrate(commands: argparse._SubParsersAction[OneLineParser]) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="learn a model's behaviour once",
        usage="xdit calibrate [settings]",
        description="Generate some images without a cache and keep what caches can learn from them: TeaCache's\n"
        "polynomial, FastCache's maps and noise, LazyDiT's gates, the weights of approximation 'fitted'.",
        epilog=START_CALIBRATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(calibrate, list(MODEL_TYPES))
    add_sampling_arguments(calibrate)
    add_condition_arguments(calibrate)
    calibrate.add_argument(
        "--output", type=Path, default=Path("calibration.safetensors"), help="a .safetensors file; default: %(default)s"
    )
    level = calibrate.add_argument_group("level")
    level.add_argument(
        "--level",
        choices=("trajectory", "blocks"),
        default="blocks",
        help="what the calibration is for: the goals (--target_speedup, --min_psnr), or base methods and modes "
        "on blocks (default: %(default)s)",
    )
    level.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="trajectory: shares of the denoiser's evaluations to learn (default: 0.5 0.38 0.3 0.22 0.16)",
    )
    level.add_argument(
        "--reference_steps",
        metavar="Nx",
        help="trajectory: learn from a run of N times as many steps, 2x to 16x (default: the run itself)",
    )
    level.add_argument("--prompts", type=Path, help="a text file with one prompt a line, taken in turn")
    group = calibrate.add_argument_group("what single methods learn (--level blocks)")
    for method, settings in learning_settings():
        add_flags(group, settings, method)
    calibrate.set_defaults(run=run_calibrate, num_images=16)


def add_condition_arguments(parser: argparse.ArgumentParser) -> None:
    """What the images are to show."""
    takers = {
        kind: ", ".join(name for name, spec in TYPES.items() if spec.conditioned_on == kind)
        for kind in ("prompt", "label", "scene_graph")
    }
    parser.add_argument("--prompt", nargs="+", help=f"prompts, taken in turn ({takers['prompt']})")
    parser.add_argument("--class_label", nargs="+", help=f"class numbers or names, taken in turn ({takers['label']})")
    parser.add_argument(
        "--scene_graph",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=f"JSON files of a scene graph, or a list of them, taken in turn ({takers['scene_graph']})",
    )
    parser.add_argument(
        "--max_sequence_length", type=positive, help="text tokens of a prompt (default: the pipeline's own)"
    )


def threshold_help() -> str:
    """Describe --rel_l1_thresh with the default of every model type; a published model's is its type's."""
    tables = [
        f"{name}: {' '.join(f'{method} {value:g}' for method, value in spec.thresholds.items())}"
        for name, spec in TYPES.items()
    ]
    return f"threshold of the base method, 0 or more; lower is nearer to no cache (default: {'; '.join(tables)})"


def run_generate(args: argparse.Namespace) -> None:
    """Run ``xdit generate``."""
    from xfuser.commands import generate

    args.save_raw = args.save_raw or args.output_type == "np"
    generate.run_generate(args)


def run_batch(args: argparse.Namespace) -> None:
    """Run ``xdit batch``."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError('Ray is not installed; install it with: pip install "xfuser[ray]"')
    from xfuser.ray.batch import session

    session.prepare(args.ray_address)
    from xfuser.ray.batch import command

    command.run_batch(args)


def run_calibrate(args: argparse.Namespace) -> None:
    """Run ``xdit calibrate``."""
    from xfuser.commands import calibrate

    calibrate.run_calibrate(args)


def main(argv: list[str] | None = None, script: Path | None = None) -> None:
    """Run a command.

    Args:
        argv: Its name and arguments; by default the process's own. Without a name it is ``generate``, as xDiT has it.
        script: What to start in other processes, with the arguments alone, in place of ``xfuser.cli``.
    """
    quiet_libraries()
    given = sys.argv[1:] if argv is None else argv
    if given and given[0].startswith("--") and with_underscores(given[:1])[0] not in ("--help", "--version"):
        given = ["generate", *given]
    parser = build_parser()
    name = f"xdit {given[0]}" if given and given[0] in COMMANDS else "xdit"
    try:
        refuse_unsupported(given)
    except ValueError as error:
        OneLineParser(prog=name).error(str(error))
    args = parser.parse_args(given)
    if args.command is None:
        parser.error(f"name a command: {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}; see xdit --help")
    args.script, args.argv = script, given if script is None else given[1:]
    try:
        args.run(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError) as error:
        from xfuser.commands.stopping import stop

        stop(name, error)


if __name__ == "__main__":
    main()
