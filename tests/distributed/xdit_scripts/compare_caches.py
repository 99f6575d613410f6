"""A script of the shape of FastCache's authors' benchmark: FLUX's path for every model, one setting for all methods."""

import argparse
import json

import numpy as np
import torch
from diffusers import FluxPipeline, PixArtSigmaPipeline, StableDiffusion3Pipeline

from xfuser.model_executor.cache.diffusers_adapters.flux import apply_cache_on_transformer

PIPELINES = {"flux": FluxPipeline, "sigma": PixArtSigmaPipeline, "sd3": StableDiffusion3Pipeline}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", choices=PIPELINES, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache_methods", nargs="+", default=["None", "Fast", "Fb", "Tea"])
    parser.add_argument("--cache_ratio_threshold", type=float, default=0.15)
    parser.add_argument("--motion_threshold", type=float, default=0.1)
    args = parser.parse_args()
    rows = {}
    for method in args.cache_methods:
        pipe = PIPELINES[args.family].from_pretrained(args.model, torch_dtype=torch.float32).to("cpu")
        pipe.set_progress_bar_config(disable=True)
        if method != "None":
            apply_cache_on_transformer(
                pipe.transformer,
                rel_l1_thresh=args.cache_ratio_threshold,
                return_hidden_states_first=False,
                num_steps=8,
                use_cache=method,
                motion_threshold=args.motion_threshold,
            )
        own = {"use_resolution_binning": False} if args.family == "sigma" else {}
        with torch.no_grad():
            image = pipe(
                prompt="a landscape",
                num_inference_steps=8,
                height=64,
                width=64,
                generator=torch.Generator(device="cpu").manual_seed(42),
                output_type="np",
                **own,
            ).images[0]
        rows[method] = np.asarray(image).tolist()
    with open("rows.json", "w") as results:
        json.dump(rows, results)


if __name__ == "__main__":
    main()
