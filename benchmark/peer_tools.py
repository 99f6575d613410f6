"""What the comparison with other projects counts and forecasts with."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from xfuser.core.distributed.shutdown import one_line
from xfuser.model_executor.pipelines import LoadedPipeline

TEMPERED = 1e-10  # share of the mean power added to a least-squares fit, against rounding only


class BlockCounter:
    """Counts what modules really work: calls × batch rows × tokens × their weight, whoever skips them.

    It has to be put on before any cache, so that it wraps the module's own forward and a skipped call is not counted.
    """

    def __init__(self, weighted: Iterable[tuple[nn.Module, float]]) -> None:
        self.work = 0.0
        self._wrapped: list[nn.Module] = []
        for module, weight in weighted:
            self._wrap(module, weight)

    @classmethod
    def of_blocks(cls, transformer: nn.Module) -> BlockCounter:
        """Count whole blocks, all of them alike."""
        return cls((block, 1.0) for block in transformer.transformer_blocks)

    @classmethod
    def of_parts(cls, transformer: nn.Module) -> BlockCounter:
        """Count each block's attention and feed-forward by their FLOPs, for caches that work inside of blocks."""
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        tokens = (config.sample_size // config.patch_size) ** 2
        attention, forward = 4 * width**2 + 2 * tokens * width, 8 * width**2
        blocks = transformer.transformer_blocks
        return cls(pair for block in blocks for pair in ((block.attn1, attention), (block.ff, forward)))

    def take(self) -> float:
        """Return the work since the last call of this, and begin again."""
        work, self.work = self.work, 0.0
        return work

    def undo(self) -> None:
        """Take the wrappers off; what was attached since must be gone already."""
        for module in self._wrapped:
            del module.forward

    def _wrap(self, module: nn.Module, weight: float) -> None:
        original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            self.work += weight * hidden_states.shape[0] * hidden_states.shape[1]
            return original(*args, **kwargs)

        module.forward = forward
        self._wrapped.append(module)


class HeldBytes:
    """Measures what a method holds between steps: tensors alive as a later step begins, less those as the first does.

    The hook is the transformer's, so it sees the calls that the pipeline makes, which may be fewer than the steps; the
    most that was held at any sixth of the steps is reported. Storages are counted once.
    """

    def __init__(self, transformer: nn.Module, steps: int) -> None:
        self._held: list[int] = []
        self._calls, self._every = 0, max(1, steps // 6)
        self._handle = transformer.register_forward_pre_hook(self._see)

    @property
    def difference(self) -> int | None:
        """Bytes, or None where no later step was seen."""
        return max(self._held[1:]) - self._held[0] if len(self._held) > 1 else None

    def remove(self) -> None:
        self._handle.remove()

    def _see(self, module: nn.Module, inputs: Any) -> None:
        if self._calls % self._every == 0:
            self._held.append(bytes_alive())
        self._calls += 1


def bytes_alive() -> int:
    """Sum the sizes of all storages that some tensor of this process refers to."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        # Never isinstance here: it asks proxies of all kinds for their class, and some of them import things.
        # Nor a compiler's tensors, which a compiled module leaves behind: they have no storage.
        if type(each) not in (torch.Tensor, torch.nn.Parameter):
            continue
        if each.layout is torch.strided and each.device.type != "meta":
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclass
class Subject:
    """A fresh pipeline that one row is attached to.

    Attributes:
        loaded: The pipeline.
        steps: Of an uncached generation.
        calibrate: Generates the calibration images with it, with seeds of their own.
        scratch: A folder that lives as long as the run.
    """

    loaded: LoadedPipeline
    steps: int
    calibrate: Callable[[], None]
    scratch: Path

    @property
    def pipeline(self) -> Any:
        return self.loaded.pipeline

    @property
    def transformer(self) -> nn.Module:
        return self.loaded.pipeline.transformer


@dataclass
class Attached:
    """A method that is in place.

    Attributes:
        before: Called before every generation.
        details: What the method says of itself in the end, in plain types.
        remove: Takes it off, where the pipeline's own end does not do.
    """

    before: Callable[[], None] = lambda: None
    details: Callable[[], dict[str, Any]] = dict
    remove: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Peer:
    """One row: its name, the line it belongs to in the picture, what it is set to, how it is attached.

    ``steps`` are those of its generations; None takes as many as the uncached run.
    """

    name: str
    family: str
    settings: dict[str, Any]
    attach: Callable[[Subject], Attached] = field(compare=False)
    steps: int | None = None


class Forecaster(Protocol):
    """What stands in for a step that is not evaluated."""

    def clear(self) -> None: ...

    def remember(self, step: int, output: torch.Tensor, evaluated: bool) -> None: ...

    def predict(self, step: int) -> torch.Tensor: ...


class Polynomial:
    """Forecasts with the last evaluated output (order 0), or the straight line through the last two (order 1)."""

    def __init__(self, order: int) -> None:
        if order not in (0, 1):
            raise ValueError(f"order is {order}; expected 0 or 1")
        self._known: deque[tuple[int, torch.Tensor]] = deque(maxlen=order + 1)

    def clear(self) -> None:
        self._known.clear()

    def remember(self, step: int, output: torch.Tensor, evaluated: bool) -> None:
        if evaluated:
            self._known.append((step, output))

    def predict(self, step: int) -> torch.Tensor:
        last, newest = self._known[-1]
        if len(self._known) == 1:
            return newest
        before, older = self._known[0]
        return newest + (step - last) / (last - before) * (newest - older)


class Weighted:
    """Forecasts each step as its own linear combination of all outputs before it, forecast ones among them."""

    def __init__(self, weights: torch.Tensor) -> None:
        self._weights = weights
        self._outputs: list[torch.Tensor] = []

    def clear(self) -> None:
        self._outputs.clear()

    def remember(self, step: int, output: torch.Tensor, evaluated: bool) -> None:
        self._outputs.append(output)

    def predict(self, step: int) -> torch.Tensor:
        weights = self._weights[step, :step].to(self._outputs[0].dtype)
        return torch.tensordot(weights, torch.stack(self._outputs), dims=1)


class StepCache:
    """Evaluates the denoiser at chosen steps only; a forecaster gives its output at the others.

    Where guidance calls the denoiser ``branches`` times a step, each branch has a forecaster like the given one.
    """

    def __init__(
        self,
        transformer: nn.Module,
        steps: int,
        evaluated: Sequence[int],
        forecaster: Forecaster,
        branches: int = 1,
    ) -> None:
        if 0 not in evaluated:
            raise ValueError("step 0 has nothing before it to be forecast from; it must be evaluated")
        self._steps, self._evaluated = steps, frozenset(evaluated)
        self._forecasters = [forecaster, *(copy.deepcopy(forecaster) for _ in range(branches - 1))]
        self._call = 0
        self._original = transformer.forward
        transformer.forward = self._forward

    def _forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        branches = len(self._forecasters)
        call, self._call = self._call, (self._call + 1) % (self._steps * branches)
        step, branch = divmod(call, branches)
        forecaster = self._forecasters[branch]
        if step == 0:
            forecaster.clear()
        evaluated = step in self._evaluated
        if evaluated:
            output = self._original(*args, return_dict=False, **kwargs)[0]
        else:
            output = forecaster.predict(step)
        forecaster.remember(step, output, evaluated)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def evenly(count: int, steps: int) -> list[int]:
    """Choose ``count`` of ``steps`` steps, evenly spaced from the first one on."""
    return [index * steps // count for index in range(count)]


def record_outputs(transformer: nn.Module, generate: Callable[[], None]) -> torch.Tensor:
    """Run uncached and return the denoiser's outputs, float64 [steps, values]."""
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0].detach().double().flatten())

    handle = transformer.register_forward_hook(keep)
    try:
        generate()
    finally:
        handle.remove()
    return torch.stack(outputs)


