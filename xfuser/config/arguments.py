"""One reading of the cache settings from a command line, for every command that has them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from xfuser.config.cache import CacheConfig, CorrectionSettings, settings_read_by
from xfuser.config.methods import METHODS, settings_of
from xfuser.config.parallel import ParallelConfig
from xfuser.config.settings import add_flags, named_in, positive
from xfuser.config.trajectory import goals_with_flags


class Named(argparse.Action):
    """Stores a value, and notes (``…_named``) that it was not the default which put it there."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest}_named", True)


def add_model_arguments(parser: argparse.ArgumentParser, model_types: list[str]) -> None:
    """Which model, on which device, with how many threads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        help="folder or hub id of a diffusers pipeline, or a model type: flux-dev (default: the type's own)",
    )
    group.add_argument(
        "--model_type",
        action=Named,
        choices=model_types,
        default=model_types[0],
        help=f"default: what --model says of itself, and {model_types[0]} without it; without --model, flux, pixart, "
        "sd3, sd and wan are toys with random weights",
    )
    group.add_argument(
        "--device",
        default="auto",
        help="auto, cpu or an accelerator; auto takes one if there is one (default: auto)",
    )
    group.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")


def add_sampling_arguments(parser: argparse.ArgumentParser, images: str | None = "images to generate") -> None:
    """What is generated, and in how many steps; ``images`` is the help of how many, ``None`` where nobody says it."""
    group = parser.add_argument_group("sampling")
    if images is not None:
        group.add_argument("--num_images", type=positive, help=images)
    group.add_argument("--batch_size", type=positive, default=16, help="images at once (default: %(default)s)")
    group.add_argument(
        "--num_inference_steps",
        action=Named,
        type=positive,
        default=50,
        help="denoising steps (default: the model type's own, mostly %(default)s)",
    )
    group.add_argument(
        "--guidance_scale",
        type=not_negative,
        help="classifier-free guidance, 0 or more (default: the model type's own)",
    )
    group.add_argument("--height", type=positive, help="pixels (default: the model's own; prompt models only)")
    group.add_argument("--width", type=positive, help="pixels (default: the model's own; prompt models only)")
    group.add_argument("--seed", type=int, default=42, help="image i starts from the noise of seed + i (default: 42)")


# Settings of `CacheConfig` by name; what base methods and AdaCorrection share, with flags among theirs.
_FIELDS = {each.name: each for each in fields(CacheConfig)}
_SHARED_FLAGS = (_FIELDS["sync"], _FIELDS["calibration"])


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """The base methods' own settings, and what was calibrated; each method is given those that it reads."""
    group = parser.add_argument_group("base methods")
    for method in METHODS:
        add_flags(group, settings_of(method), method)
    add_flags(group, [_FIELDS["calibration"]])


def named_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The `CacheConfig` settings of base methods that a command line named."""
    own = [each for method in METHODS for each in settings_of(method)]
    return named_in(args, [*own, *_SHARED_FLAGS])


def base_settings(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Those that one base method reads, for commands that compare several; without its threshold."""
    read = {"calibration", *(each.name for each in settings_read_by(method))}
    named = {name: value for name, value in named_settings(args).items() if name in read}
    return {"use_cache": method, **named}


_ON_TRAJECTORY = {"use_cache", "enable_adacorrection", "adacorr_budget", "calibration"}  # that level reads them too


def add_goal_arguments(parser: argparse.ArgumentParser) -> None:
    """The one number of AdaCorrection on the trajectory."""
    group = parser.add_argument_group(
        "AdaCorrection on the trajectory (name one goal, and no base method; --adacorr_budget alone is the third)"
    )
    add_flags(group, goals_with_flags())


def trajectory_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """The trajectory's settings of a command line; ``None`` where it asks for the block level, or for no cache.

    Raises:
        ValueError: A setting that the trajectory does not have is named beside a goal.
    """
    goals = named_in(args, goals_with_flags())
    method = cache_method(args)
    if not goals and (method is not None or args.enable_adacorrection or args.adacorr_budget is None):
        return None
    if args.adacorr_budget is not None:
        goals["adacorr_budget"] = args.adacorr_budget
    if method is not None:
        raise ValueError(f"--{next(iter(goals))} needs no base method; leave --use_cache {method} out")
    blocks = named_in(args, [_FIELDS[name] for name in _FIELDS.keys() - _ON_TRAJECTORY])
    if blocks:
        raise ValueError(
            f"--{min(blocks, key=list(_FIELDS).index)} belongs to the block level, not to --{next(iter(goals))}; leave "
            "it out"
        )
    return goals | ({} if args.calibration is None else {"calibration": args.calibration})


def add_correction_arguments(parser: argparse.ArgumentParser) -> None:
    """AdaCorrection's settings; the names and defaults are those of `CacheConfig`."""
    group = parser.add_argument_group("AdaCorrection on blocks")
    add_flags(group, fields(CorrectionSettings))
    add_flags(group, [_FIELDS["sync"], _FIELDS["approximation"]])


