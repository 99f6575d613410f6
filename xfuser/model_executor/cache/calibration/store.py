"""What a model was found to do over a few generations: one safetensors file, and JSON that says where it is from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from xfuser.core.files import replacing, write_json
from xfuser.model_executor.cache.approximation import ORDERS, Extrapolation

SCHEMA = 2
CORE = ("gram", "output_square")
RUNS = 2  # rows behind the blocks' own: the run of all blocks, and of all but the first
RIDGE = 1e-6  # of the mean squared residual; keeps nearly parallel residuals from taking huge opposite weights
SMALLEST_ERROR = 1e-6
SAMPLED_WEIGHTS = 8  # entries of each block's first matrix that tell one training from another
WEIGHTS_TOLERANCE = 0.02  # of the matrix's RMS; half precision moves an entry far less


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `Recorder` kept of some generations of one model, scheduler and number of steps.

    Attributes:
        gram: Σ r_t·r_u of the residuals, shape [blocks + 2, steps, steps], float64; the last two rows are the runs of
            all blocks and of all but the first.
        output_square: Σ‖output‖², shape [blocks + 2, steps].
        sections: What each base method, and the approximation ``linear``, has learned: tensors by name, of which nobody
            else knows anything (`policies.base.Section`).
        provenance: Model, scheduler, steps, conditions' hash: what `check` compares.
    """

    gram: torch.Tensor
    output_square: torch.Tensor
    sections: dict[str, dict[str, torch.Tensor]]
    provenance: dict[str, Any]

    @property
    def steps(self) -> int:
        return self.gram.shape[1]

    @property
    def blocks(self) -> int:
        return self.gram.shape[0] - RUNS

    def weights(self, row: int, step: int, nodes: tuple[int, ...]) -> tuple[tuple[float, ...], float]:
        """The weights c of least Σ‖r_step − Σ_j c_j r_j‖², and the relative error that they leave."""
        gram, nodes_list = self.gram[row], list(nodes)
        inner = gram[nodes_list][:, nodes_list]
        ridge = max(RIDGE * float(inner.diagonal().mean()), torch.finfo(inner.dtype).tiny)
        target = gram[nodes_list, step]
        best = torch.linalg.solve(inner + ridge * torch.eye(len(nodes), dtype=inner.dtype), target)
        left = float(gram[step, step] - 2 * best @ target + best @ inner @ best)
        scale = float(self.output_square[row, step])
        error = math.sqrt(max(left, 0.0) / scale) if scale > 0 else 0.0
        return tuple(best.tolist()), max(error, SMALLEST_ERROR)

    def check(self, transformer: nn.Module, blocks: Sequence[nn.Module], scheduler: Any) -> None:
        """Refuse a model or scheduler that this was not made with.

        Raises:
            ValueError: One does not fit; the line says which.
        """
        ours = {**describe_model(transformer, blocks), **({"scheduler": type(scheduler).__name__} if scheduler else {})}
        for name, value in ours.items():
            made_with = self.provenance.get(name)
            if name == "weights":
                if not _same_weights(made_with, value):
                    raise ValueError(
                        "calibration: it was made with other weights of this model; run `xdit calibrate` again"
                    )
            elif made_with != value:
                raise ValueError(
                    f"calibration: it was made with {name} {made_with!r}, this is {value!r}; run `xdit calibrate` again"
                )

    def check_steps(self, num_steps: int | None) -> None:
        """Refuse another number of steps (ValueError)."""
        if num_steps != self.steps:
            given = "an unknown number of" if num_steps is None else str(num_steps)
            raise ValueError(
                f"calibration: it was made with {self.steps} steps, this generation has {given}; set num_steps or run "
                f"`xdit calibrate --num_inference_steps {num_steps or 'N'}`"
            )

    def save(self, path: Path) -> None:
        """Write PATH (safetensors) and PATH with .json, under temporary names until they are whole."""
        tensors = {"gram": self.gram, "output_square": self.output_square}
        for section, held in self.sections.items():
            for name, tensor in held.items():
                stored = tensor.half() if tensor.dtype == torch.float32 else tensor
                tensors[f"{section}/{name}"] = stored.contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.with_suffix(".json"), {"schema": SCHEMA, **self.provenance})
        with replacing(path) as temporary:
            # Not save_file, whose files only their owner may read.
            temporary.write_bytes(save(tensors))

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: It is missing, unreadable, or of another schema.
        """
        try:
            tensors = load_file(path)
            provenance = json.loads(path.with_suffix(".json").read_text())
            schema = provenance.pop("schema", None) if isinstance(provenance, dict) else None
            if schema not in (1, SCHEMA):
                raise ValueError("another schema")
            if schema == 1:
                tensors = {_renamed(name): tensor for name, tensor in tensors.items()}
            gram, square = (tensors.pop(name) for name in CORE)
            sections: dict[str, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                section, slash, own = name.partition("/")
                if not slash:
                    raise ValueError(f"{name} belongs to nothing")
                sections.setdefault(section, {})[own] = tensor.float() if tensor.dtype == torch.half else tensor
            return cls(gram, square, sections, provenance)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"calibration={str(path)!r} cannot be read ({reason}); run `xdit calibrate`") from error


def _renamed(name: str) -> str:
    """Name a tensor of a file of the first schema, which had no sections, as it is named now."""
    if name.startswith("maps."):
        block, stream = name.removeprefix("maps.").split(".")
        return f"linear/{int(block)}.{int(stream)}"
    return {"noise": "Fast/noise", "tea": "Tea/polynomial"}.get(name, name)


def describe_model(transformer: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, Any]:
    """What tells one model from another: class, blocks, and some entries of each block's first matrix, by its RMS."""
    kind = type(transformer)
    published = (each.__name__ for each in kind.__mro__ if each.__module__.startswith("diffusers"))
    matrices = (next((p for p in block.parameters() if p.dim() == 2), None) for block in blocks)
    return {
        "transformer": next(published, kind.__name__),
        "blocks": len(blocks),
        "weights": [_entries(matrix.detach()) for matrix in matrices if matrix is not None],
    }