def fit_least_squares(outputs: torch.Tensor) -> torch.Tensor:
    """Fit each step's weights on the recorded outputs before it, [steps, steps], by least squares."""
    products = outputs @ outputs.T
    steps = len(products)
    ridge = TEMPERED * products.diagonal().mean() * torch.eye(steps, dtype=products.dtype)
    weights = torch.zeros_like(products)
    for step in range(1, steps):
        tempered = products[:step, :step] + ridge[:step, :step]
        weights[step, :step] = torch.linalg.solve(tempered, products[:step, step])
    return weights


def fit_descent(outputs: torch.Tensor, rounds: int = 201, rate: float = 0.01) -> torch.Tensor:
    """Fit the same weights as L2P's authors do: Adam on the mean squared error, from "repeat the last output" on.

    All that the error needs of the outputs are their products, which makes a round cheap.
    """
    products = outputs @ outputs.T / outputs.shape[1]
    steps = len(products)
    past = torch.ones_like(products).tril(-1)
    weights = torch.diag_embed(torch.ones(steps - 1, dtype=products.dtype), offset=-1).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=rate)
    with torch.enable_grad():
        for _ in range(rounds):
            used = (weights * past)[1:]
            error = ((used @ products) * used).sum() - 2 * (used * products[1:]).sum()
            optimizer.zero_grad()
            (error / (steps - 1)).backward()
            optimizer.step()
    return (weights * past).detach()


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


def plain(value: Any) -> Any:
    """Turn what a summary holds into what JSON can hold, long sequences of it left out."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value] if len(value) <= 64 else f"{len(value)} values"
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def described(error: Exception) -> str:
    """Tell an error's class and its first line: other projects' texts alone often say too little."""
    name, line = type(error).__name__, one_line(error)
    return line if line.startswith(name) else f"{name}: {line}"


def finished_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the rows of an earlier run with these settings; none where it had others."""
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    return document["results"] if document["settings"] == settings else []