def correction_settings(args: argparse.Namespace, corrects: bool) -> dict[str, Any]:
    """The `CacheConfig` settings of AdaCorrection that a command line named.

    Raises:
        ValueError: One was named, but nothing is corrected.
    """
    named = named_in(args, fields(CorrectionSettings))
    named.pop("enable_adacorrection", None)
    if named and not corrects:
        raise ValueError(f"--{next(iter(named))} needs AdaCorrection; add --enable_adacorrection")
    settings = {"enable_adacorrection": corrects, **named}
    if args.sync is not None and args.adacorr_mode == "gate":
        settings["sync"] = args.sync
    return settings


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def from_to(text: str) -> tuple[int, int]:
    """A whole number of at least 1, or two, the smaller one first: ``2`` is ``(2, 2)``, ``1,8`` is ``(1, 8)``."""
    first, comma, last = text.partition(",")
    numbers = positive(first), positive(last if comma else first)
    if numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: the fewest come first, as in {numbers[1]},{numbers[0]}")
    return numbers


def add_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    """How the work is spread over processes; the names are xDiT's."""
    group = parser.add_argument_group("parallel (the degrees multiply to the number of processes)")
    group.add_argument(
        "--data_parallel_degree", type=positive, default=1, help="groups that generate different images (default: 1)"
    )
    group.add_argument(
        "--use_cfg_parallel",
        action="store_true",
        help="each guidance branch on ranks of its own: doubles the processes",
    )
    group.add_argument(
        "--pipefusion_parallel_degree", type=positive, default=1, help="stages that share the blocks (default: 1)"
    )
    group.add_argument("--ring_degree", type=positive, default=1, help="ranks of ring attention (default: 1)")
    group.add_argument("--ulysses_degree", type=positive, default=1, help="ranks that share the heads (default: 1)")
    group.add_argument("--num_pipeline_patch", type=positive, help="PipeFusion: patches (default: one a stage)")
    group.add_argument(
        "--warmup_steps",
        type=int,
        default=1,
        help="PipeFusion: leading synchronous steps, the first always (default: 1)",
    )
    group.add_argument(
        "--attn_layer_num_for_pp", type=positive, nargs="+", help="PipeFusion: blocks of each stage (default: even)"
    )
    group.add_argument(
        "--pipefusion_max_lag",
        type=int,
        help="PipeFusion: age in steps up to which remembered keys and values are used, else the step is synchronous "
        "(default: 1, and 0 with a cache)",
    )
    group.add_argument(
        "--use_parallel_vae", action="store_true", help="decode in patches on all ranks that share an image (DistVAE)"
    )
    group.add_argument(
        "--verify_agreement",
        action="store_true",
        help="compare the plans of all ranks at every step, and stop where two differ",
    )


ALIASES = {"use_teacache": "Tea", "use_fbcache": "Fb"}


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How a generation runs, with xDiT's names."""
    group = parser.add_argument_group("running")
    group.add_argument("--use_torch_compile", action="store_true", help="compile the blocks; decisions stay outside")
    group.add_argument("--use_teacache", action="store_true", help="the same as --use_cache Tea")
    group.add_argument("--use_fbcache", action="store_true", help="the same as --use_cache Fb")
    group.add_argument("--enable_tiling", action="store_true", help="decode large images tile by tile")
    group.add_argument("--enable_slicing", action="store_true", help="decode a batch image by image")
    group.add_argument(
        "--timeout",
        type=positive,
        default=600,
        help="seconds after which a rank that does not answer is taken for lost (default: %(default)s)",
    )


def cache_method(args: argparse.Namespace) -> str | None:
    """The base method that a command line names, by whichever flag.

    Raises:
        ValueError: Two flags name different ones.
    """
    named = {f"--{flag}": method for flag, method in ALIASES.items() if getattr(args, flag)}
    if args.use_cache is not None:
        named[f"--use_cache {args.use_cache}"] = args.use_cache
    if len(set(named.values())) > 1:
        raise ValueError(f"{' and '.join(named)} name different methods; leave all but one out")
    method = next(iter(named.values()), None)
    return None if method == "None" else method


def cache_settings(args: argparse.Namespace, thresholds: Mapping[str, float]) -> dict[str, Any]:
    """`CacheConfig` settings from a command line that names one method."""
    method = cache_method(args)
    settings = {"use_cache": method, "approximation": args.approximation, **named_settings(args)}
    if args.rel_l1_thresh is not None:
        settings["rel_l1_thresh"] = args.rel_l1_thresh
    elif method in thresholds:
        settings["rel_l1_thresh"] = thresholds[method]
    return settings | correction_settings(args, args.enable_adacorrection)


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    """The parallel settings of a command line.

    Raises:
        ValueError: One is out of its range.
    """
    settings = {each.name: getattr(args, each.name) for each in fields(ParallelConfig)}
    split = settings["attn_layer_num_for_pp"]
    return ParallelConfig(**(settings | {"attn_layer_num_for_pp": None if split is None else tuple(split)}))
