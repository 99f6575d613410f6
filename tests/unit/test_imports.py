"""Modules can be imported in any order: each of them first, in an interpreter that has seen none of them."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import xfuser

ROOT = Path(__file__).resolve().parents[2]
FIRST = """
import importlib, sys
import torch, diffusers  # kept: they take seconds
failed = []
for name in sys.argv[1:]:
    for known in [each for each in sys.modules if each.partition(".")[0] == "xfuser"]:
        del sys.modules[known]
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed.append(f"{name}: {error}")
sys.exit("\\n".join(failed) or 0)
"""


def test_each_module_can_be_the_first_that_is_imported() -> None:
    modules = [module.name for module in pkgutil.walk_packages(xfuser.__path__, "xfuser.")]
    ended = subprocess.run(
        [sys.executable, "-c", FIRST, *modules], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert len(modules) > 100
    assert ended.returncode == 0, ended.stderr
