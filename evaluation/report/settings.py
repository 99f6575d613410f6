"""Which settings a benchmark's rows have in common, and which tell them apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.report.style import kind

# A row's name says these.
NAMED = ("use_cache", "enable_adacorrection")


def split_settings(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Take the settings out of the rows that tell none of them from another.

    Args:
        results: The ``results`` of the benchmark's document.

    Returns:
        The settings that every cache on blocks has with one value, and for each row what is left of its own: for a
        variant of a base method that is what it does otherwise than the base method alone. Rows of another kind (no
        cache, fewer steps, the trajectory) have none of the common settings, so they decide nothing.
    """
    whole = {
        row["method"]: {name: value for name, value in (row.get("settings") or {}).items() if name not in NAMED}
        for row in results
    }
    on_blocks = [
        whole[row["method"]]
        for row in results
        if row.get("base") is not None and kind(row) != "opponent" and "level" not in whole[row["method"]]
    ]
    first, others = (on_blocks[0], on_blocks[1:]) if on_blocks else ({}, [])
    shared = {
        name: value for name, value in first.items() if all(name in each and each[name] == value for each in others)
    }
    own = []
    for row in results:
        base = whole.get(row.get("base") or "", {}) if row.get("base") != row["method"] else {}
        known = shared | base
        settings = whole[row["method"]]
        own.append({name: value for name, value in settings.items() if name not in known or known[name] != value})
    return shared, own
