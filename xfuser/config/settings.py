"""A setting, written once: from one dataclass field come its check, its flag, what it belongs to, and its table row."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from os import PathLike
from typing import Any

from xfuser.config.spelling import not_known

_KEY = "setting"


@dataclass(frozen=True)
class Setting:
    """What is said of one setting beside its name and default.

    Attributes:
        text: What it does, as help and table say it.
        check: Raises ValueError for a value, given with the setting's name, that is not allowed.
        otherwise: What holds where it is left out, in words; by default the default itself.
        readers: The methods and modes that read it; none where all do.
        argument: How its flag is read, for argparse; ``None`` without a flag.
        allowed: Its range in words, for the table.
    """

    text: str
    check: Callable[[str, Any], None]
    otherwise: str = ""
    readers: tuple[str, ...] = ()
    argument: dict[str, Any] | None = None
    allowed: str = ""


def number(
    default: float | None,
    text: str,
    low: float = 0,
    high: float = math.inf,
    otherwise: str = "",
    readers: tuple[str, ...] = (),
    above: float | None = None,
    metavar: str | None = None,
) -> Any:
    """Declare a number from ``low`` or strictly ``above`` a limit; ``None`` is allowed where it is the default."""
    exclusive, least = above is not None, low if above is None else above
    if exclusive:
        allowed = f"above {least:g}" + ("" if high == math.inf else f" and at most {high:g}")
        expected = f"a number {allowed}"
    elif high == math.inf:
        allowed, expected = f"{least:g} or more", f"a number, at least {least:g}"
    else:
        allowed, expected = f"{least:g} to {high:g}", f"a number, between {least:g} and {high:g}"

    def check(name: str, value: Any) -> None:
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not plain or not least <= value <= high or math.isinf(value) or (exclusive and value == least):
            raise ValueError(f"{name}={value!r}: expected {expected}")

    argument = {"type": float} if metavar is None else {"type": float, "metavar": metavar}
    return _field(default, Setting(text, check, otherwise, readers, argument, allowed))


def count(default: int | None, text: str, otherwise: str = "", readers: tuple[str, ...] = (), flag: bool = True) -> Any:
    """Declare a whole number of at least 1; ``None`` is allowed where it is the default."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more")

    return _field(default, Setting(text, check, otherwise, readers, {"type": positive} if flag else None, "1 or more"))


def choice(
    default: str | None, choices: Iterable[str], text: str, otherwise: str = "", readers: tuple[str, ...] = ()
) -> Any:
    """Declare one of some words; ``None`` is allowed where it is the default."""
    known = tuple(choices)

    def check(name: str, value: Any) -> None:
        one_of(name, value, known if default is not None else (None, *known))

    allowed = ", ".join(f"`{each}`" for each in known)
    return _field(default, Setting(text, check, otherwise, readers, {"choices": known}, allowed))


def switch(default: bool | None, text: str, otherwise: str = "", readers: tuple[str, ...] = ()) -> Any:
    """Declare what is on or off; its flag switches it on, and where ``None`` is the default there is no flag."""

    def check(name: str, value: Any) -> None:
        one_of(name, value, (True, False) if default is not None else (None, True, False))

    argument = None if default is None else {"action": "store_true"}
    return _field(default, Setting(text, check, otherwise, readers, argument, "`True`, `False`"))


def path(
    text: str,
    words: Iterable[str],
    otherwise: str = "",
    readers: tuple[str, ...] = (),
    default: str | None = None,
) -> Any:
    """Declare a path, or one of some words."""
    known = tuple(words)
    expected = " or ".join(["a path", *map(repr, known)])

    def check(name: str, value: Any) -> None:
        if not isinstance(value, (str, PathLike)) and (value is not None or default is not None):
            raise ValueError(f"{name}={value!r}: expected {expected}")

    allowed = ", ".join(["a path", *(f"`{each}`" for each in known)])
    return _field(default, Setting(text, check, otherwise, readers, {"metavar": "FILE"}, allowed))


def word(text: str, check: Callable[[str, Any], None], otherwise: str = "", allowed: str = "") -> Any:
    """Declare what has its own check and its own flag; ``None`` by default."""
    return _field(None, Setting(text, check, otherwise, allowed=allowed))


def setting_of(each: Field[Any]) -> Setting:
    """Look up what is said of a field that one of the functions above declared."""
    return each.metadata[_KEY]


def check_values(config: Any) -> None:
    """Refuse values that are out of their range (ValueError), and make numbers of any library Python's own."""
    for each in fields(config):
        value = plain_number(getattr(config, each.name))
        object.__setattr__(config, each.name, value)
        if value is not None or each.default is not None:
            setting_of(each).check(each.name, value)


def add_flags(group: Any, settings: Iterable[Field[Any]], reader: str = "") -> None:
    """Add the flags of settings to a parser or a group of one; what is left out is ``None``, or False for a switch."""
    for each in settings:
        known = setting_of(each)
        if known.argument is not None:
            group.add_argument(f"--{each.name}", help=help_of(each, reader), **known.argument)


def help_of(each: Field[Any], reader: str = "") -> str:
    """Make the help of a flag: who reads it, what it does, and what holds without it."""
    known = setting_of(each)
    readers = ", ".join(known.readers) or reader
    readers += ": " if readers else ""
    return f"{readers}{known.text} (default: {default_of(each)})"


def default_of(each: Field[Any]) -> str:
    """Say what holds where a setting is left out."""
    known = setting_of(each)
    if known.otherwise:
        return known.otherwise
    if isinstance(each.default, bool):
        return "on" if each.default else "off"
    return f"{each.default:g}" if isinstance(each.default, float) else str(each.default)


def named_in(args: argparse.Namespace, settings: Iterable[Field[Any]]) -> dict[str, Any]:
    """Take from a command line the settings that it names."""
    found = {each.name: getattr(args, each.name) for each in settings if setting_of(each).argument is not None}
    return {name: value for name, value in found.items() if value is not None and value is not False}


def positive(text: str) -> int:
    """Read a whole number of at least 1 from a command line."""
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def plain_number(value: Any) -> Any:
    """Turn a number of any library (numpy's) into Python's own; everything else is left as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is none of the allowed ones, with the one that was probably meant (ValueError)."""
    if any(value is option or (isinstance(option, str) and value == option) for option in allowed):
        return
    raise ValueError(f"{name}={value!r} {not_known(value, allowed, repr)}")


def _field(default: Any, setting: Setting) -> Any:
    assert default is not MISSING
    return field(default=default, metadata={_KEY: setting})