def _entries(matrix: torch.Tensor) -> list[float]:
    places = torch.linspace(0, matrix.numel() - 1, SAMPLED_WEIGHTS).long().to(matrix.device)
    sampled = matrix.flatten()[places].float() / matrix.float().square().mean().sqrt().clamp_min(1e-12)
    return [round(float(value), 4) for value in sampled]


def _same_weights(made_with: Any, ours: list[list[float]]) -> bool:
    """Whether all sampled entries agree within the tolerance; anything else than lists of numbers does not."""
    try:
        return bool(np.allclose(np.array(made_with, dtype=float), np.array(ours), rtol=0, atol=WEIGHTS_TOLERANCE))
    except (TypeError, ValueError):
        return False


class FittedWeights(Extrapolation):
    """Least-squares weights on the remembered residuals (`Calibration.weights`), block by block or for the run.

    Args:
        probed: Leading blocks that are always evaluated; the run is of those behind them.
    """

    shared = False

    def __init__(self, calibration: Calibration, probed: int) -> None:
        super().__init__(ORDERS["fitted"])
        self.calibration = calibration
        self._run = calibration.blocks + probed
        self._solve = lru_cache(maxsize=None)(calibration.weights)

    def _fitted(self, row: int, step: int, nodes: Sequence[int]) -> tuple[tuple[float, ...], float]:
        row = self._run if row == self.calibration.blocks else row
        return self._solve(row, step, tuple(nodes[: self.order + 1]))

    def pair(self, row: int, step: int, nodes: Sequence[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if not nodes:
            return (), ()
        full, _ = self._fitted(row, step, nodes)
        return (1.0,) + (0.0,) * (len(full) - 1), full

    def weights(self, row: int, step: int, nodes: Sequence[int], correction: float) -> tuple[float, ...]:
        lower, full = self.pair(row, step, nodes)
        return tuple(b + correction * (a - b) for a, b in zip(full, lower, strict=True))

    def expectation(self, row: int, step: int, nodes: Sequence[int]) -> tuple[float, int]:
        if not nodes:
            return 0.0, -1
        return self._fitted(row, step, nodes)[1], min(self.order, len(nodes) - 1)
