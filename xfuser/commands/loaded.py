"""From a command line to a loaded pipeline and what it is to generate."""

from __future__ import annotations

import argparse

import torch
from diffusers.utils.logging import disable_progress_bar

from xfuser.core.distributed.environment import choose_device, rank
from xfuser.core.spelling import did_you_mean
from xfuser.model_executor.pipelines.generate import Generation
from xfuser.model_executor.pipelines.loading import LoadedPipeline

ALL_CLASSES = 10  # the most that are drawn where none is named


def load_and_request(args: argparse.Namespace) -> tuple[LoadedPipeline, Generation]:
    """The pipeline, and what it is to generate."""
    # Looked up at the time of the call, where another loader may have been put in place.
    from xfuser.model_executor.pipelines import load_pipeline

    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if rank() > 0:
        disable_progress_bar()
    loaded = load_pipeline(args.model_type, args.model, device)
    labelled = loaded.spec.conditioned_on == "label"
    conditions = class_numbers(args.class_label, loaded) if labelled else args.prompt
    request = Generation(
        conditions,
        args.num_images or len(conditions),
        args.batch_size,
        args.seed,
        args.num_inference_steps,
        args.guidance_scale,
        args.height,
        args.width,
        getattr(args, "negative_prompt", None),
        getattr(args, "true_cfg_scale", None),
        args.max_sequence_length,
    )
    return loaded, request


def class_numbers(names: list[str] | None, loaded: LoadedPipeline) -> list[int]:
    """Class numbers from numbers or names; all classes, at most `ALL_CLASSES`, where none is named (ValueError)."""
    labels = loaded.pipeline.labels
    if names is None:
        return list(range(min(ALL_CLASSES, loaded.num_classes())))
    numbers = []
    for name in names:
        number = int(name) if name.isdigit() else labels.get(name)
        if number is None or number >= loaded.num_classes():
            known = ", ".join(f"{value} {key}" for key, value in sorted(labels.items(), key=lambda item: item[1])[:20])
            meant = did_you_mean(name, labels) or ";"
            raise ValueError(f"--class_label {name!r} is not a class of {loaded.name}{meant} known are {known}")
        numbers.append(number)
    return numbers
