"""A command line that says in one line what is wrong with it, and what was probably meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from xfuser.config.launched import rank
from xfuser.config.spelling import did_you_mean, not_known


def with_underscores(arguments: Iterable[str]) -> list[str]:
    """Take flags with dashes for those with underscores. What follows a bare ``--`` is left as it is."""
    result, flags = [], True
    for each in arguments:
        flags = flags and each != "--"
        if flags and each.startswith("--"):
            name, equals, value = each[2:].partition("=")
            each = f"--{name.replace('-', '_')}{equals}{value}"
        result.append(each)
    return result


class OneLineParser(argparse.ArgumentParser):
    """Takes dashes and underscores alike, speaks on the first rank only, and suggests the nearest known name."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **settings: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        given = with_underscores(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self._chosen(given).refuse(unknown)
        return parsed

    def refuse(self, unknown: Sequence[str]) -> None:
        """End the program with a line about the first argument that nothing takes."""
        flags = [each for each in unknown if each.startswith("-")]
        if not flags:
            self.error(f"{unknown[0]!r} follows no flag that takes it; put words that belong together into quotes")
        name = flags[0].split("=", 1)[0]
        known = [each for each in self._option_string_actions if each.startswith("--")]
        self.error(f"{name} is not known{did_you_mean(name, known) or f'; see {self.prog} --help'}")

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")

    def _chosen(self, given: Sequence[str]) -> OneLineParser:
        """The parser of the command that was named; this one where there are none."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                named = [each for each in given if each in action.choices]
                if named:
                    return action.choices[named[0]]
        return self

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        raise argparse.ArgumentError(action, f"{value!r} {not_known(value, map(str, action.choices))}")

    def _print_message(self, message: str, file: Any = None) -> None:
        if rank() == 0:
            super()._print_message(message, file)
