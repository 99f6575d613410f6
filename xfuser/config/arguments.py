"""One reading of the cache settings from a command line, for every command that has them."""

from __future__ import annotations

import argparse
from typing import Any

from xfuser.config.cache import APPROXIMATIONS, DEFAULT_TOLERANCE, MODES, SCORES


def add_model_arguments(parser: argparse.ArgumentParser, model_types: list[str]) -> None:
    """Which model, on which device, with how many threads."""
    group = parser.add_argument_group("model")
    group.add_argument("--model_type", choices=model_types, default="tiny-dit", help="default: %(default)s")
    group.add_argument("--model", help="folder or hub id of a diffusers pipeline (default: the type's own)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    group.add_argument("--threads", type=positive, help="CPU threads (default: torch's own choice)")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What is generated, and in how many steps."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--num_images", type=positive, help="images to generate")
    group.add_argument("--batch_size", type=positive, default=16, help="images at once (default: %(default)s)")
    group.add_argument(
        "--num_inference_steps", type=positive, default=50, help="denoising steps (default: %(default)s)"
    )
    group.add_argument("--guidance_scale", type=float, help="classifier-free guidance (default: the model type's own)")
    group.add_argument("--height", type=positive, help="pixels (default: the model's own; prompt models only)")
    group.add_argument("--width", type=positive, help="pixels (default: the model's own; prompt models only)")
    group.add_argument("--seed", type=int, default=42, help="image i starts from the noise of seed + i (default: 42)")


def add_correction_arguments(parser: argparse.ArgumentParser) -> None:
    """AdaCorrection's settings; the names and defaults are those of `CacheConfig`."""
    group = parser.add_argument_group("AdaCorrection")
    group.add_argument("--enable_adacorrection", action="store_true", help="review the base method's proposals")
    group.add_argument("--adacorr_gamma", type=float, help="scale of the correction, above 0 (default: 1.0)")
    group.add_argument("--adacorr_lambda", type=float, help="weight of the spatial variation (default: 1.0)")
    group.add_argument("--adacorr_mode", choices=MODES, help="default: bound with a tolerance, else budget")
    group.add_argument("--adacorr_score", choices=SCORES, help="offset score (default: relative)")
    group.add_argument(
        "--adacorr_tolerance", type=float, help=f"bound: allowed relative error of a stand-in ({DEFAULT_TOLERANCE})"
    )
    group.add_argument(
        "--adacorr_budget", type=float, help="budget: share of block evaluations, 0 to 1 (default: the base method's)"
    )
    group.add_argument(
        "--approximation", choices=APPROXIMATIONS, help="what stands in (default: taylor-1 under AdaCorrection)"
    )


def correction_settings(args: argparse.Namespace, corrects: bool) -> dict[str, Any]:
    """The `CacheConfig` settings of AdaCorrection that a command line named.

    Raises:
        ValueError: One was named, but nothing is corrected.
    """
    names = [name for name in vars(args) if name.startswith("adacorr_") and getattr(args, name) is not None]
    if names and not corrects:
        raise ValueError(f"--{names[0]} needs AdaCorrection; add --enable_adacorrection")
    return {"enable_adacorrection": corrects, **{name: getattr(args, name) for name in names}}


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value
