"""From a command line to a loaded pipeline and what it is to generate."""

from __future__ import annotations

import argparse

import torch
from diffusers.utils.logging import disable_progress_bar

from xfuser.commands.checks import class_numbers
from xfuser.core.distributed.environment import choose_device, rank
from xfuser.model_executor.pipelines.generate import Generation
from xfuser.model_executor.pipelines.loading import LoadedPipeline


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
    conditions = args.prompt
    if labelled:
        conditions = class_numbers(args.class_label, loaded.pipeline.labels, loaded.num_classes(), loaded.name)
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
