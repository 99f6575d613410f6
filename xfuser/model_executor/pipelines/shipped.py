"""The models that come with the package: which there are, and the parts that several of them have in common.

A model's folder is what ``save_pretrained`` writes. Where it lacks a part of its pipeline, its ``shared.json`` names
the model beside it whose part is taken, as ``{"vae": "tiny-flux", "text_encoder": "tiny-flux/text_encoder_2"}``:
weights that models share lie on the disk once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from xfuser.model_executor.pipelines.model_types import MODEL_TYPES

INDEX = "model_index.json"
SHARED = "shared.json"
_PART = re.compile(r"\w[\w.-]*(/\w+)?")


def shipped_types() -> dict[str, Path]:
    """List the model types whose model belongs to the package, with its folder, whether it is there or not."""
    return {name: spec.default() for name, spec in MODEL_TYPES.items() if callable(spec.default)}


def shipped_models() -> dict[str, Path]:
    """List those that are in this installation."""
    return {name: folder for name, folder in shipped_types().items() if (folder / INDEX).is_file()}


def own_model(model_type: str) -> Path | str | None:
    """Find what a type loads where no model is named: a folder, a hub id, or ``None`` for a toy.

    Raises:
        ValueError: There is nothing to load: it is not in this installation, or nowhere.
    """
    spec = MODEL_TYPES[model_type]
    if spec.unpublished:
        raise ValueError(f"{model_type}: {spec.unpublished}")
    if not callable(spec.default):
        return spec.default
    folder = spec.default()
    if (folder / INDEX).is_file():
        return folder
    script = spec.made_by or f"scripts/train_{model_type.replace('-', '_')}.py"
    here = ", ".join(shipped_models()) or "none"
    raise ValueError(
        f"{model_type} is not in this installation; train it with {script}, and name its folder with --model, or "
        f"choose one of those that are there: {here}"
    )


def shipped_trajectory(model_type: str, steps: int) -> Path | None:
    """Find the calibration of the trajectory that comes with a model, for its own scheduler and so many steps."""
    folder = shipped_types().get(model_type)
    if folder is None or not (folder / INDEX).is_file():
        return None
    scheduler = json.loads((folder / INDEX).read_text(encoding="utf-8"))["scheduler"][1]
    for path in sorted((folder / "calibration" / "trajectory").glob("*.json")):
        made = json.loads(path.read_text(encoding="utf-8"))
        if (made["steps"], made["fingerprint"]["scheduler"]["class"]) == (steps, scheduler):
            return path.with_suffix(".safetensors")
    return None


def shared_parts(model: str | Path) -> dict[str, Path]:
    """Find the parts that a model takes from others, by name, with their folders; none for a hub id.

    Raises:
        ValueError: Its ``shared.json`` cannot be read, or names what is not there.
    """
    folder = Path(model)
    path = folder / SHARED
    if not path.is_file():
        return {}
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(named, dict):
        raise ValueError(f'{path} is no list of parts; expected {{"vae": "tiny-flux"}}')
    return {part: _found(folder, part, where) for part, where in named.items()}


def _found(folder: Path, part: str, where: Any) -> Path:
    if not isinstance(where, str) or not _PART.fullmatch(where):
        raise ValueError(f"{folder / SHARED}: {part!r} is {where!r}; expected a model beside it, or model/part")
    owner, _, theirs = where.partition("/")
    found = folder.resolve().parent / owner / (theirs or part)
    if not found.is_dir():
        raise ValueError(
            f"{folder.name} takes its {part} from {owner}, and {found} is not there; put the model {owner} beside it"
        )
    return found
