"""What one line of a prompt file may ask for, and what it then asks the pipeline."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xfuser.config.spelling import did_you_mean
from xfuser.model_executor.pipelines.choosing import read_index
from xfuser.model_executor.pipelines.geometry import geometry_of
from xfuser.model_executor.pipelines.loading import MODEL_TYPES, TOY, source_of

LONGEST_PROMPT = 20_000  # characters; text encoders read some hundreds of tokens
LARGEST_SIDE = 16_384
MOST_STEPS = 10_000
LARGEST_SEED = 2**63 - 1
# A name of a file and of nothing else: no separators, no leading dot or dash, and short enough for every file system.
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")
_ALIASES = {"steps": "num_inference_steps", "label": "class_label"}
_OWN = ("prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length")
# What the job gives the pipeline itself, or what is no plain value.
_NOT_FROM_A_LINE = {"self", "generator", "output_type", "return_dict", "num_images_per_prompt"}
_NOT_FROM_A_LINE |= {"class_labels", "scene_graphs"}
KIND = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "height", "width", "max_sequence_length", "others")


@dataclass(frozen=True)
class Rules:
    """What a model's requests may say, known before any weight is read. Made by `of`.

    Args:
        labelled: Whether the model takes class labels instead of prompts.
        labels: Numbers by class name.
        classes: How many classes there are; ``None`` where the model does not tell.
        multiple: What height and width are multiples of.
        size: Height and width where none is named.
        in_calls: Whether guidance by a negative prompt has a scale of its own (``true_cfg_scale``).
        others: Further arguments of the pipeline that a line may name.
        defaults: What a line says that does not say it.
        guidance_scale: The model type's own.
        steps: The only number of steps that may be asked for, where a calibration is of that.
        graphs: Whether prompts are scene graphs, as JSON text.
    """

    labelled: bool
    labels: Mapping[str, int]
    classes: int | None
    multiple: int
    size: tuple[int, int]
    in_calls: bool
    others: frozenset[str]
    defaults: Mapping[str, Any]
    guidance_scale: float
    steps: int | None = None
    graphs: bool = False

    @classmethod
    def of(
        cls,
        model_type: str,
        model: str | None,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        steps: int | None = None,
        **defaults: Any,
    ) -> Rules:
        """Read a model's rules from its configuration.

        Raises:
            ValueError: It cannot be read.
        """
        spec = MODEL_TYPES[model_type]
        if spec.makes != "images":
            raise ValueError(f"{model_type} makes videos, and a job's lines ask for images; use xdit generate")
        source = source_of(model_type, model)
        index = {} if source == TOY else read_index(source)
        known = {name.strip(): int(number) for number, text in _labels(index) for name in str(text).split(",")}
        drawn = geometry_of(model_type, model)
        arguments: set[str] = set()
        for each in spec.pipeline_classes:
            arguments |= set(inspect.signature(each.__call__).parameters)
        named = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **defaults}
        return cls(
            spec.conditioned_on == "label",
            known,
            len(set(known.values())) or None,
            drawn.multiple,
            (drawn.height, drawn.width),
            spec.true_cfg,
            frozenset(arguments - _NOT_FROM_A_LINE - set(_OWN) - {"true_cfg_scale"}),
            {name: value for name, value in named.items() if value is not None},
            spec.guidance_scale,
            steps,
            spec.conditioned_on == "scene_graph",
        )

    @property
    def known(self) -> tuple[str, ...]:
        """Every name that a line may have."""
        condition = ("class_label", "label") if self.labelled else ("prompt",)
        names = ("id", *condition, "seed", "steps", *_OWN, "true_cfg_scale", *sorted(self.others))
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Request:
    """One image that is to be made.

    Attributes:
        id: Its name, which becomes its file's.
        condition: A prompt, or the number of a class.
        seed: Of its noise.
        sampling: What the images of a batch have in common: steps, sizes, guidance.
        negative_prompt: What not to show.
        file: Where it was asked for.
        line: The line there, from 1; the row, where it is a table.
    """

    id: str
    condition: str | int
    seed: int
    sampling: Mapping[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = None
    file: str = ""
    line: int = 0

    @property
    def kind(self) -> str:
        """What requests have in common that may share a batch: all but prompt and seed."""
        guided = self.negative_prompt is not None
        return json.dumps([{name: self.sampling.get(name) for name in KIND}, guided], sort_keys=True)

    def call(self) -> dict[str, Any]:
        """Make what `Rank.generate` takes, in plain types."""
        own = {"id": self.id, "condition": self.condition, "seed": self.seed, "kind": self.kind}
        return own | {"negative_prompt": self.negative_prompt} | dict(self.sampling)

    def document(self) -> dict[str, Any]:
        """Make what is written of it; `of` reads it again."""
        return vars(self) | {"sampling": dict(self.sampling)}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Request:
        return cls(**document)


def check_row(row: Mapping[str, Any], rules: Rules, position: int, file: str = "", line: int = 0) -> Request:
    """Make a request of what a line says.

    Args:
        row: The line's values by name.
        rules: The model's.
        position: The line's place among all, for a seed that it does not name.
        file: For messages.
        line: For messages.

    Raises:
        ValueError: The line asks for what cannot be; the message says what is wrong and what may be.
    """
    said = {_ALIASES.get(name, name): value for name, value in row.items() if value is not None}
    for name in said:
        if name not in rules.known:
            raise ValueError(f"{name!r} is not known{did_you_mean(str(name), rules.known) or _all(rules.known)}")
    identity = _identity(said.pop("id", None))
    condition = _label(said, rules) if rules.labelled else _text(said, "prompt")
    if rules.graphs:
        for name in ("negative_prompt", "max_sequence_length"):
            if name in said:
                raise ValueError(f"{name!r} does not go with this model, whose prompts are scene graphs; leave it out")
    negative = _text(said, "negative_prompt") if "negative_prompt" in said else rules.defaults.get("negative_prompt")
    seed = (
        _whole(said.pop("seed"), "seed", 0, LARGEST_SEED)
        if "seed" in said
        else rules.defaults.get("seed", 0) + position
    )
    sampling = {name: rules.defaults[name] for name in KIND if rules.defaults.get(name) is not None}
    for name, check in _CHECKS.items():
        if name in said:
            sampling[name] = check(said.pop(name), name)
    if rules.steps is not None and sampling["num_inference_steps"] != rules.steps:
        raise ValueError(
            f"'num_inference_steps' {sampling['num_inference_steps']}: the job's --calibration is of {rules.steps}"
        )
    _check_size(sampling, rules)
    _check_guidance(sampling, negative, rules)
    others = {name: _scalar(value, name) for name, value in sorted(said.items())}
    if others:
        sampling["others"] = others
    return Request(identity, condition, seed, sampling, negative, file, line)


def is_absent(value: Any) -> bool:
    """Whether a table's cell is empty; one of numbers has NaN there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _identity(value: Any) -> str:
    if value is None or value == "":
        raise ValueError("'id' is missing; give every line one of its own")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"'id' is {_shown(value)}; expected a text or a whole number")
    text = str(value)
    if not _ID.fullmatch(text):
        raise ValueError(
            f"'id' {_shown(text)} cannot name a file: take letters, digits, '.', '_' and '-', at most 120, and no '.' "
            "or '-' in front"
        )
    return text


