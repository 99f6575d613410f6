"""The ``xdit`` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from xfuser.config.arguments import (
    add_base_arguments,
    add_correction_arguments,
    add_goal_arguments,
    add_model_arguments,
    add_parallel_arguments,
    add_run_arguments,
    add_sampling_arguments,
    cache_method,
    correction_settings,
    named_settings,
    parallel_config,
    resolve_model,
    trajectory_settings,
)
from xfuser.config.parallel import ParallelConfig
from xfuser.config.refused import refuse_unsupported
from xfuser.core.console import check_output_folder, quiet_libraries


class _Parser(argparse.ArgumentParser):
    """Speaks on the first rank only: the others would say the same."""

    def _print_message(self, message: str, file: Any = None) -> None:
        from xfuser.core.distributed.environment import rank

        if rank() == 0:
            super()._print_message(message, file)


def build_parser() -> argparse.ArgumentParser:
    from xfuser.model_executor.cache.policies import POLICIES
    from xfuser.model_executor.pipelines import MODEL_TYPES

    parser = _Parser(prog="xdit", description="Diffusion transformers with quality-controlled caching.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="generate images", description="Generate images.")
    add_model_arguments(generate, list(MODEL_TYPES))
    add_sampling_arguments(generate)
    add_condition_arguments(generate)
    generate.add_argument("--negative_prompt", help="what the images are not to show (prompt models)")
    generate.add_argument(
        "--true_cfg_scale", type=float, help="flux: guidance by --negative_prompt, above 1 (default: 1, none)"
    )
    generate.add_argument("--output_dir", type=Path, default=Path("outputs"), help="default: %(default)s")
    generate.add_argument("--save_raw", action="store_true", help="write images.npy too: float32 [N, H, W, C], 0 to 1")
    generate.add_argument("--use_cache", choices=[str(name) for name in POLICIES], help="default: None")
    generate.add_argument(
        "--rel_l1_thresh", type=float, help="threshold of the base method (default: the model type's)"
    )
    add_goal_arguments(generate)
    add_base_arguments(generate)
    add_correction_arguments(generate)
    add_parallel_arguments(generate)
    add_run_arguments(generate)
    generate.set_defaults(run=run_generate)
    calibrate = commands.add_parser(
        "calibrate",
        help="learn a model's behaviour once",
        description="Generate some images without a cache and keep what caches can learn from them: TeaCache's "
        "polynomial, FastCache's maps and noise, the weights of approximation 'fitted'.",
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
    calibrate.set_defaults(run=run_calibrate, num_images=16)
    return parser


def add_condition_arguments(parser: argparse.ArgumentParser) -> None:
    """What the images are to show."""
    parser.add_argument("--prompt", nargs="+", help="prompts, taken in turn (flux, pixart, sd3)")
    parser.add_argument("--class_label", nargs="+", help="class numbers or names, taken in turn (tiny-dit, dit)")


def run_generate(args: argparse.Namespace) -> None:
    from xfuser.config import CacheConfig
    from xfuser.core.distributed.environment import choose_device, join_processes, launched, world_size
    from xfuser.core.distributed.failing import begin_together, end, finish, watch
    from xfuser.core.distributed.launch import start_processes
    from xfuser.core.distributed.mesh import ParallelMesh
    from xfuser.model_executor.cache.adacorrection.trajectory import TrajectoryConfig
    from xfuser.model_executor.parallel import check_combination, parallelize
    from xfuser.model_executor.pipelines import MODEL_TYPES
    from xfuser.model_executor.pipelines.generate import batches_of, generate_images
    from xfuser.model_executor.pipelines.screens import print_summary

    resolve_model(args, MODEL_TYPES)
    settings = trajectory_settings(args)
    if settings is None:
        settings = cache_settings(args, MODEL_TYPES[args.model_type].thresholds)
        cache = CacheConfig.from_keywords(**settings)
    else:
        cache = TrajectoryConfig(**settings)
    parallel = parallel_config(args)
    check_conditions(args)
    check_generation(args, parallel)
    if isinstance(cache, CacheConfig):
        check_combination(cache, parallel)
    check_output_folder(args.output_dir)
    device = choose_device(args.device)
    if launched():
        parallel.check_world(world_size())
    if parallel.world_size > 1:
        check_model(args, parallel)
        if not launched():
            raise SystemExit(start_processes(parallel.world_size, args.argv, args.script))
    if launched():
        watch(f"xdit {args.command}")

    def begin() -> tuple[Any, Any, Any]:
        loaded, request = load_and_request(args)
        batches_of(request, parallel.data_parallel_degree)
        if args.enable_tiling:
            loaded.pipeline.vae.enable_tiling()
        if args.enable_slicing:
            loaded.pipeline.vae.enable_slicing()
        spread = parallelize(loaded.pipeline, mesh, use_torch_compile=args.use_torch_compile, **settings)
        return loaded, request, spread

    try:
        join_processes(device, args.timeout)
        mesh = ParallelMesh(parallel, device)
        loaded, request, spread = begin_together(begin)
        said = {"cache": vars(cache), "parallel": vars(parallel), "use_torch_compile": args.use_torch_compile}
        document = generate_images(loaded, request, spread, args.output_dir, args.save_raw, said)
    except Exception as error:
        end(f"xdit {args.command}", error)
    if document is not None:
        print_summary(document, args.output_dir)
    finish()


def run_calibrate(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from xfuser.model_executor.cache import apply_cache_on_pipeline
    from xfuser.model_executor.pipelines import MODEL_TYPES
    from xfuser.model_executor.pipelines.calibrate import calibrate_trajectory, check_calibration
    from xfuser.model_executor.pipelines.generate import conditions_hash, generate_batches

    resolve_model(args, MODEL_TYPES)
    read_prompts(args)
    if args.output.suffix != ".safetensors":
        raise ValueError(f"--output: {str(args.output)!r} does not end in .safetensors")
    check_conditions(args)
    check_output_folder(args.output.parent, "--output")
    if args.level == "trajectory":
        check_calibration(args)
        calibrate_trajectory(args, *load_and_request(args))
        return
    for name in ("budgets", "reference_steps"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} belongs to --level trajectory")
    loaded, request = load_and_request(args)
    engine = apply_cache_on_pipeline(loaded.pipeline)
    engine.record()
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


def read_prompts(args: argparse.Namespace) -> None:
    """Take the prompts from the file that is named (ValueError where both or an empty file are)."""
    if args.prompts is None:
        return
    if args.prompt:
        raise ValueError("--prompt and --prompts both name prompts; leave one of them out")
    args.prompt = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not args.prompt:
        raise ValueError(f"--prompts: {args.prompts} holds no prompt")


def check_conditions(args: argparse.Namespace) -> None:
    """Refuse prompts for a model of labels, and the other way round, before anything is loaded."""
    from xfuser.model_executor.pipelines import MODEL_TYPES

    labelled = MODEL_TYPES[args.model_type].conditioned_on == "label"
    wanted, other = ("class_label", "prompt") if labelled else ("prompt", "class_label")
    if getattr(args, other) is not None:
        raise ValueError(f"--{other} does not go with --model_type {args.model_type}; use --{wanted}")
    if not labelled and not args.prompt:
        raise ValueError("--prompt is missing: name at least one")


def check_generation(args: argparse.Namespace, parallel: ParallelConfig) -> None:
    """Refuse guidance that the model has not, and more replicas than images, before anything is loaded (ValueError)."""
    from xfuser.model_executor.adapters import DECLARATIONS
    from xfuser.model_executor.pipelines import MODEL_TYPES

    spec = MODEL_TYPES[args.model_type]
    in_calls = DECLARATIONS[spec.transformer_class].guidance == "calls"
    named = f"--model_type {args.model_type}"
    if args.negative_prompt is not None and spec.conditioned_on == "label":
        raise ValueError(f"--negative_prompt does not go with {named}; leave it out")
    if args.true_cfg_scale is not None and not in_calls:
        raise ValueError(f"--true_cfg_scale does not go with {named}; use --guidance_scale")
    true_cfg = args.true_cfg_scale is not None and args.true_cfg_scale > 1
    if in_calls and true_cfg != (args.negative_prompt is not None):
        raise ValueError("--negative_prompt and --true_cfg_scale above 1 go together; name both or neither")
    scale = spec.guidance_scale if args.guidance_scale is None else args.guidance_scale
    if parallel.use_cfg_parallel and not (true_cfg if in_calls else scale > 1):
        needed = "--negative_prompt and --true_cfg_scale above 1" if in_calls else "--guidance_scale above 1"
        raise ValueError(f"--use_cfg_parallel: there is one branch only; add {needed}, or leave it out")
    if parallel.use_parallel_vae and args.enable_tiling:
        raise ValueError("--use_parallel_vae and --enable_tiling both cut the image; name one of them")
    images = args.num_images or len(args.prompt or args.class_label or [])
    if images and images < parallel.data_parallel_degree:
        raise ValueError(
            f"--data_parallel_degree {parallel.data_parallel_degree}: there are only {images} images; ask for more, "
            "or lower it"
        )


def check_model(args: argparse.Namespace, parallel: ParallelConfig) -> None:
    """Refuse degrees that the model's heads, blocks or tokens do not allow, from its configuration (ValueError)."""
    from xfuser.model_executor.pipelines.outline import outline

    outline(args.model_type, args.model, args.height, args.width).check(parallel)


