"""What is known of one model, scheduler and grid of steps: Gram matrix, plans, weights; and the store that keeps it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from xfuser.core.files import replacing, write_json
from xfuser.model_executor.cache.adacorrection.trajectory.plan import Plan
from xfuser.model_executor.cache.adacorrection.trajectory.schedule import Gram
from xfuser.model_executor.cache.adacorrection.trajectory.weights import NormalEquations

logger = logging.getLogger(__name__)

SCHEMA = 1
# dB, by the square root of the images: on tiny-dit (DDIM 50, five budgets from .16 to .38) replays of one image were 4
# to 11 dB above other images, those of 16 were .6 to 2.6 above.
OPTIMISM = 7.0
KIND = "trajectory"


@dataclass
class Learned:
    """One plan's weights, and what replays under it have shown.

    Attributes:
        plan: The steps that are evaluated.
        equations: Per step, those of all images so far.
        weights: Per step, [K].
        shrinkage: Per step, 1 for none, 0 for the plain forecast.
        psnr: Per image, to the reference, in dB.
        decoded: Whether that was measured on decoded images, or on latents.
    """

    plan: Plan
    equations: list[NormalEquations] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    shrinkage: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    decoded: bool = True

    @property
    def predicted_psnr(self) -> float | None:
        """The mean of the replays, less what the images that weights were learned from are ahead of others."""
        return sum(self.psnr) / len(self.psnr) - OPTIMISM / len(self.psnr) ** 0.5 if self.psnr else None

    @property
    def standing(self) -> float:
        """What placements are chosen by: the mean over all images, and over the worst quarter of them, alike."""
        ordered = sorted(self.psnr)
        worst = ordered[: max(1, len(ordered) // 4)]
        return (sum(ordered) / len(ordered) + sum(worst) / len(worst)) / 2 if ordered else 0.0


@dataclass
class Calibration:
    """See the module.

    Attributes:
        fingerprint: What it was learned with, by name: `Fingerprint.document`.
        key: The fingerprint's digest.
        gram: Of all recorded generations.
        images: How many were recorded.
        places: (call, half) of the branches, conditional first.
        timing: Seconds a step: ``denoiser``, ``outside``, ``correction``; and ``half_share``.
        learned: By plan digest.
        notes: What may differ from one use to the next: size, batch.
        half_names: The denoiser's arguments that list the batch, where it can be evaluated by halves.
        apart: Whether a step may evaluate the conditional branch alone.
    """

    fingerprint: dict[str, Any]
    key: str
    gram: Gram
    images: int
    places: tuple[tuple[int, int], ...]
    timing: dict[str, float]
    learned: dict[str, Learned] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    half_names: list[Any] | None = None
    apart: bool = False

    @property
    def steps(self) -> int:
        return self.gram.steps

    def digest(self) -> str:
        """Hash what decides how a generation runs: plans, weights and all that one of them is chosen by.

        Inner products and normal equations, from which more could be learned, are left out: they decide nothing yet.
        """
        known = {
            name: (list(each.plan.kinds), each.shrinkage, each.psnr, each.decoded)
            for name, each in self.learned.items()
        }
        chosen_by = (self.key, self.steps, self.images, self.places, self.timing, self.notes, self.apart, known)
        hashed = hashlib.sha256(json.dumps([*chosen_by, self.half_names], sort_keys=True, default=str).encode())
        for each in self.learned.values():
            for weights in each.weights:
                hashed.update(weights.detach().cpu().contiguous().numpy().tobytes())
        return hashed.hexdigest()

    def save(self, path: Path, compact: bool = False) -> None:
        """Write PATH (safetensors) and PATH with .json, under temporary names until they are whole.

        Args:
            path: The file.
            compact: Leave out the normal equations, without which nothing more can be learned into it.
        """
        tensors: dict[str, torch.Tensor] = {"gram": torch.from_numpy(self.gram.matrix)}
        plans = []
        for index, known in enumerate(self.learned.values()):
            plans.append(
                {
                    "kinds": list(known.plan.kinds),
                    "shrinkage": known.shrinkage,
                    "psnr": known.psnr,
                    "decoded": known.decoded,
                    "images": known.equations[0].images if known.equations else 0,
                    "compact": compact or not known.equations,
                }
            )
            for step, weights in enumerate(known.weights):
                tensors[f"{index}.{step}.weights"] = weights
                for name in () if compact else ("inner", "target", "size"):
                    tensors[f"{index}.{step}.{name}"] = getattr(known.equations[step], name).contiguous()
        document = {
            "schema": SCHEMA,
            "kind": KIND,
            "key": self.key,
            "fingerprint": self.fingerprint,
            "branches": self.gram.branches,
            "steps": self.steps,
            "images": self.images,
            "places": [list(place) for place in self.places],
            "timing": self.timing,
            "notes": self.notes,
            "half_names": self.half_names,
            "apart": self.apart,
            "plans": plans,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # One file decides: the tensors carry the document too, so that two processes' files never mix.
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, {"document": json.dumps(document, allow_nan=False)}))
        write_json(path.with_suffix(".json"), document)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: It is missing, unreadable, of another kind or of another schema.
        """
        try:
            tensors = load_file(path)
            document = _document(path)
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"calibration {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
        if document.get("kind") != KIND or document.get("schema") != SCHEMA:
            raise ValueError(f"calibration {str(path)!r} is of another kind or version; run `xdit calibrate` again")
        gram = Gram(tensors["gram"].numpy(), document["steps"], document["branches"])
        learned = {}
        for index, entry in enumerate(document["plans"]):
            plan = Plan(tuple(entry["kinds"]))
            known = Learned(plan, shrinkage=entry["shrinkage"], psnr=entry["psnr"], decoded=entry["decoded"])
            for step in range(len(entry["shrinkage"])):
                known.weights.append(tensors[f"{index}.{step}.weights"])
                if entry["compact"]:
                    continue
                three = (tensors[f"{index}.{step}.{name}"] for name in ("inner", "target", "size"))
                known.equations.append(NormalEquations(*three, entry["images"]))
            learned[plan.digest] = known
        places = tuple(tuple(place) for place in document["places"])
        return cls(
            document["fingerprint"],
            document["key"],
            gram,
            document["images"],
            places,  # type: ignore[arg-type]
            document["timing"],
            learned,
            document["notes"],
            None if document["half_names"] is None else [_name(each) for each in document["half_names"]],
            document["apart"],
        )


def _name(value: Any) -> Any:
    """Make an argument's name hashable again: JSON knows no tuples."""
    return tuple(_name(each) for each in value) if isinstance(value, list) else value


def _document(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["document"])


def is_trajectory(path: Path) -> bool:
    """Whether a file is a calibration of this level, and not one of the blocks'."""
    try:
        return _document(path).get("kind") == KIND
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError):
        return False


class Store:
    """Calibrations by fingerprint, one file each. Processes that write at once replace each other's whole files."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self.folder = Path(folder) if folder is not None else Path(base) / "xfuser" / "trajectory"

    def path(self, key: str) -> Path:
        return self.folder / f"{key[:32]}.safetensors"

    def find(self, key: str) -> Calibration | None:
        """Load the calibration of a fingerprint; ``None`` where there is none, or none that can be read."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            found = Calibration.load(path)
        except ValueError as error:
            logger.warning("trajectory: %s; it is learned anew", error)
            return None
        return found if found.key == key else None

    def keep(self, calibration: Calibration) -> Path:
        """Write a calibration under its fingerprint."""
        path = self.path(calibration.key)
        calibration.save(path)
        return path
