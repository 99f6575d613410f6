"""``xdit calibrate``: learn a model's behaviour once, and write it into a file."""

from __future__ import annotations

import argparse
from dataclasses import replace

from xfuser.commands.checks import check_conditions, read_prompts
from xfuser.commands.loaded import load_and_request
from xfuser.config.methods import learning_settings, policy_class
from xfuser.config.settings import named_in
from xfuser.core.console import check_output_folder
from xfuser.model_executor.cache import apply_cache_on_pipeline
from xfuser.model_executor.pipelines.calibrate import calibrate_trajectory, check_calibration
from xfuser.model_executor.pipelines.choosing import resolve_model
from xfuser.model_executor.pipelines.generate import conditions_hash, generate_batches


def run_calibrate(args: argparse.Namespace) -> None:
    """Calibrate what the command line asks for.

    Raises:
        ValueError: It asks for what cannot be; nothing was loaded then.
        OSError: Nothing can be written there.
    """
    resolve_model(args)
    read_prompts(args)
    if args.output.suffix != ".safetensors":
        raise ValueError(f"--output: {str(args.output)!r} does not end in .safetensors")
    if args.num_inference_steps is not None and args.num_inference_steps < 2:
        raise ValueError(
            f"--num_inference_steps {args.num_inference_steps}: one step reuses nothing, so there is nothing to learn; "
            "take at least 2"
        )
    check_conditions(args)
    check_output_folder(args.output.parent, "--output")
    if args.level == "trajectory":
        for method, settings in learning_settings():
            for name in named_in(args, settings):
                raise ValueError(f"--{name} belongs to --level blocks, where {method} learns; leave it out")
        check_calibration(args)
        calibrate_trajectory(args, *load_and_request(args))
        return
    for name in ("budgets", "reference_steps"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} belongs to --level trajectory")
    named = {}
    for method, settings in learning_settings():
        named |= named_in(args, settings)
        policy_class(method).Section.Config(**named_in(args, settings))  # refused before anything is loaded
    loaded, request = load_and_request(args)
    engine = apply_cache_on_pipeline(loaded.pipeline)
    engine.record(**named)
    for _ in generate_batches(loaded, request):
        pass
    calibration = engine.recorded()
    provenance = calibration.provenance | {
        "model": loaded.name,
        "images": request.num_images,
        "seed": request.seed,
        "guidance_scale": loaded.spec.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        "conditions_sha256": conditions_hash(request.conditions),
    }
    replace(calibration, provenance=provenance).save(args.output)
    print(f"{args.output}: {calibration.steps} steps, {calibration.blocks} blocks, from {request.num_images} images")
