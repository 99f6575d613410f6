"""The sections of a calibration by name: those of the base methods, and that of the approximation ``linear``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from xfuser.config.spelling import did_you_mean
from xfuser.model_executor.adapters import ModelSpec
from xfuser.model_executor.cache.calibration.linear import LinearSection
from xfuser.model_executor.cache.policies import POLICIES
from xfuser.model_executor.cache.policies.base import Learning, Section

SECTIONS: dict[str, type[Section]] = {
    **{str(name): policy.Section for name, policy in POLICIES.items() if policy.Section is not None},
    "linear": LinearSection,
}


def build_sections(
    transformer: nn.Module, spec: ModelSpec, steps: int, settings: Mapping[str, Any]
) -> dict[str, Section]:
    """Make all sections for a recording, each with those of the settings that are its own.

    Raises:
        TypeError: A setting belongs to none of them.
        ValueError: One is out of its range.
    """
    own = {name: {each.name for each in fields(section.Config)} for name, section in SECTIONS.items()}
    known = {setting for names in own.values() for setting in names}
    for setting in settings:
        if setting not in known:
            meant = did_you_mean(setting, known) or ";"
            raise TypeError(f"unknown setting of a calibration {setting}{meant} known are {', '.join(sorted(known))}")
    blocks = spec.blocks(transformer)
    sections = {}
    for name, section in SECTIONS.items():
        named = {key: value for key, value in settings.items() if key in own[name]}
        sections[name] = section(Learning(transformer, blocks, spec, steps, named))
    return sections
