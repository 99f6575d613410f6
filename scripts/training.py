"""The loop that the training scripts share: batches that depend on the seed and step only, EMA, checkpoints."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn

from xfuser.core.files import replacing, write_text
from xfuser.model_executor.pipelines.shipped import INDEX, SHARED, shared_parts

ROOT = Path(__file__).resolve().parent.parent
Loss = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
WARMUP_STEPS = 100


def cosine(progress: float) -> float:
    """Return the learning rate's factor at this part of the run: half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant_then_linear(progress: float) -> float:
    """Return 1 until three quarters of the run and a straight line to 0 after: a run can be prolonged at any time."""
    return min(1.0, 4 * (1 - progress))


def autocast(precision: str) -> Callable[[], torch.autocast]:
    """Return what makes a context of this precision; ``auto`` is what the processor multiplies natively."""
    if precision == "auto":
        precision = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    return partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")


PRECISIONS = ("auto", "bf16", "fp32")
PRECISION_HELP = "autocast of the networks; auto takes bf16 where the processor multiplies it natively"


def add_stage_arguments(parser: argparse.ArgumentParser, model: str, stages: Sequence[str]) -> None:
    """Add what a model's training in stages learns from, where it works, and which stages it runs."""
    add = parser.add_argument
    folder = ROOT / "outputs" / model
    add("--data", type=Path, required=True, help="emoji64.npz (images, captions, styles)")
    add("--output", type=Path, default=folder / "model", help="folder of the pipeline (default: %(default)s)")
    add("--workdir", type=Path, default=folder, help="folder of checkpoints (default: %(default)s)")
    add("--stages", nargs="+", choices=stages, default=stages, help="those to run; the others' checkpoints are read")
    add("--minutes", type=float, help="wall-clock minutes after which each stage of this run ends (default: no limit)")


def add_start_argument(parser: argparse.ArgumentParser) -> None:
    """Add the trained pipeline whose weights stages without a checkpoint go on from."""
    parser.add_argument("--start", type=Path, help="pipeline of this kind that stages without a checkpoint begin with")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every training can be told of how it runs."""
    add = parser.add_argument
    add("--checkpoint_every", type=int, default=100, help="batches (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all, %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--precision", choices=PRECISIONS, default="auto", help=PRECISION_HELP)


def settled(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and refuse data that is not there in one line."""
    args = parser.parse_args()
    if not args.data.is_file():
        parser.error(f"--data: no file {args.data}")
    start = getattr(args, "start", None)
    if start and not (start / INDEX).is_file():
        parser.error(f"--start {start}: expected a pipeline's folder ({INDEX}); name one")
    args.autocast = autocast(args.precision)
    return args


def begin(args: argparse.Namespace) -> None:
    """Make the working folder, and set threads and seed."""
    args.workdir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def started(args: argparse.Namespace, part: str, module: nn.Module) -> nn.Module:
    """Give a network the weights of a part of the pipeline that ``--start`` names; without one, its own stay."""
    if getattr(args, "start", None):
        folder = shared_parts(args.start).get(part, args.start / part)
        module.load_state_dict(type(module).from_pretrained(folder).float().state_dict())
    return module


def origin(args: argparse.Namespace, stage: str, part: str) -> str:
    """Name the weights that a stage's network has, with their time: what is derived from others is made anew."""
    path = checkpoint(args, stage)
    if not path.exists():
        path = shared_parts(args.start).get(part, args.start / part) / "diffusion_pytorch_model.safetensors"
    return f"{path.resolve()} {path.stat().st_mtime_ns}"


def finish_export(
    output: Path, credits: str, parts: Path | None = None, linked: Mapping[str, str] | None = None
) -> None:
    """Write a pipeline's credits beside it, link what it shares with another, and print its size.

    Args:
        output: The pipeline's folder.
        credits: Its README.md.
        parts: The model of which it has parts; where that is no model beside it, they stay copies.
        linked: Those parts by their names here, with their names there.
    """
    (output / SHARED).unlink(missing_ok=True)
    if parts is not None and linked and _is_beside(parts.resolve(), output.resolve()):
        links = {part: f"{parts.resolve().name}/{theirs}" for part, theirs in linked.items()}
        write_text(output / SHARED, json.dumps(links, indent=2) + "\n")
        for part in linked:
            shutil.rmtree(output / part)
    write_text(output / "README.md", credits)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"export       {output}: {size / 1e6:.2f} MB")


def _is_beside(model: Path, output: Path) -> bool:
    return (model / INDEX).is_file() and model.parent == output.parent


def checkpoint(args: argparse.Namespace, stage: str) -> Path:
    """Where a stage's checkpoint lies."""
    return args.workdir / f"{stage}.safetensors"


