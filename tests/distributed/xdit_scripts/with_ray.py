"""A script of the shape of xDiT's Ray examples and of its service: Ray starts the processes, one process asks them."""

import io
import json
import logging
import os

import ray
import torch
from transformers import T5EncoderModel

from xfuser import (
    xFuserArgs,
    xFuserFluxPipeline,
    xFuserHunyuanDiTPipeline,
    xFuserPixArtSigmaPipeline,
)
from xfuser.config import FlexibleArgumentParser
from xfuser.model_executor.pipelines import xFuserPixArtAlphaPipeline
from xfuser.ray.pipeline.pipeline_utils import RayDiffusionPipeline


def example(args):
    """The example: a component is described, and loaded by the processes; one class is named twice."""
    engine_args = xFuserArgs.from_cli_args(args)
    engine_config, input_config = engine_args.create_config()
    model = engine_config.model_config.model
    described = {
        "text_encoder": {
            "model_class": T5EncoderModel,
            "pretrained_model_name_or_path": model,
            "subfolder": "text_encoder",
            "torch_dtype": torch.float32,
        }
    }
    pipe = RayDiffusionPipeline.from_pretrained(
        PipelineClass=xFuserPixArtAlphaPipeline,
        pretrained_model_name_or_path=model,
        engine_config=engine_config,
        torch_dtype=torch.float32,
        **described,
    )
    pipe.prepare_run(input_config)

    def generate(**changed):
        settings = {
            "height": input_config.height,
            "width": input_config.width,
            "prompt": input_config.prompt,
            "num_inference_steps": input_config.num_inference_steps,
            "output_type": input_config.output_type,
            "use_resolution_binning": input_config.use_resolution_binning,
            "generator": torch.Generator(device="cpu").manual_seed(input_config.seed),
            "clean_caption": False,
        }
        return pipe(PipelineClass=xFuserPixArtAlphaPipeline, **(settings | changed))

    output = generate()
    for images in output:
        if images is not None:
            images[0].save("first.png")
            break
    output[-1].images[0].save("last.png")
    seen = {
        "entries": [each is not None for each in output],
        "hit_rates": [each["hit_rate"] for each in pipe.summaries()],
        "latents": list(generate(output_type="latent")[-1].images.shape),
    }
    try:
        generate(height=60)
    except ValueError as refusal:
        seen["refused"] = str(refusal)
    generate()[-1][0].save("again.png")
    pipe.close()
    return seen


@ray.remote(num_cpus=0)
class ImageGenerator:
    """The service's actor: each meets the others itself, and answers requests."""

    def __init__(self, xfuser_args, rank, world_size, port):
        os.environ["RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = str(world_size)
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = port
        self.logger = logging.getLogger(__name__)
        self.engine_config, self.input_config = xfuser_args.create_config()
        known = {
            "flux": xFuserFluxPipeline,
            "alpha": xFuserPixArtAlphaPipeline,
            "sigma": xFuserPixArtSigmaPipeline,
            "hunyuan": xFuserHunyuanDiTPipeline,
        }
        self.pipe = known[self.engine_config.model_config.model.split("/")[-1]].from_pretrained(
            pretrained_model_name_or_path=xfuser_args.model,
            engine_config=self.engine_config,
            torch_dtype=torch.float32,
        )
        self.pipe = self.pipe.to("cpu")
        self.pipe.prepare_run(self.input_config)

    def generate(self, request):
        output = self.pipe(
            height=request["height"],
            width=request["width"],
            prompt=request["prompt"],
            num_inference_steps=request["num_inference_steps"],
            output_type="pil",
            generator=torch.Generator(device="cpu").manual_seed(request["seed"]),
            guidance_scale=request["cfg"],
            max_sequence_length=self.input_config.max_sequence_length,
        )
        if self.pipe.is_dp_last_group():
            held = io.BytesIO()
            output.images[0].save(held, format="PNG")
            return held.getvalue()
        return None


def service(model, port):
    """The service without its HTTP: requests of different sizes, one of them impossible."""
    xfuser_args = xFuserArgs(
        model=model,
        trust_remote_code=True,
        warmup_steps=1,
        use_parallel_vae=False,
        use_torch_compile=False,
        ulysses_degree=1,
        pipefusion_parallel_degree=1,
        use_cfg_parallel=False,
        dit_parallel_size=0,
        height=64,
        width=64,
    )
    workers = [ImageGenerator.remote(xfuser_args, rank=0, world_size=1, port=port)]

    def ask(**changed):
        request = {"prompt": "a dog", "height": 64, "width": 64, "num_inference_steps": 3, "seed": 42, "cfg": 3.5}
        results = ray.get([worker.generate.remote(request | changed) for worker in workers])
        return next(each for each in results if each is not None)

    first, other, again = ask(), ask(height=32, num_inference_steps=2), ask()
    return {"same": first == again, "differs": first != other, "is_png": first[1:4] == b"PNG"}


def main():
    parser = FlexibleArgumentParser(description="arguments of xFuser")
    parser.add_argument("--service_model", required=True)
    parser.add_argument("--service_port", required=True)
    args = xFuserArgs.add_cli_args(parser).parse_args()
    seen = {"example": example(args), "service": service(args.service_model, args.service_port)}
    with open("seen.json", "w") as results:
        json.dump(seen, results)


if __name__ == "__main__":
    main()