def _label(said: dict[str, Any], rules: Rules) -> int:
    for name in ("prompt", "negative_prompt", "max_sequence_length", "true_cfg_scale"):
        if name in said:
            raise ValueError(f"{name!r} does not go with this model, which takes 'class_label'")
    value = said.pop("class_label", None)
    if value is None or value == "":
        raise ValueError("'class_label' is missing")
    number = rules.labels.get(value, int(value) if value.isdigit() else None) if isinstance(value, str) else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < (rules.classes or math.inf):
        known = f" 0 to {rules.classes - 1}" + (" or a name" if rules.labels else "") if rules.classes else " a number"
        meant = did_you_mean(value, rules.labels) if isinstance(value, str) else ""
        raise ValueError(f"'class_label' {_shown(value)} is no class of the model{meant or ';'} expected{known}")
    return number


def _text(said: dict[str, Any], name: str) -> str:
    value = said.pop(name, None)
    if value is None:
        raise ValueError(f"{name!r} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {_shown(value)}; expected a text")
    if not value.strip():
        raise ValueError(f"{name!r} is empty")
    if len(value) > LONGEST_PROMPT:
        raise ValueError(f"{name!r} has {len(value):,} characters; at most {LONGEST_PROMPT:,} are read")
    return value


def _whole(value: Any, name: str, least: int, most: int) -> int:
    number = value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,20}", value.strip()):  # a CSV knows texts only
        number = int(value)
    if isinstance(value, float) and value.is_integer():  # a table's column with gaps has floats
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise ValueError(f"{name!r} is {_shown(value)}; expected a whole number, {least} to {most}")
    return number


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, (bool, list, dict)) else float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name!r} is {_shown(value)}; expected a number of at least 0")
    return number


def _scalar(value: Any, name: str) -> Any:
    if not isinstance(value, (str, int, float, bool)):
        raise ValueError(f"{name!r} is {_shown(value)}; a line gives the pipeline texts, numbers, true and false only")
    return value


def _check_size(sampling: Mapping[str, Any], rules: Rules) -> None:
    for name, own in zip(("height", "width"), rules.size, strict=True):
        value = sampling.get(name)
        if value is None:
            continue
        if value % rules.multiple:
            near = max(rules.multiple, round(value / rules.multiple) * rules.multiple)
            raise ValueError(f"{name!r} {value} is not a multiple of {rules.multiple}; the nearest is {near}")
        if (rules.labelled or rules.graphs) and value != own:
            raise ValueError(f"{name!r} {value}: this model draws {rules.size[0]} x {rules.size[1]} only; leave it out")


def _check_guidance(sampling: Mapping[str, Any], negative: str | None, rules: Rules) -> None:
    true_scale = sampling.get("true_cfg_scale")
    if rules.in_calls:
        if (true_scale is not None and true_scale > 1) != (negative is not None):
            raise ValueError("'negative_prompt' and 'true_cfg_scale' above 1 go together; name both or neither")
        return
    if true_scale is not None:
        raise ValueError("'true_cfg_scale' does not go with this model; use 'guidance_scale'")
    if negative is not None and sampling.get("guidance_scale", rules.guidance_scale) <= 1:
        raise ValueError("'negative_prompt': nothing reads it where 'guidance_scale' is 1 or less")


def _steps(value: Any, name: str) -> int:
    return _whole(value, name, 1, MOST_STEPS)


def _side(value: Any, name: str) -> int:
    return _whole(value, name, 1, LARGEST_SIDE)


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "num_inference_steps": _steps,
    "guidance_scale": _number,
    "true_cfg_scale": _number,
    "height": _side,
    "width": _side,
    "max_sequence_length": _steps,
}


def _labels(index: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list((index.get("id2label") or {}).items())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...'"


def _all(names: tuple[str, ...]) -> str:
    return f"; known are {', '.join(names)}"
