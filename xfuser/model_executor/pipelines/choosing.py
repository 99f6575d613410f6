"""Which model a command line means: a folder, a hub id or a model type, and of what type it is."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from xfuser.config.spelling import did_you_mean
from xfuser.model_executor.adapters import SPECS
from xfuser.model_executor.pipelines.model_types import MODEL_TYPES, SHORT_NAMES
from xfuser.model_executor.pipelines.shipped import INDEX, own_model

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(args: argparse.Namespace) -> None:
    """Settle ``args.model``, ``args.model_type`` and the number of steps, before any weight is read.

    ``--model`` may name a model type; a folder's or hub id's model_index.json tells the type that is not named. The
    number of steps is the type's own, where none is named.

    Raises:
        ValueError: There is no such model, it is of another type than is named, or of one that the commands do not run.
    """
    if args.model is not None:
        _settle(args)
    if args.model is None:
        own_model(args.model_type)
    if hasattr(args, "num_inference_steps") and not getattr(args, "num_inference_steps_named", False):
        args.num_inference_steps = MODEL_TYPES[args.model_type].num_inference_steps


def _settle(args: argparse.Namespace) -> None:
    """Tell model and type of ``args.model``, which may name either."""
    named = args.model_type if getattr(args, "model_type_named", False) else None
    if not Path(args.model).exists():
        if args.model in MODEL_TYPES:
            if named not in (None, args.model):
                raise ValueError(f"--model {args.model} is a model type, and --model_type is {named}; name one")
            args.model_type, args.model = args.model, None
            return
        args.model = SHORT_NAMES.get(args.model, args.model)
        _check_exists(args.model)
        if named is not None:
            return  # loading will tell whether it fits, without asking the hub twice
    args.model_type = _type_of(args.model, named)


def read_index(source: str) -> dict[str, Any]:
    """Read the model_index.json of a folder or hub id.

    Raises:
        ValueError: It is not there, or no pipeline's.
    """
    folder = Path(source)
    if folder.is_dir():
        path = folder / INDEX
        if not path.is_file():
            raise ValueError(f"--model {source}: the folder has no {INDEX}; name what save_pretrained() wrote")
    elif folder.exists():
        raise ValueError(f"--model {source} is a file; name the folder of a diffusers pipeline")
    else:
        path = _fetched(source)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {source}: its {INDEX} cannot be read ({error})") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(f"--model {source}: its {INDEX} names no pipeline class")
    return index


def _check_exists(source: str) -> None:
    """Refuse what is neither a folder nor has the form of a hub id (ValueError)."""
    if _HUB_ID.fullmatch(source) and not source.startswith(".") and not Path(source).parent.is_dir():
        return
    if os.sep in source:
        raise ValueError(f"--model {source}: no such folder")
    known = [*MODEL_TYPES, *SHORT_NAMES]
    raise ValueError(
        f"--model {source}: no such folder, and no model type{did_you_mean(source, known) or ';'} name a folder, a "
        f"hub id (owner/name) or one of {', '.join(MODEL_TYPES)}"
    )


def _fetched(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, INDEX))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--model {source}: no such folder, and nothing on the hub ({reason})") from error


def _type_of(source: str, named: str | None) -> str:
    """The model type of what is there; the one that is named, where it fits (ValueError where not)."""
    pipeline = read_index(source)["_class_name"]
    fitting = [name for name, spec in MODEL_TYPES.items() if pipeline in spec.pipelines]
    if not fitting:
        known = ", ".join(dict.fromkeys(each for spec in MODEL_TYPES.values() for each in spec.pipelines))
        raise ValueError(
            f"--model {source} is a {pipeline}, and this command runs {known}; in Python, "
            "apply_cache_on_pipeline(pipeline, target_speedup=...) takes any"
        )
    if named is not None:
        if named not in fitting:
            raise ValueError(
                f"--model {source} is a {pipeline} (--model_type {_general(fitting)}), and --model_type is {named}; "
                "leave --model_type out"
            )
        return named
    return next((name for name in fitting if _is_shipped(name, Path(source))), _general(fitting))


def _general(fitting: list[str]) -> str:
    """The type of those that asks for no certain configuration."""
    return next(name for name in fitting if not MODEL_TYPES[name].configuration and not MODEL_TYPES[name].preset)


def _is_shipped(model_type: str, folder: Path) -> bool:
    """Whether a model has the configuration of the type's own, which comes with the package."""
    spec = MODEL_TYPES[model_type]
    wanted, path = spec.configuration, folder / SPECS[spec.transformer_class].components[0] / "config.json"
    if not wanted or not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return all(found.get(name) == value for name, value in wanted.items())
