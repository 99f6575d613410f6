"""Spread a pipeline over the ranks of a mesh, with a cache that decides alike on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xfuser.config import CacheConfig, ParallelConfig
from xfuser.config.cache import FIRST
from xfuser.core.attention import AttentionContext
from xfuser.core.distributed.agreement import Agreement
from xfuser.core.distributed.clock import Clock
from xfuser.core.distributed.environment import join_processes, waiter
from xfuser.core.distributed.exchange import SumExchange
from xfuser.core.distributed.mesh import ParallelMesh
from xfuser.model_executor.adapters import BoundArguments, ModelSpec, denoisers_of, spec_of
from xfuser.model_executor.cache.adacorrection.trajectory import TrajectoryEngine, attach_trajectory
from xfuser.model_executor.cache.adacorrection.trajectory.branches import sample_of, with_sample
from xfuser.model_executor.cache.adacorrection.trajectory.wrapping import CallWrapper
from xfuser.model_executor.cache.apply import (
    as_keywords,
    check_unattached,
    load_calibration,
    on_trajectory,
    spends_as_base,
)
from xfuser.model_executor.cache.blocks.parts import check_model
from xfuser.model_executor.cache.engine import CacheEngine
from xfuser.model_executor.cache.patching import Replacement
from xfuser.model_executor.cache.policies import POLICIES
from xfuser.model_executor.parallel.autoencoder import ParallelDecoder, check_decoder
from xfuser.model_executor.parallel.compiled import compile_blocks
from xfuser.model_executor.parallel.guidance import BatchedBranches, BranchCalls, SchedulerMarks
from xfuser.model_executor.parallel.sequence import SequenceShards
from xfuser.model_executor.pipefusion import Partition, Stage, drop_other_blocks


class ParallelPipeline:
    """A diffusers pipeline spread over the ranks of a mesh. Made by `parallelize`.

    Attributes:
        pipeline: The diffusers pipeline, to be called as ever, with the same arguments on every rank.
        engine: The attached cache engine; ``use_cache=None`` evaluates everything.
        mesh: This process's place.
        clock: Where this rank's time went.
        transformer_seconds: Wall time of this rank's calls of the transformer.
    """

    def __init__(
        self,
        pipeline: Any,
        mesh: ParallelMesh,
        config: CacheConfig,
        timed: bool | None = None,
        use_torch_compile: bool = False,
        trajectory: dict[str, Any] | None = None,
    ) -> None:
        self.pipeline, self.mesh, self.cache_config = pipeline, mesh, config
        self.clock = Clock(waiter(mesh.device) if timed else None)
        self.agreement = Agreement(mesh.control if mesh.shares_image else None)
        self._place = mesh.coordinates()  # known also after the processes have parted
        self.trajectory: TrajectoryEngine | None = None
        self._call: CallWrapper | None = None
        self._inner: list[Replacement] = []
        self._layers: list[Replacement | SchedulerMarks | ParallelDecoder] = []
        self._timed = bool(timed) or mesh.device.type == "cpu"
        self.transformer_seconds = 0.0
        try:
            # A file may be missing on one host only, or a package: none goes on where one cannot.
            spec = self.agreement.attempt(lambda: self._attach(config, use_torch_compile, trajectory))
        except BaseException:
            self.remove()
            raise
        if not self.partition.stage.is_alone:
            for denoiser in self._denoisers:
                drop_other_blocks(spec.blocks(denoiser), self.partition.stage, spec.tail_needs)

    def _attach(self, config: CacheConfig, use_torch_compile: bool, trajectory: dict[str, Any] | None) -> ModelSpec:
        """Check everything, then put on everything that `remove` takes off again."""
        pipeline, mesh = self.pipeline, self.mesh
        device = getattr(pipeline, "_execution_device", pipeline.device)  # an offloaded pipeline rests on another
        if device.type != mesh.device.type:
            raise ValueError(
                f"the pipeline is on {device}, this process computes on {mesh.device}; call .to(device) first"
            )
        self._denoisers = denoisers_of(pipeline)
        first, *others = self._denoisers
        spec = spec_of(first)
        blocks = spec.blocks(first)
        check_family(spec, mesh.config)
        mesh.config.check_model(spec.heads(first), len(blocks))
        spec.check_return_order(config.return_hidden_states_first)
        for denoiser in self._denoisers:
            check_unattached(denoiser, pipeline.scheduler)
        check_model(self._denoisers, spec, config)
        check_combination(config, mesh.config)
        if mesh.config.use_parallel_vae:
            check_decoder(pipeline.vae)
        calibration = load_calibration(first, config, pipeline.scheduler)
        self.partition = _placement(mesh, spec, len(blocks), config, self.clock)
        self.exchange = SumExchange(
            mesh.control if mesh.shares_image else None, mesh.config.verify_agreement, self.clock
        )
        attention = self._attention(spec)
        if use_torch_compile:
            self._inner = compile_blocks([block for each in self._denoisers for block in spec.blocks(each)])
        self.engine = CacheEngine(first, spec, config, self.exchange, calibration, self.partition, attention, others)
        for denoiser in self._denoisers:
            self._attach_blocks(spec, denoiser, attention)
        self.engine.watch_scheduler(pipeline.scheduler)
        for denoiser in self._denoisers:
            self._attach_root(denoiser, spec)
        if mesh.config.use_parallel_vae:
            self._layers.append(ParallelDecoder(pipeline.vae, mesh.image))
        if trajectory is not None:
            self._attach_trajectory(trajectory)
        self._call = CallWrapper(pipeline, self._run_pipeline)
        return spec

    def _run_pipeline(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._follow()
        return original(*args, **kwargs)

    def _follow(self) -> None:
        """Move to the scheduler that the pipeline has now, all that follow one in their order.

        Raises:
            ValueError: It belongs to another engine, or the transformer was replaced. Nothing has been changed then.
        """
        denoisers = denoisers_of(self.pipeline)
        if [*map(id, denoisers)] != [*map(id, self._denoisers)]:
            self.engine.move_to(denoisers)
        if self.pipeline.scheduler is self.engine.scheduler:
            return
        self.engine.check_scheduler(self.pipeline.scheduler)
        marks = [each for each in self._layers if isinstance(each, SchedulerMarks)]
        if self.trajectory is not None:
            self.trajectory.attachment.leave_scheduler()
        for each in reversed(marks):
            each.undo()
        self.engine.watch_scheduler(self.pipeline.scheduler)
        for each in marks:
            each.follow()
        if self.trajectory is not None:
            self.trajectory.attachment.follow_scheduler()

    def _attach_trajectory(self, settings: dict[str, Any]) -> None:
        """Put the trajectory outside of everything else, so that a skipped step enters no wrapper below it."""
        mesh = self.mesh
        # Where each branch has ranks of its own, evaluating one alone would leave the others waiting.
        apart = not mesh.config.use_cfg_parallel
        self.trajectory = attach_trajectory(
            self.pipeline, self.agreement, stores=mesh.writes, apart=apart, above_blocks=True, **settings
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipeline(*args, **kwargs)

    def summary(self) -> dict[str, Any]:
        """The engine's summary, this rank's place, and what the ranks have told each other."""
        steps = max(self.engine.statistics.calls, 1)
        above = {} if self.trajectory is None else self.trajectory.summary()
        return {
            "mesh": dict(zip(("data", "cfg", "pipefusion", "ring", "ulysses"), self.mesh.config.shape, strict=True)),
            "rank": self._place,
            "collectives_per_step": self.exchange.collectives / steps,
            "bytes_per_step": self.exchange.bytes_sent / steps,
            "seconds": dict(self.clock.seconds),
            **self.engine.summary(),
            **above,
        }

    @property
    def steps_done(self) -> int:
        """Steps of the current generation that are complete."""
        return max((len(records) for records in self.engine.statistics.generation.records.values()), default=0)

    def efficiency(self) -> float | None:
        """The share of the transformer's time in which a PipeFusion stage computes, over all stages. Collective.

        ``None`` on an accelerator, unless the clock waits for it: it would tell the time of launching.
        """
        computing = self.clock.seconds["compute"] / self.transformer_seconds if self.transformer_seconds else 0.0
        shares = self.gather(computing)
        return sum(shares) / len(shares) if self._timed else None

    def gather(self, value: Any) -> list[Any]:
        """One picklable value of every rank that shares the image, in rank order. Collective."""
        return self.agreement.gather(value)

    def parameter_bytes(self) -> int:
        """What this rank holds of the transformer's weights."""
        parameters = (parameter for denoiser in self._denoisers for parameter in denoiser.parameters())
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    def reset(self) -> None:
        """Forget every remembered activation, and all that was counted and timed."""
        if self.trajectory is not None:
            self.trajectory.reset()
        self.engine.reset()
        self.exchange.collectives = self.exchange.bytes_sent = 0
        self.clock.reset()

    def remove(self) -> None:
        """Take everything off again. What other stages hold of the weights is not here any more."""
        if self._call is not None:
            self._call.undo()
            self._call = None
        if self.trajectory is not None:
            self.trajectory.remove()
        while self._layers:
            self._layers.pop().undo()
        if "engine" in vars(self):  # what could not be attached whole is taken off as well
            self.engine.remove()
        while self._inner:
            self._inner.pop().undo()

    # -- attaching ----------------------------------------------------------------------------------------------------

    def _attention(self, spec: ModelSpec) -> AttentionContext | None:
        if self.mesh.config.sequence_degree == 1:
            return AttentionContext(spec.text_first) if self.partition.may_displace else None
        # yunchang takes seconds to import, and only this needs it.
        from xfuser.core.attention.sequence import SequenceAttention

        return AttentionContext(spec.text_first, SequenceAttention(self.mesh, self.clock))

    def _attach_blocks(self, spec: ModelSpec, transformer: nn.Module, attention: AttentionContext | None) -> None:
        config, mesh = self.mesh.config, self.mesh
        if attention is None:
            return
        shards = SequenceShards(config, spec, self.partition, attention, mesh.sequence, mesh.sequence_rank, self.clock)
        self._layers += shards.attach(transformer)

    def _attach_root(self, transformer: nn.Module, spec: ModelSpec) -> None:
        refused = (*spec.between_blocks, *spec.skips_blocks)
        if self.mesh.config.image_degree > 1 and refused:
            self._layers.append(Replacement(transformer, "forward", _refusing(refused)))
        if not self.partition.stage.is_alone:
            self._layers.append(Replacement(transformer, "forward", self._tell_output))
        if self.mesh.config.use_cfg_parallel:
            kind = BatchedBranches if spec.guidance == "batch" else BranchCalls
            branches = kind(self.mesh.group("cfg"), self.mesh.rank("cfg"), self.clock)
            self._layers += branches.attach(self.pipeline, transformer)
        if not self.partition.stage.is_alone:
            self._layers.append(Replacement(transformer, "forward", self._take_time))

    def _take_time(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.transformer_seconds += time.perf_counter() - begin

        return forward

    def _tell_output(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The last stage's output is everybody's."""
        stage = self.partition.stage

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            return with_sample(output, stage.broadcast(sample_of(output), len(stage.stages) - 1))

        return forward


def parallelize(
    pipeline: Any,
    mesh: ParallelMesh | ParallelConfig,
    use_cache: str | CacheConfig | None = None,
    timed: bool | None = None,
    use_torch_compile: bool = False,
    **settings: Any,
) -> ParallelPipeline:
    """Spread a diffusers pipeline over the ranks of a mesh, with a cache if one is named.

    Every rank calls it, and then the pipeline, with the same arguments and the same random numbers; each returns the
    same images. Data-parallel groups generate what each of them is asked for.

    Args:
        pipeline: A diffusers pipeline with a supported transformer, on this process's device.
        mesh: This process's place among all, or the degrees: then it meets torchrun's other processes first.
        use_cache: The base method, or a whole `CacheConfig`, as for `apply_cache_on_pipeline`.
        timed: Whether the clock waits for the device, so that it is true on an accelerator.
        use_torch_compile: Compile every block's own forward; decisions stay outside.
        **settings: The other fields of `CacheConfig`, or those of `TrajectoryConfig` (``target_speedup=3``).

    Raises:
        TypeError: Unknown setting, or a pipeline that is not supported.
        ValueError: Degrees that do not fit the model, settings that do not go together, or a pipeline on another
            device; on all ranks that share an image, also where one of them alone refuses. Nothing has been changed.
    """
    use_cache, settings = as_keywords(use_cache, settings)
    if spends_as_base(use_cache, settings):
        raise ValueError(
            "what a base method would spend on the trajectory is counted in one process only; on several ranks name "
            "adacorr_budget and leave use_cache out, or leave calibration out for the correction on blocks"
        )
    above = on_trajectory(use_cache, settings)
    trajectory = {name: value for name, value in settings.items() if name != "enable_adacorrection"} if above else None
    config = CacheConfig() if above else CacheConfig.from_keywords(use_cache=use_cache, **settings)
    denoisers_of(pipeline)
    if isinstance(mesh, ParallelConfig):
        join_processes(pipeline.device)
        mesh = ParallelMesh(mesh, pipeline.device)
    return ParallelPipeline(pipeline, mesh, config, timed, use_torch_compile, trajectory)


def _placement(mesh: ParallelMesh, spec: ModelSpec, blocks: int, config: CacheConfig, clock: Clock) -> Partition:
    limit = mesh.config.pipefusion_max_lag
    if limit is None:
        limit = 1 if config.use_cache is None else 0
    # Branches that come in calls of their own are remembered apart, in one process as well.
    group = mesh.peers if spec.guidance == "batch" else mesh.sequence
    peers = 1 if group is None else dist.get_world_size(group)
    reduce: Callable[[torch.Tensor], None] | None = None
    if peers > 1:

        def reduce(tensor: torch.Tensor) -> None:
            dist.all_reduce(tensor, group=group)

    return Partition(
        Stage.of(mesh, blocks, clock),
        mesh.config.cfg_degree,
        mesh.rank("cfg"),
        patches=mesh.config.patches,
        warmup_steps=mesh.config.warmup_steps,
        max_lag=limit,
        peers=peers,
        reduce=reduce,
    )


def check_family(spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Refuse degrees that a family's blocks do not allow (ValueError)."""
    if parallel.pipefusion_parallel_degree > 1 and not spec.contiguous:
        raise ValueError(
            f"--pipefusion_parallel_degree: blocks of {spec.transformer_class} also take what others than the one "
            "before gave, which a stage has not; use 1, and --use_cfg_parallel or another degree instead"
        )
    if parallel.sequence_degree > 1 and not spec.same_tokens:
        raise ValueError(
            f"--ulysses_degree and --ring_degree share tokens, and those of {spec.transformer_class} are others in "
            "every block; use 1, and --use_cfg_parallel or --data_parallel_degree instead"
        )


def check_combination(config: CacheConfig, parallel: ParallelConfig) -> None:
    """Refuse what would need numbers that the step's exchange does not carry (ValueError)."""
    if parallel.image_degree == 1:
        return
    tokens = config.motion_threshold or config.granularity == "token"
    if tokens:
        name = "motion_threshold" if config.motion_threshold else "granularity='token'"
        raise ValueError(
            f"{name} chooses other tokens on every rank; leave it out where ranks share an image "
            "(--data_parallel_degree goes with it)"
        )
    reason = POLICIES[config.use_cache].refused_where_shared(config)
    if reason is not None:
        raise ValueError(f"{reason}; leave it out where ranks share an image (--data_parallel_degree goes with it)")
    if config.calibration == FIRST:
        raise ValueError("calibration='first' learns from one process; make a file with `xdit calibrate`")
    if parallel.pipefusion_parallel_degree > 1:
        if config.sync == "layer":
            raise ValueError("sync='layer' has every stage wait for every block; leave it out with PipeFusion")
        if config.mode == "blend":
            raise ValueError("adacorr_mode='blend' exchanges sums at every block; leave it out with PipeFusion")


def _refusing(names: tuple[str, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        arguments = BoundArguments(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            for name in names:
                if arguments.read(name, args, kwargs) is not None:
                    raise ValueError(
                        f"{name} does not go with several ranks an image; leave it out, or use one process"
                    )
            return original(*args, **kwargs)

        return forward

    return wrap
