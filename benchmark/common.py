"""What the benchmarks' command lines have in common: from arguments to settings, and what fits a model."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from benchmark.measure import DEFAULT_PROMPTS, Sampling
from benchmark.rows import base_names, lacks_calibration
from xfuser.config.arguments import base_settings
from xfuser.config.cache import FIRST
from xfuser.core.distributed.environment import describe_environment
from xfuser.model_executor.pipelines import MODEL_TYPES, LoadedPipeline
from xfuser.model_executor.pipelines.loading import shipped_tiny_dit
from xfuser.model_executor.pipelines.shipped import shared_parts, shipped_models

PROMPT_ONLY = ("prompt", "height", "width")
GRAPHS = "scene_graphs.json"
IMAGES, CLIPS = 128, 64  # a row, where nobody says how many; a Fréchet distance wants 56
HOW_MANY = f"images of each method (default: {IMAGES}, or {CLIPS} clips)"


def add_evaluation_arguments(group: Any, output: str) -> None:
    """What is drawn, what judges it, and where the results go."""
    group.add_argument(
        "--prompt",
        nargs="+",
        help="prompts, or scene graphs as JSON, taken in turn (default: those that a small model was trained on or "
        "brings, spread; else four of its own)",
    )
    group.add_argument(
        "--evaluation",
        type=Path,
        help="folder with classifier.safetensors and reference.safetensors (default: the model's own "
        "evaluation folder, else that of the shipped model of its type)",
    )
    group.add_argument("--output_dir", type=Path, default=Path(output), help="default: %(default)s")


def captions_of(model_type: str) -> list[str]:
    """List what a shipped model can be asked for: its scene graphs, as JSON text, or the captions it was trained on.

    Captions are those of its tracker or matcher, or of the matcher of the model whose parts it has.
    """
    folder = shipped_models().get(model_type)
    if folder is not None and MODEL_TYPES[model_type].conditioned_on == "scene_graph":
        return [json.dumps(graph) for graph in json.loads((folder / "evaluation" / GRAPHS).read_text(encoding="utf-8"))]
    owners = [] if folder is None else owners_of(folder)
    for owner, name in itertools.product(owners, ("objects.safetensors", "matcher.safetensors")):
        path = owner / "evaluation" / name
        if path.is_file():
            with safe_open(path, framework="pt") as opened:
                return sorted(json.loads(opened.metadata()["captions"]))
    return []


def owners_of(folder: Path) -> list[Path]:
    """List a model's folder and those of the models whose parts it has."""
    return [folder, *dict.fromkeys(part.parent for part in shared_parts(folder).values())]


def spread(captions: Sequence[str], count: int) -> tuple[str, ...]:
    """Choose so many of the captions, at even distances."""
    places = np.linspace(0, len(captions) - 1, min(count, len(captions))).round().astype(int)
    return tuple(captions[place] for place in places)


def bases_of(args: argparse.Namespace, threshold: float | None) -> dict[str, dict[str, Any]]:
    """The settings of every base method; ``threshold`` replaces the model type's own.

    Raises:
        ValueError: The calibration is to be learned from a job's first generation.
    """
    if args.calibration == FIRST:
        # Every batch is a job of its own here, so that all of them would be evaluated in full.
        raise ValueError("--calibration first: a comparison needs a file; make one with `xdit calibrate`")
    bases = {base: base_settings(args, base) for base in base_names()}
    shipped = shipped_gates(args)
    for base in bases:
        if lacks_calibration(base, bases[base]) and shipped is not None:
            bases[base] |= {"calibration": str(shipped)}
    for base, own in MODEL_TYPES[args.model_type].thresholds.items():
        bases[base]["rel_l1_thresh"] = own if threshold is None else threshold
    return bases


def shipped_gates(args: argparse.Namespace) -> Path | None:
    """The calibration that comes along for methods that cannot do without; ``None`` where none fits."""
    if args.model_type != "tiny-dit" or args.model is not None:
        return None
    path = shipped_tiny_dit() / "calibration" / f"gates-ddim-{args.num_inference_steps}.safetensors"
    return path if path.is_file() else None


def sampling_of(args: argparse.Namespace) -> Sampling:
    """What every row generates.

    Raises:
        ValueError: Prompts or sizes are named for a model that takes class labels.
    """
    own = MODEL_TYPES[args.model_type].guidance_scale
    count = args.num_images or (CLIPS if MODEL_TYPES[args.model_type].makes == "frames" else IMAGES)
    known = captions_of(args.model_type)
    if MODEL_TYPES[args.model_type].conditioned_on == "scene_graph":
        for name in ("height", "width"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name}: --model_type {args.model_type} draws one size only; leave it out")
        if not args.prompt and not known:
            raise ValueError(f"--prompt is missing: {args.model_type} is not in this installation, nor are its graphs")
    if MODEL_TYPES[args.model_type].conditioned_on == "label":
        for name in PROMPT_ONLY:
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name}: --model_type {args.model_type} takes class labels, all in turn; leave it out"
                )
    return Sampling(
        count,
        args.batch_size,
        args.num_inference_steps,
        own if args.guidance_scale is None else args.guidance_scale,
        args.seed,
        tuple(args.prompt or spread(known, count) or DEFAULT_PROMPTS),
        args.height,
        args.width,
    )


def evaluation_folder(loaded: LoadedPipeline, args: argparse.Namespace) -> Path | None:
    """Where the feature network and the reference statistics are; ``None`` where none fits the model."""
    candidates = [args.evaluation] if args.evaluation else []
    if args.model and not args.evaluation:
        candidates.append(Path(args.model) / "evaluation")
    if callable(loaded.spec.default) and loaded.spec.evaluated and not args.evaluation:
        candidates += [owner / "evaluation" for owner in owners_of(loaded.spec.default())]
    for folder in candidates:
        if (folder / "classifier.safetensors").is_file() and (folder / "reference.safetensors").is_file():
            return folder
    if args.evaluation:
        raise ValueError(f"--evaluation: {args.evaluation} has no classifier.safetensors and reference.safetensors")
    return None


def describe_run(loaded: LoadedPipeline, sampling: Sampling, named: dict[str, Any] | None = None) -> dict[str, Any]:
    """How a results file begins: schema, machine, model and settings, ``named`` ones among them."""
    return {
        "schema": 1,
        "environment": describe_environment(loaded.pipeline.device),
        "model": {
            "name": loaded.name,
            "type": loaded.model_type,
            "dtype": str(loaded.dtype).removeprefix("torch."),
        },
        "settings": _told(loaded, sampling) | (named or {}),
    }


def _told(loaded: LoadedPipeline, sampling: Sampling) -> dict[str, Any]:
    """The sampling's settings that the model reads."""
    settings = vars(sampling) | {"prompts": list(sampling.prompts)}
    if loaded.spec.conditioned_on != "label":
        return settings
    return {name: value for name, value in settings.items() if name not in ("prompts", "height", "width")}


def announce(loaded: LoadedPipeline, rows: int, sampling: Sampling) -> str:
    """What is about to run, in a line or two."""
    text = f"{loaded.name}: {rows} methods, {sampling.num_images} images each, on {loaded.pipeline.device}"
    if loaded.name.startswith("toy-"):
        text += "\nThis is a toy with random weights: it shows decisions and speed, not quality. See --model."
    return text
