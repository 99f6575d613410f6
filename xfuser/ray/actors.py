"""What each process that Ray has started does: denoise its part of a job, or decode."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xfuser.core.distributed.environment import choose_device, join_processes
from xfuser.model_executor.parallel.autoencoder import ParallelDecoder
from xfuser.ray.cluster import ray
from xfuser.xdit.configs import EngineConfig, InputConfig
from xfuser.xdit.parallel_state import is_dp_last_group, start


class Process:
    """One of several processes that meet each other over torch.distributed."""

    def meeting_place(self) -> tuple[str, int]:
        """This process's machine, and a port there that nobody listens on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def place(self, rank: int, processes: int, address: str, port: int) -> None:
        """Be told what torchrun tells the processes that it starts. Ray shows each its own accelerator only."""
        told = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "MASTER_ADDR": address, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()})


class ImageProcess(Process):
    """Holds a pipeline of xDiT's names, spread over all processes of this kind."""

    def load(self, pipeline_class: type, source: str, engine_config: EngineConfig, keywords: Mapping[str, Any]) -> None:
        """Meet the others and load the pipeline. Collective.

        Args:
            pipeline_class: Such as `xFuserFluxPipeline`.
            source: Folder or hub id.
            engine_config: What ``create_config`` returned.
            keywords: Those of ``from_pretrained``. A mapping with a ``model_class`` is loaded here, with its others.
        """
        mesh = start(engine_config.parallel_config)
        loaded = {name: _loaded(value) for name, value in keywords.items()}
        self._pipe = pipeline_class.from_pretrained(source, engine_config=engine_config, **loaded).to(mesh.device)
        self._pipe.set_progress_bar_config(disable=dist.get_rank() > 0)
        self._decodes_itself = True

    def autoencoder(self) -> nn.Module:
        """A copy of the pipeline's autoencoder, on the CPU."""
        return copy.deepcopy(self._pipe.vae).to("cpu")

    def decode_elsewhere(self, decoder: Any) -> None:
        """Give the decoder up for a `DecodingProcess`."""
        self._pipe.vae.decoder = RemoteDecoder(decoder)
        self._decodes_itself = False

    def prepare_run(self, input_config: InputConfig, steps: int, sync_steps: int) -> None:
        """Warm up. Collective."""
        if not self._saves_or_decodes:
            input_config = replace(input_config, output_type="latent")
        self._pipe.prepare_run(input_config, steps, sync_steps)

    def generate(self, keywords: Mapping[str, Any]) -> Any:
        """The pipeline's images, from the one process that saves them in xDiT's scripts; ``None`` else. Collective."""
        if not self._saves_or_decodes:
            keywords = {**keywords, "output_type": "latent"}
        output = self._pipe(**keywords)
        if not is_dp_last_group():
            return None
        images = output[0] if isinstance(output, tuple) else output.images
        return images.cpu() if isinstance(images, torch.Tensor) else images

    def summary(self) -> dict[str, Any]:
        return self._pipe.parallel.summary()

    @property
    def _saves_or_decodes(self) -> bool:
        return self._decodes_itself or is_dp_last_group()


class DecodingProcess(Process):
    """Holds a decoder; several of them decode one image together, and the first is the one that is asked."""

    def take(self, autoencoder: nn.Module, others: Sequence[Any]) -> None:
        """Be given the weights. Collective.

        Args:
            autoencoder: The pipeline's.
            others: For the first process, the ones that decode with it.

        Raises:
            ValueError: Several processes cannot share this decoder's work.
        """
        self._device, self._others = choose_device(), others
        join_processes(self._device)
        self._autoencoder = autoencoder.to(self._device)
        if dist.get_world_size() > 1:
            ParallelDecoder(self._autoencoder, dist.group.WORLD)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [N, C, h, w] to images [N, 3, H, W], on the CPU."""
        # One process asks the others, so that all of them decode what several senders want in the same order.
        parts = [each.decode.remote(latents) for each in self._others]
        images = self._autoencoder.decoder(latents.to(self._device)).cpu()
        ray.get(parts)
        return images


class RemoteDecoder(nn.Module):
    """Stands in an autoencoder for its decoder, which another process holds."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self._decoder = decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return ray.get(self._decoder.decode.remote(latents.cpu())).to(latents.device)


def _loaded(value: Any) -> Any:
    if isinstance(value, Mapping) and "model_class" in value:
        settings = dict(value)
        return settings.pop("model_class").from_pretrained(**settings)
    return value
