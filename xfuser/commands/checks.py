"""What a command line asks for that no model can give, found before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from xfuser.config.arguments import cache_method, named_settings, parallel_config
from xfuser.config.cache import FIRST, settings_read_by
from xfuser.config.methods import METHODS, with_threshold
from xfuser.config.parallel import ParallelConfig
from xfuser.config.spelling import did_you_mean
from xfuser.model_executor.pipelines.choosing import read_index
from xfuser.model_executor.pipelines.model_types import MODEL_TYPES
from xfuser.model_executor.pipelines.scene_graphs import read_graph_files, vocabulary_of
from xfuser.model_executor.pipelines.shipped import own_model

ALL_CLASSES = 10  # the most that are drawn where none is named

_PROMPT_ONLY = ("negative_prompt", "height", "width", "max_sequence_length")


def check_conditions(args: argparse.Namespace) -> None:
    """Refuse conditions that the model does not take, prompts and sizes for one of labels among them (ValueError).

    Scene graphs are read from their files, and take the prompts' place as JSON text.
    """
    spec = MODEL_TYPES[args.model_type]
    labelled = spec.conditioned_on == "label"
    if spec.conditioned_on == "scene_graph":
        take_scene_graphs(args)
    elif getattr(args, "scene_graph", None):
        takers = ", ".join(name for name, each in MODEL_TYPES.items() if each.conditioned_on == "scene_graph")
        raise ValueError(
            f"--scene_graph does not go with --model_type {args.model_type}; leave it out, or name {takers}"
        )
    wanted, other = ("class_label", "prompt") if labelled else ("prompt", "class_label")
    if getattr(args, other) is not None:
        named = "prompts" if labelled and getattr(args, "prompts", None) else other
        raise ValueError(f"--{named} does not go with --model_type {args.model_type}; use --{wanted}")
    if not labelled and not args.prompt:
        raise ValueError("--prompt is missing: name at least one")
    refused = () if spec.conditioned_on == "prompt" else _PROMPT_ONLY
    if not spec.reads_length and not refused:
        refused = ("max_sequence_length",)
    for name in refused:
        if getattr(args, name, None) is not None:
            raise ValueError(f"--{name} does not go with --model_type {args.model_type}; leave it out")
    if labelled and args.class_label is not None:
        check_classes(args)


def take_scene_graphs(args: argparse.Namespace) -> None:
    """Take the graphs as prompts, from their files or as they are, and check what they say (ValueError)."""
    if getattr(args, "scene_graph", None):
        if args.prompt:
            raise ValueError("--scene_graph and --prompt both name scene graphs; leave one of them out")
        args.prompt, args.scene_graph = read_graph_files(args.scene_graph), None
    if not args.prompt:
        raise ValueError(f"--scene_graph is missing: --model_type {args.model_type} wants a file of scene graphs")
    vocabulary = vocabulary_of(args.model or own_model(args.model_type))
    for number, graph in enumerate(args.prompt if vocabulary else ()):
        try:
            vocabulary.check(graph)
        except ValueError as error:
            raise ValueError(f"--scene_graph: graph {number}: {error}") from error


def check_classes(args: argparse.Namespace) -> None:
    """Refuse class names that the model's index does not know (ValueError)."""
    labels = labels_of(args)
    if labels:
        class_numbers(args.class_label, labels, len(set(labels.values())), args.model or args.model_type)


def labels_of(args: argparse.Namespace) -> dict[str, int]:
    """Read the classes of a model of labels from its index, by name; none where it does not tell."""
    source = args.model or own_model(args.model_type)
    names = (read_index(str(source)).get("id2label") or {}).items() if source else ()
    return {name.strip(): int(number) for number, text in names for name in text.split(",")}


def class_numbers(names: list[str] | None, labels: Mapping[str, int], count: int, model: str) -> list[int]:
    """Take class numbers from numbers or names.

    Args:
        names: As the command line has them; ``None`` takes all classes, at most `ALL_CLASSES`.
        labels: Numbers by name.
        count: How many classes there are.
        model: Its name, for the error.

    Raises:
        ValueError: One is no class of the model.
    """
    if names is None:
        return list(range(min(ALL_CLASSES, count)))
    numbers = []
    for name in names:
        number = int(name) if name.isdigit() else labels.get(name)
        if number is None or number >= count:
            known = ", ".join(f"{value} {key}" for key, value in sorted(labels.items(), key=lambda item: item[1])[:20])
            meant = did_you_mean(name, labels) or ";"
            raise ValueError(f"--class_label {name!r} is not a class of {model}{meant} known are {known}")
        numbers.append(number)
    return numbers


