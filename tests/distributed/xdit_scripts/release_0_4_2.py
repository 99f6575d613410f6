"""A script of the shape of xDiT 0.4.2's examples: one pipeline, saved images, and the name that ends it as it was."""

import os
import time

import torch
import torch.distributed

from xfuser import (
    xFuserArgs,
    xFuserFluxPipeline,
    xFuserPixArtAlphaPipeline,
    xFuserPixArtSigmaPipeline,
    xFuserStableDiffusion3Pipeline,
)
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import (
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_runtime_state,
    get_world_group,
    is_dp_last_group,
)

PIPELINES = {
    "flux": xFuserFluxPipeline,
    "alpha": xFuserPixArtAlphaPipeline,
    "sigma": xFuserPixArtSigmaPipeline,
    "sd3": xFuserStableDiffusion3Pipeline,
}


def main():
    parser = FlexibleArgumentParser(description="arguments of xFuser")
    parser.add_argument("--family", choices=PIPELINES, required=True)
    args = xFuserArgs.add_cli_args(parser).parse_args()
    engine_args = xFuserArgs.from_cli_args(args)
    engine_config, input_config = engine_args.create_config()
    rank, last = get_world_group().rank, get_world_group().world_size - 1
    pipe = (
        PIPELINES[args.family]
        .from_pretrained(
            pretrained_model_name_or_path=engine_config.model_config.model,
            engine_config=engine_config,
            torch_dtype=torch.float32,
        )
        .to("cpu")
    )
    pipe.prepare_run(input_config)

    own = {
        "flux": {"guidance_scale": 0.0, "max_sequence_length": 256},
        "alpha": {"use_resolution_binning": input_config.use_resolution_binning},
        "sigma": {"use_resolution_binning": input_config.use_resolution_binning, "clean_caption": False},
        "sd3": {},
    }
    begin = time.time()
    output = pipe(
        height=input_config.height,
        width=input_config.height,
        prompt=input_config.prompt,
        num_inference_steps=input_config.num_inference_steps,
        output_type=input_config.output_type,
        generator=torch.Generator(device="cpu").manual_seed(input_config.seed),
        **own[args.family],
    )
    seconds = time.time() - begin

    config = engine_config.parallel_config
    shape = (
        f"dp{config.dp_degree}_cfg{config.cfg_degree}_ulysses{engine_args.ulysses_degree}_"
        f"ring{engine_args.ring_degree}_pp{config.pp_degree}_patch{engine_args.num_pipeline_patch}"
    )
    if input_config.output_type == "pil" and is_dp_last_group():
        groups = get_data_parallel_world_size()
        first = get_data_parallel_rank() * ((input_config.batch_size + groups - 1) // groups)
        os.makedirs("results", exist_ok=True)
        for index, image in enumerate(output.images):
            image.save(f"./results/{args.family}_{shape}_{first + index}.png")
    if rank == last:
        print(f"epoch time: {seconds:.2f} sec")
    get_runtime_state().destory_distributed_env()
    return pipe


if __name__ == "__main__":
    pipe = main()