@dataclass(frozen=True)
class Plan:
    """How long and how one stage trains.

    Attributes:
        workdir: Where its checkpoint lies.
        steps: The step that it ends at.
        learning_rate: At its highest.
        ema: Decay of the averaged weights.
        batch_size: Examples a step.
        seed: Of the batches.
        checkpoint_every: Steps between checkpoints.
        minutes: Wall-clock minutes after which this run of the stage ends, where steps do not end it sooner.
        schedule: The learning rate's factor at each part of the run, in [0, 1].
    """

    workdir: Path
    steps: int
    learning_rate: float
    ema: float
    batch_size: int
    seed: int = 0
    checkpoint_every: int = 100
    minutes: float | None = None
    schedule: Callable[[float], float] = cosine


def plan_stage(args: argparse.Namespace, stage: str, **settings: Any) -> Plan:
    """The stage's plan: no steps for one that is not to run, which is read from its checkpoint."""
    if stage not in args.stages:
        if not checkpoint(args, stage).exists() and not getattr(args, "start", None):
            beginning = ", or name a --start" if hasattr(args, "start") else ""
            raise SystemExit(f"stage {stage} has no checkpoint in {args.workdir}; add it to --stages{beginning}")
        settings["steps"] = 0
    shared = {"seed": args.seed, "checkpoint_every": args.checkpoint_every, "minutes": args.minutes}
    return Plan(args.workdir, schedule=constant_then_linear, **shared, **settings)


class Training:
    """One stage's loop over a module's weights, resumed from its checkpoint where there is one."""

    def __init__(self, name: str, module: nn.Module, plan: Plan) -> None:
        self.name, self.module, self.plan = name, module, plan
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.ema = {key: value.detach().clone().float() for key, value in module.state_dict().items()}
        self.path = plan.workdir / f"{name}.safetensors"
        self.step = 0
        if self.path.exists():
            self._restore()

    def run(self, loss_at: Loss, size: int) -> None:
        """Train to the last step or minute. ``loss_at(indices, generator)`` returns the loss of one batch."""
        plan = self.plan
        if self.step >= plan.steps:
            return
        started, first = time.monotonic(), self.step
        columns = (TextColumn(f"{self.name:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}")) as progress:
            task = progress.add_task(self.name, total=plan.steps, completed=self.step, loss=float("nan"))
            average = None
            while self.step < plan.steps:
                done = self.step / plan.steps
                if plan.minutes is not None:
                    done = max(done, (time.monotonic() - started) / (60 * plan.minutes))
                if done >= 1:
                    break
                generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
                indices = torch.randint(0, size, (plan.batch_size,), generator=generator)
                # A run that goes on after the rate had fallen to zero is warmed up again.
                since = self.step - (first if plan.minutes is not None else 0)
                warmup = min(1.0, (since + 1) / WARMUP_STEPS)
                for group in self.optimizer.param_groups:
                    group["lr"] = plan.learning_rate * warmup * plan.schedule(done)
                loss = loss_at(indices, generator)
                loss.backward()
                nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                self._update_ema()
                average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
                progress.update(task, completed=self.step, loss=average)
                if self.step % plan.checkpoint_every == 0 or self.step == plan.steps:
                    self._save()
                    minutes = (time.monotonic() - started) / 60
                    progress.console.print(f"{self.name} step {self.step} loss {average:.4f} after {minutes:.1f} min")
            self._save()

    def averaged(self) -> nn.Module:
        """The module with its averaged weights, in evaluation mode."""
        self.module.load_state_dict(self.ema)
        return self.module.eval().requires_grad_(False)

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.plan.ema, self.step / (self.step + 10))
        for key, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.ema[key].lerp_(value.float(), 1 - decay)
            else:
                self.ema[key].copy_(value)

    def _save(self) -> None:
        tensors = {f"module.{key}": value.contiguous() for key, value in self.module.state_dict().items()}
        tensors |= {f"ema.{key}": value.contiguous() for key, value in self.ema.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value.contiguous() for key, value in state.items()}
        # Tied weights share their storage, which safetensors refuses.
        tensors = {key: value.clone() for key, value in tensors.items()}
        metadata = {"step": str(self.step)}
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def _restore(self) -> None:
        tensors = load_file(self.path)
        pick = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.module.load_state_dict(pick("module."))
        self.ema = {key: value.clone() for key, value in pick("ema.").items()}
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in pick("optimizer.").items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
            self.step = int(state[int(index)].get("step", torch.tensor(self.step)))
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def noised(
    scheduler: DDIMScheduler, clean: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise latents, each at a random time: what the denoiser is given, the times, and what it is to foretell."""
    noise = torch.randn(clean.shape, generator=generator)
    times = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, times) if velocity else noise
    return scheduler.add_noise(clean, noise, times), times, target


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Fold the mean and deviation of each latent channel into the 1 x 1 convolutions around the latents.

    Pipelines know one scaling factor for all channels, so the latents themselves must be standard.
    """
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= deviation[None, :, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.weight[:channels] /= deviation[:, None, None, None]
    quant.bias[channels:] -= 2 * deviation.log()
