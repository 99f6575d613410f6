"""Every name of the committed list is carried over, refuses when it is used, or says what to use instead."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

LIST = Path(__file__).resolve().parents[2] / "docs" / "xdit-names.md"
CARRIED, REFUSES = "carried over", "refuses when it is used: "


def listed() -> dict[str, str]:
    """What the list says of each name."""
    rows = [line.split("|")[1:3] for line in LIST.read_text().splitlines() if line.startswith("| `xfuser")]
    names = [name.strip(" `") for name, _ in rows]
    assert len(set(names)) == len(names), "a name is listed twice"
    return {name: said.strip() for name, (_, said) in zip(names, rows, strict=True)}


NAMES = listed()


def take(name: str) -> object:
    """What ``from module import name`` does, or ``import module``."""
    module, _, last = name.rpartition(".")
    scope: dict[str, object] = {}
    exec(f"from {module} import {last} as taken", scope)
    return scope["taken"]


@pytest.mark.parametrize("name", [name for name, said in NAMES.items() if said == CARRIED])
def test_a_name_that_is_carried_over(name: str) -> None:
    assert take(name) is not None


@pytest.mark.parametrize("name", [name for name, said in NAMES.items() if said.startswith(REFUSES)])
def test_a_pipeline_that_refuses_when_it_is_used(name: str) -> None:
    pipeline = take(name)
    assert isinstance(pipeline, type) and pipeline.__name__ == name.rpartition(".")[2]
    assert not isinstance(object(), pipeline) and {pipeline: "of a table"}[pipeline]
    for use in (lambda: pipeline("anything"), lambda: pipeline.from_pretrained("anywhere", engine_config=None)):
        with pytest.raises(NotImplementedError) as error:
            use()
        assert str(error.value) == f"xDiT's {pipeline.__name__} is not carried over: {NAMES[name][len(REFUSES) :]}"


@pytest.mark.parametrize("name", [name for name, said in NAMES.items() if said != CARRIED and "refuses" not in said])
def test_a_name_that_says_what_to_use_instead(name: str) -> None:
    with pytest.raises(ImportError, match="^xDiT's xfuser[^\n]*$") as error:
        take(name)
    assert not isinstance(error.value, ModuleNotFoundError)
    refused, _, instead = str(error.value).partition(" is not carried over: ")
    assert name.startswith(refused.removeprefix("xDiT's ")) and instead == NAMES[name]


def test_the_list_has_every_kind_of_name() -> None:
    said = list(NAMES.values())
    assert said.count(CARRIED) > 70 and sum(each.startswith(REFUSES) for each in said) > 15 and len(said) > 190


def test_modules_that_have_no_file_are_modules() -> None:
    module = importlib.import_module("xfuser.config.diffusers")
    assert module is sys.modules["xfuser.config.diffusers"] is importlib.import_module("xfuser.config").diffusers
    assert sorted(module.__all__) == ["get_minimum_diffusers_version", "has_valid_diffusers_version"]
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = module.no_such_name


@pytest.mark.parametrize("name", ["xfuser.no_such_module", "xfuser.core.no_such_module", "xfuser.config.args.nothing"])
def test_what_xdit_does_not_have_either_is_missing_as_usual(name: str) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_names_are_found_without_loading_torch() -> None:
    """The command's help imports the package; it must stay quick."""
    code = (
        "import sys, xfuser, xfuser.config, xfuser.logger\n"
        "xfuser.logger.init_logger, xfuser.xFuserLattePipeline\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