def check_generation(args: argparse.Namespace, parallel: ParallelConfig) -> None:
    """Refuse guidance that the model has not, and more replicas than images (ValueError)."""
    spec = MODEL_TYPES[args.model_type]
    if args.true_cfg_scale is not None and not spec.true_cfg:
        raise ValueError(f"--true_cfg_scale does not go with --model_type {args.model_type}; use --guidance_scale")
    if args.true_cfg_scale is not None and args.true_cfg_scale < 1:
        raise ValueError(f"--true_cfg_scale {args.true_cfg_scale:g}: there is no guidance below 1; use one above it")
    true_cfg = args.true_cfg_scale is not None and args.true_cfg_scale > 1
    if spec.true_cfg and true_cfg != (args.negative_prompt is not None):
        raise ValueError("--negative_prompt and --true_cfg_scale above 1 go together; name both or neither")
    scale = spec.guidance_scale if args.guidance_scale is None else args.guidance_scale
    if parallel.use_cfg_parallel and not (true_cfg if spec.true_cfg else scale > 1):
        needed = "--negative_prompt and --true_cfg_scale above 1" if spec.true_cfg else "--guidance_scale above 1"
        raise ValueError(f"--use_cfg_parallel: there is one branch only; add {needed}, or leave it out")
    if not spec.true_cfg and args.negative_prompt is not None and scale <= 1:
        raise ValueError(f"--negative_prompt: nothing reads it at --guidance_scale {scale:g}; use one above 1")
    if spec.makes == "frames" and args.image_format == "jpg":
        raise ValueError("--image_format jpg holds one image, and this model makes videos; use png or webp")
    if parallel.use_parallel_vae and args.enable_tiling:
        raise ValueError("--use_parallel_vae and --enable_tiling both cut the image; name one of them")
    images = args.num_images or len(args.prompt or args.class_label or [])
    if images and images < parallel.data_parallel_degree:
        raise ValueError(
            f"--data_parallel_degree {parallel.data_parallel_degree}: there are only {images} images; ask for more, "
            "or lower it"
        )


def check_cache(args: argparse.Namespace) -> None:
    """Refuse settings of a cache that nothing would read (ValueError)."""
    method = cache_method(args)
    if args.rel_l1_thresh is not None and method not in with_threshold():
        with_one = ", ".join(with_threshold())
        said = "no base method is named" if method is None else f"--use_cache {method} has none"
        raise ValueError(f"--rel_l1_thresh is a base method's threshold, and {said}; add --use_cache ({with_one})")
    for name in named_settings(args).keys() - {"calibration"}:
        readers = [each for each in METHODS if name in {known.name for known in settings_read_by(each)}]
        if method not in readers and not (name == "sync" and args.adacorr_mode == "gate"):
            also = " or --adacorr_mode gate" if name == "sync" else ""
            raise ValueError(f"--{name} belongs to --use_cache {readers[0]}{also}; leave it out")
    if args.resume and args.calibration == FIRST:
        raise ValueError("--resume with --calibration first would learn again, from other images; use a file")


def check_counting(args: argparse.Namespace) -> None:
    """Refuse what does not go with a base method whose compute is counted in the first batch (ValueError)."""
    said = f"--calibration {args.calibration} with --use_cache {cache_method(args)}"
    if parallel_config(args).world_size > 1:
        raise ValueError(
            f"{said}: what the base method would spend is counted in one process only; on several name "
            "--adacorr_budget and no base method"
        )
    if args.resume:
        raise ValueError(f"{said}: --resume would count again, from other images; name --adacorr_budget instead")


def read_prompts(args: argparse.Namespace) -> None:
    """Take the prompts from the file that is named.

    Raises:
        ValueError: They are named otherwise too, or the file is not there or empty.
    """
    if args.prompts is None:
        return
    if args.prompt:
        raise ValueError("--prompt and --prompts both name prompts; leave one of them out")
    try:
        text = args.prompts.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"--prompts {args.prompts}: it cannot be read ({reason})") from error
    args.prompt = [line.strip() for line in text.splitlines() if line.strip()]
    if not args.prompt:
        raise ValueError(f"--prompts: {args.prompts} holds no prompt")
