"""A script of the shape of xDiT 0.4.4's and 0.4.5's examples: a text encoder loaded apart, and a cache."""

import logging
import os
import time

import torch
import torch.distributed
from transformers import T5EncoderModel

from xfuser import (
    xFuserArgs,
    xFuserFluxPipeline,
    xFuserPixArtAlphaPipeline,
    xFuserPixArtSigmaPipeline,
    xFuserStableDiffusion3Pipeline,
)
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import get_data_parallel_rank, get_runtime_state, get_world_group
from xfuser.core.distributed.parallel_state import get_data_parallel_world_size
from xfuser.model_executor.cache.diffusers_adapters import apply_cache_on_transformer  # noqa: F401 (as examples do)

PIPELINES = {
    "flux": (xFuserFluxPipeline, "text_encoder_2"),
    "alpha": (xFuserPixArtAlphaPipeline, "text_encoder"),
    "sigma": (xFuserPixArtSigmaPipeline, "text_encoder"),
    "sd3": (xFuserStableDiffusion3Pipeline, "text_encoder_3"),
}


def main():
    parser = FlexibleArgumentParser(description="arguments of xFuser")
    parser.add_argument("--family", choices=PIPELINES, required=True)
    args = xFuserArgs.add_cli_args(parser).parse_args()
    engine_args = xFuserArgs.from_cli_args(args)
    engine_config, input_config = engine_args.create_config()
    engine_config.runtime_config.dtype = torch.float32
    local_rank = get_world_group().local_rank
    assert not args.use_fp8_t5_encoder
    model, (kind, encoder) = engine_config.model_config.model, PIPELINES[args.family]
    loaded = {encoder: T5EncoderModel.from_pretrained(model, subfolder=encoder, torch_dtype=torch.float32)}
    if args.family == "flux":
        loaded["cache_args"] = {
            "use_teacache": engine_args.use_teacache,
            "use_fbcache": engine_args.use_fbcache,
            "rel_l1_thresh": 0.12,
            "return_hidden_states_first": False,
            "num_steps": input_config.num_inference_steps,
        }
    pipe = kind.from_pretrained(
        pretrained_model_name_or_path=model, engine_config=engine_config, torch_dtype=torch.float32, **loaded
    )
    if args.enable_sequential_cpu_offload:
        pipe.enable_sequential_cpu_offload(gpu_id=local_rank)
        logging.info("rank %d is offloaded", local_rank)
    else:
        pipe = pipe.to("cpu")
    if args.family == "flux":
        pipe.prepare_run(input_config, steps=input_config.num_inference_steps)
    else:
        pipe.prepare_run(input_config)

    own = {"flux": {"max_sequence_length": 256}, "sigma": {"clean_caption": False}}.get(args.family, {})
    if args.family in ("alpha", "sigma"):
        own["use_resolution_binning"] = input_config.use_resolution_binning
    begin = time.time()
    output = pipe(
        height=input_config.height,
        width=input_config.width,
        prompt=input_config.prompt,
        num_inference_steps=input_config.num_inference_steps,
        output_type=input_config.output_type,
        guidance_scale=input_config.guidance_scale,
        generator=torch.Generator(device="cpu").manual_seed(input_config.seed),
        **own,
    )
    seconds = time.time() - begin

    shape = (
        f"dp{engine_args.data_parallel_degree}_cfg{engine_config.parallel_config.cfg_degree}_"
        f"ulysses{engine_args.ulysses_degree}_ring{engine_args.ring_degree}_tp{engine_args.tensor_parallel_degree}_"
        f"pp{engine_args.pipefusion_parallel_degree}_patch{engine_args.num_pipeline_patch}"
    )
    if input_config.output_type == "pil" and pipe.is_dp_last_group():
        groups = get_data_parallel_world_size()
        first = get_data_parallel_rank() * ((input_config.batch_size + groups - 1) // groups)
        os.makedirs("results", exist_ok=True)
        for index, image in enumerate(output.images):
            image.save(f"./results/{args.family}_{shape}_{first + index}_tc_{engine_args.use_torch_compile}.png")
    if get_world_group().rank == get_world_group().world_size - 1:
        print(f"epoch time: {seconds:.2f} sec")
    get_runtime_state().destroy_distributed_env()
    return pipe


if __name__ == "__main__":
    pipe = main()
