"""A pipeline from scene graphs to images, as SGDiff (arXiv 2211.11138): a graph encoder, a latent UNet, an autoencoder.

It lies beside diffusers' own pipelines as one of them: ``save_pretrained`` and ``from_pretrained`` work, and caches
attach to its UNet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from xfuser.model_executor.pipelines.scene_graph_encoder import SceneGraphEncoder

Graph = Mapping[str, Any] | str


class SceneGraphPipeline(DiffusionPipeline):
    """Draws scene graphs.

    Args:
        vae: Decodes the latents.
        graph_encoder: Encodes graphs into the tokens that the UNet's cross-attention reads.
        unet: Foretells the noise, or what else the scheduler is told of.
        scheduler: DDIM or a relative.
    """

    model_cpu_offload_seq = "graph_encoder->unet->vae"
    _callback_tensor_inputs = ["latents", "graph_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL,
        graph_encoder: SceneGraphEncoder,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler | KarrasDiffusionSchedulers,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, graph_encoder=graph_encoder, unet=unet, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def encode_graphs(self, graphs: Sequence[Graph | None]) -> torch.Tensor:
        """Encode graphs, or ``None`` for no graph, into tokens [N, tokens, channels].

        Raises:
            ValueError: One says what the model does not know.
        """
        vocabulary = self.graph_encoder.vocabulary
        checked = [None if graph is None else vocabulary.check(graph) for graph in graphs]
        numbers = self.graph_encoder.numbers_of(checked)
        return self.graph_encoder(numbers.to(self._execution_device)).to(self.unet.dtype)

    @torch.no_grad()
    def __call__(
        self,
        scene_graphs: Graph | Sequence[Graph],
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw an image of each graph.

        Args:
            scene_graphs: ``{"objects": [name, ...], "relations": [[subject, predicate, object], ...]}`` with indices of
                objects, or the same as JSON text; one, or a list of them.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance, against no graph; none at 1 and below.
            num_images_per_prompt: Images of each graph.
            generator: Of the noise; a list has one for each image.
            latents: The noise, where it is not to be drawn.
            eta: DDIM's; other schedulers do not read it.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
            return_dict: Whether to return an ``ImagePipelineOutput``, and no tuple.
            callback_on_step_end: Called after every step with the pipeline, the step, its timestep and the tensors that
                it asks for; those that it returns take their place.
            callback_on_step_end_tensor_inputs: Names of them, of ``latents`` and ``graph_embeds``.

        Raises:
            ValueError: A graph says what the model does not know, or numbers do not fit each other.
        """
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs: {min(unknown)!r} is not known; known are {known}")
        graphs = [scene_graphs] if isinstance(scene_graphs, str | Mapping) else list(scene_graphs)
        if not graphs:
            raise ValueError("scene_graphs: there is none; name at least one")
        self._guidance_scale = guidance_scale
        graph_embeds = self.encode_graphs(graphs).repeat_interleave(num_images_per_prompt, dim=0)
        count, device = len(graph_embeds), self._execution_device
        if guidance_scale > 1:
            graph_embeds = torch.cat([self.encode_graphs([None] * count), graph_embeds])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self.prepare_latents(count, generator, latents)
        # Not every scheduler takes eta, or noise of its own.
        takes = inspect.signature(self.scheduler.step).parameters
        options = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in takes}
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                inputs = torch.cat([latents] * 2) if guidance_scale > 1 else latents
                inputs = self.scheduler.scale_model_input(inputs, timestep)
                foretold = self.unet(inputs, timestep, encoder_hidden_states=graph_embeds, return_dict=False)[0]
                if guidance_scale > 1:
                    without, told = foretold.chunk(2)
                    foretold = without + guidance_scale * (told - without)
                latents = self.scheduler.step(foretold, timestep, latents, **options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    known = {"latents": latents, "graph_embeds": graph_embeds}
                    asked = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    answer = callback_on_step_end(self, step, timestep, asked) or {}
                    latents = answer.pop("latents", latents)
                    graph_embeds = answer.pop("graph_embeds", graph_embeds)
                progress.update()
        images = latents
        if output_type != "latent":
            images = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_latents(
        self, count: int, generator: torch.Generator | list[torch.Generator] | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """Draw the noise that begins, or take that which is given.

        Raises:
            ValueError: There are not as many generators as images, or latents have another shape.
        """
        side, device = self.unet.config.sample_size, self._execution_device
        shape = (count, self.unet.config.in_channels, side, side)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator: {len(generator)} given for {count} images; give one for each, or one for all")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}")
        return latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps
