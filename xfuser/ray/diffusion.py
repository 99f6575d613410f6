"""A pipeline on many processes, called from one: Ray starts the processes and carries prompts and images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xfuser.ray.actors import DecodingProcess, ImageProcess
from xfuser.ray.cluster import collect, connect, end_processes, ray, start_processes
from xfuser.xdit.configs import EngineConfig, InputConfig


class Images(list):
    """One process's images. ``images`` is what its pipeline returned, for scripts that ask for it.

    Args:
        images: A list of PIL images, or an array or tensor of shape [N, ...].
    """

    def __init__(self, images: Iterable[Any]) -> None:
        super().__init__(images)
        self.images = images


class RayDiffusionPipeline:
    """One of xDiT's pipelines, on processes that Ray has started. Made by `from_pretrained`; called in one process.

    Args:
        denoising: Actors that hold the pipeline.
        decoding: Actors that hold its decoder, where it is not decoded by the others.
        pipeline_class: The pipeline's class.
    """

    def __init__(self, denoising: list[Any], decoding: list[Any], pipeline_class: type) -> None:
        self._denoising, self._decoding, self._class = denoising, decoding, pipeline_class

    @classmethod
    def from_pretrained(
        cls,
        PipelineClass: type,  # noqa: N803 (xDiT's name)
        pretrained_model_name_or_path: str | Path,
        engine_config: EngineConfig,
        **keywords: Any,
    ) -> RayDiffusionPipeline:
        """Start the processes and load the pipeline on each of them.

        Args:
            PipelineClass: Such as `xFuserFluxPipeline`.
            pretrained_model_name_or_path: Folder or hub id, the same on every machine of the cluster.
            engine_config: What `xFuserArgs.create_config` returned, with ``use_ray``.
            **keywords: Those of the class's own ``from_pretrained``. For a component, a dict of ``model_class`` and of
                what that class's ``from_pretrained`` takes has it loaded on each process instead of sent there.

        Raises:
            ValueError: The settings are not for Ray, the cluster has too few accelerators, or nothing can be loaded.
        """
        runtime, parallel = engine_config.runtime_config, engine_config.parallel_config
        if not runtime.use_ray:
            raise ValueError("RayDiffusionPipeline starts the processes; give --use_ray, or xFuserArgs(use_ray=True)")
        accelerators = connect(parallel.world_size + runtime.vae_parallel_size)
        denoising = start_processes(ImageProcess, parallel.world_size, accelerators)
        decoding: list[Any] = []
        pipeline = cls(denoising, decoding, PipelineClass)
        try:
            sent, source = ray.put(keywords), str(pretrained_model_name_or_path)
            collect([each.load.remote(PipelineClass, source, engine_config, sent) for each in denoising], denoising)
            if runtime.vae_parallel_size:
                decoding += start_processes(DecodingProcess, runtime.vae_parallel_size, accelerators)
                pipeline._hand_decoder_over()
        except BaseException:
            pipeline.close()
            raise
        return pipeline

    def prepare_run(self, input_config: InputConfig, steps: int = 3, sync_steps: int = 1) -> None:
        """Generate once for nothing on every process, so that the call that counts finds everything warm.

        Args:
            input_config: The sizes.
            steps: Denoising steps.
            sync_steps: PipeFusion: how many of them are synchronous.
        """
        self._on_each("prepare_run", input_config, steps, sync_steps)

    def __call__(self, PipelineClass: type | None = None, **keywords: Any) -> list[Images | None]:  # noqa: N803
        """Generate; the keywords are the diffusers pipeline's.

        Args:
            PipelineClass: The class that was loaded, for scripts that name it once more.
            **keywords: Those of the pipeline.

        Returns:
            One entry for each process with the transformer: its images where it is the one that saves, of those that
            share images, and ``None`` elsewhere. The last entry always has images, unless it had no prompt to do.

        Raises:
            ValueError: Another class was loaded, or the degrees do not fit the model or the image.
        """
        if PipelineClass not in (None, self._class):
            raise ValueError(
                f"{self._class.__name__} was loaded, not {PipelineClass.__name__}; leave PipelineClass out"
            )
        generated = self._on_each("generate", keywords)
        return [None if each is None else Images(each) for each in generated]

    def summaries(self) -> list[dict[str, Any]]:
        """The cache's summary, from each process with the transformer."""
        return self._on_each("summary")

    def close(self) -> None:
        """End the processes. They also end with this one."""
        end_processes((*self._denoising, *self._decoding))
        self._denoising, self._decoding = [], []

    def _hand_decoder_over(self) -> None:
        first, *others = self._decoding
        autoencoder = self._denoising[-1].autoencoder.remote()
        taking = [each.take.remote(autoencoder, others if each is first else ()) for each in self._decoding]
        collect(taking, self._decoding)
        self._on_each("decode_elsewhere", first)

    def _on_each(self, method: str, *arguments: Any) -> list[Any]:
        if not self._denoising:
            raise ValueError("the pipeline's processes have ended; load it again")
        arguments = tuple(ray.put(each) for each in arguments)
        return collect([getattr(each, method).remote(*arguments) for each in self._denoising], self._denoising)