def load_and_request(args: argparse.Namespace) -> tuple[Any, Any]:
    """The pipeline, and what it is to generate."""
    import torch
    from diffusers.utils.logging import disable_progress_bar

    from xfuser.core.distributed.environment import choose_device, rank
    from xfuser.model_executor.pipelines import load_pipeline
    from xfuser.model_executor.pipelines.generate import Generation

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
    )
    return loaded, request


def cache_settings(args: argparse.Namespace, thresholds: dict[str, float]) -> dict[str, Any]:
    """`CacheConfig` settings from the command line."""
    method = cache_method(args)
    settings = {"use_cache": method, "approximation": args.approximation, **named_settings(args)}
    if args.rel_l1_thresh is not None:
        settings["rel_l1_thresh"] = args.rel_l1_thresh
    elif method in thresholds:
        settings["rel_l1_thresh"] = thresholds[method]
    return settings | correction_settings(args, args.enable_adacorrection)


def class_numbers(names: list[str] | None, loaded: Any) -> list[int]:
    """Class numbers from numbers or names; all classes where none is named."""
    labels = loaded.pipeline.labels
    if names is None:
        return list(range(min(10, loaded.num_classes())))
    numbers = []
    for name in names:
        number = int(name) if name.isdigit() else labels.get(name)
        if number is None or number >= loaded.num_classes():
            known = ", ".join(f"{value} {key}" for key, value in sorted(labels.items(), key=lambda item: item[1])[:20])
            raise ValueError(f"--class_label {name!r} is not a class of {loaded.name}; known are {known}")
        numbers.append(number)
    return numbers


def main(argv: list[str] | None = None, script: Path | None = None) -> None:
    """Run a command.

    Args:
        argv: Its name and arguments; by default the process's own.
        script: What to start in other processes, with the arguments alone, in place of ``xfuser.cli``.
    """
    quiet_libraries()
    argv = sys.argv[1:] if argv is None else argv
    name = f"xdit {argv[0]}" if argv and not argv[0].startswith("-") else "xdit"
    try:
        refuse_unsupported(argv)
        args = build_parser().parse_args(argv)
        args.script, args.argv = script, argv if script is None else argv[1:]
        args.run(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError) as error:
        from xfuser.core.distributed.failing import end

        end(name, error)


if __name__ == "__main__":
    main()
