"""A script as users of xDiT have them: it uses xDiT's names only, and leaves the rest to the engine.

With ``--jobs FILE`` it runs once for each command line in that JSON file, in the same processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline

from xfuser import xDiTParallel, xFuserArgs, xFuserFluxPipeline, xFuserPixArtAlphaPipeline
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import (
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_runtime_state,
    get_sequence_parallel_world_size,
    get_world_group,
    is_dp_last_group,
)

PIPELINES = {"flux": xFuserFluxPipeline, "pixart": xFuserPixArtAlphaPipeline}


def main() -> None:
    parser = FlexibleArgumentParser(description="xFuser Arguments")
    parser.add_argument("--family", choices=("flux", "pixart", "wrapped"), required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = xFuserArgs.add_cli_args(parser).parse_args()
    engine_args = xFuserArgs.from_cli_args(args)
    engine_config, input_config = engine_args.create_config()
    engine_config.runtime_config.dtype = torch.float32
    local_rank = get_world_group().local_rank
    assert 0 <= local_rank < get_world_group().world_size
    if args.family == "wrapped":
        wrap(engine_config, input_config, args.results)
    else:
        generate(args, engine_args, engine_config, input_config)
    get_runtime_state().destroy_distributed_env()


def generate(args, engine_args, engine_config, input_config) -> None:
    cache_args = {
        "use_teacache": engine_args.use_teacache,
        "use_fbcache": engine_args.use_fbcache,
        "rel_l1_thresh": 0.4 if args.family == "flux" else 0.05,
        "num_steps": input_config.num_inference_steps,
    }
    pipe = PIPELINES[args.family].from_pretrained(
        pretrained_model_name_or_path=engine_config.model_config.model,
        engine_config=engine_config,
        cache_args=cache_args,
        torch_dtype=torch.float32,
    )
    pipe = pipe.to("cpu")
    pipe.prepare_run(input_config)
    binning = {} if args.family == "flux" else {"use_resolution_binning": input_config.use_resolution_binning}
    output = pipe(
        height=input_config.height,
        width=input_config.width,
        prompt=input_config.prompt,
        num_inference_steps=input_config.num_inference_steps,
        output_type=input_config.output_type,
        max_sequence_length=input_config.max_sequence_length,
        guidance_scale=input_config.guidance_scale,
        generator=torch.Generator(device="cpu").manual_seed(input_config.seed),
        **binning,
    )
    if pipe.is_dp_last_group():
        groups = get_data_parallel_world_size()
        part = (input_config.batch_size + groups - 1) // groups
        for index, image in enumerate(output.images):
            number = get_data_parallel_rank() * part + index
            np.save(args.results / f"image{number}.npy", image)
    summary = {
        "rank": get_world_group().rank,
        "sequence": get_sequence_parallel_world_size(),
        "hit_rate": pipe.parallel.summary()["hit_rate"],
        "plan": [steps for _, steps in sorted(pipe.parallel.summary()["plan"].items())],
    }
    (args.results / f"rank{get_world_group().rank}.json").write_text(json.dumps(summary))


def wrap(engine_config, input_config, results: Path) -> None:
    pipe = FluxPipeline.from_pretrained(engine_config.model_config.model).to("cpu")
    paralleler = xDiTParallel(pipe, engine_config, input_config)
    paralleler(
        height=input_config.height,
        width=input_config.width,
        prompt=input_config.prompt,
        num_inference_steps=input_config.num_inference_steps,
        output_type=input_config.output_type,
        max_sequence_length=input_config.max_sequence_length,
        generator=torch.Generator(device="cpu").manual_seed(input_config.seed),
    )
    saved = paralleler.save(results, "flux")
    assert bool(saved) == is_dp_last_group()


if __name__ == "__main__":
    if sys.argv[1] == "--jobs":
        for line in json.loads(Path(sys.argv[2]).read_text()):
            sys.argv[1:] = line
            main()
    else:
        main()
