"""A setting is written once: its check, its flag, its row in the tables and what it belongs to come from one field."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from scripts import settings_table
from xfuser.config import CacheConfig, xFuserArgs
from xfuser.config.arguments import add_base_arguments, add_correction_arguments
from xfuser.config.cache import by_reader
from xfuser.config.methods import METHODS, policy_class, settings_of
from xfuser.config.settings import (
    add_flags,
    check_values,
    choice,
    count,
    help_of,
    named_in,
    number,
    setting_of,
    switch,
)

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Example:
    share: float = number(0.25, "how much", 0, 1)
    limit: float | None = number(None, "how far", otherwise="no limit")
    steps: int = count(3, "how often")
    kind: str = choice("round", ("round", "square"), "which one")
    loud: bool = switch(False, "say so")

    def __post_init__(self) -> None:
        check_values(self)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"share": 1.5}, "share=1.5: expected a number, between 0 and 1"),
        ({"share": None}, "share=None: expected a number, between 0 and 1"),
        ({"limit": -1}, "limit=-1: expected a number, at least 0"),
        ({"limit": math.inf}, "limit=inf: expected a number, at least 0"),
        ({"steps": 0}, "steps=0: expected a whole number, 1 or more"),
        ({"steps": True}, "steps=True: expected a whole number, 1 or more"),
        ({"kind": "rund"}, "kind='rund' is not known; did you mean 'round'? Choose one of 'round', 'square'"),
        ({"loud": 1}, "loud=1 is not known; choose one of True, False"),
    ],
)
def test_a_field_checks_its_value(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Example(**values)
    assert str(caught.value) == said


def test_a_field_is_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, dataclasses.fields(Example), "Ex")
    read = parser.parse_args("--share 0.5 --steps 4 --kind square --loud".split())
    assert named_in(read, dataclasses.fields(Example)) == {"share": 0.5, "steps": 4, "kind": "square", "loud": True}
    assert named_in(parser.parse_args([]), dataclasses.fields(Example)) == {}
    helps = [help_of(each, "Ex") for each in dataclasses.fields(Example)]
    assert helps[:2] == ["Ex: how much (default: 0.25)", "Ex: how far (default: no limit)"]
    assert helps[3:] == ["Ex: which one (default: round)", "Ex: say so (default: off)"]


def test_every_setting_says_what_it_is_and_belongs_somewhere_once() -> None:
    listed = [each.name for _, settings in by_reader() for each in settings]
    assert listed == [each.name for each in dataclasses.fields(CacheConfig)]
    assert len(set(listed)) == len(listed), "two methods have a setting of the same name"
    for each in dataclasses.fields(CacheConfig):
        assert setting_of(each).text and setting_of(each).allowed, each.name
        assert f"{each.name}: " in (CacheConfig.__doc__ or "")


def test_every_setting_with_a_flag_has_it_in_every_command() -> None:
    parser = argparse.ArgumentParser()
    add_base_arguments(parser)
    add_correction_arguments(parser)
    flags = {action.dest for action in parser._actions}
    expected = {each.name for each in dataclasses.fields(CacheConfig) if setting_of(each).argument is not None}
    assert expected - flags == {"rel_l1_thresh"}  # whose help names the model types
    assert expected <= {each.name for each in dataclasses.fields(xFuserArgs)}


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_own_settings_are_refused_elsewhere(method: str) -> None:
    other = "Tea" if method != "Tea" else "Fb"
    for each in settings_of(method):
        value: Any = {bool: True, int: 7, float: 0.25, type(None): 1}.get(type(each.default))
        if value is None:
            (value,) = [word for word in (setting_of(each).argument or {})["choices"] if word != each.default][:1]
        with pytest.raises(ValueError, match=f"^{each.name} belongs to use_cache='{method}', not to '{other}'"):
            CacheConfig(use_cache=other, **{each.name: value})


def test_methods_are_found_by_their_names() -> None:
    for name in METHODS:
        assert policy_class(name).__name__.endswith("Policy") and policy_class(name).__doc__


@pytest.mark.parametrize("page", settings_table.PAGES)
def test_the_tables_are_current(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert settings_table.current(page, text) == text, "run python scripts/settings_table.py"
