"""The base methods by name: one line each, which says where the method is written.

A method's file holds all of it: its settings (``Config``), its signal and proposals, and what it takes from a
calibration. It is imported here by name, since settings are read before anything else is, and imports no torch by
itself: ``xdit --help`` shows its flags. See docs/add-a-method.md.
"""

from __future__ import annotations

import importlib
from dataclasses import Field, fields
from functools import cache
from typing import Any

_POLICIES = "xfuser.model_executor.cache.policies"

METHODS = {
    "Fast": "fast.FastPolicy",
    "Tea": "tea.TeaPolicy",
    "Fb": "first_block.FirstBlockPolicy",
    "Interval": "interval.IntervalPolicy",
    "Ada": "ada.AdaPolicy",
    "Lazy": "lazy.LazyPolicy",
}


@cache
def policy_class(name: str) -> Any:
    """Look up the class of a base method."""
    module, _, attribute = METHODS[name].partition(".")
    return getattr(importlib.import_module(f"{_POLICIES}.{module}"), attribute)


def settings_of(name: str | None) -> tuple[Field[Any], ...]:
    """List the settings that belong to one base method alone."""
    return fields(policy_class(name).Config) if name in METHODS else ()


def learning_settings() -> list[tuple[str, tuple[Field[Any], ...]]]:
    """List the settings of ``xdit calibrate`` for single methods, by method."""
    sections = [(name, policy_class(name).Section) for name in METHODS]
    return [(name, fields(section.Config)) for name, section in sections if section is not None]


def with_threshold() -> tuple[str, ...]:
    """List the base methods that compare their signal with ``rel_l1_thresh``."""
    return tuple(name for name in METHODS if policy_class(name).common_threshold is not None)
