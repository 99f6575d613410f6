"""What somebody may have meant who wrote a name that is not known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

_SHORTEST = 2  # letters that a name must have to count as the beginning of another one


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Find the known name that a word was probably meant to be; ``None`` where none is near.

    Case, dashes and underscores do not count. A name that begins with the other one (``TeaCache`` and ``Tea``) is as
    near as one with few other letters.
    """
    plain = {_plain(name): name for name in reversed(list(known))}
    wanted = _plain(word)
    if wanted in plain:
        return plain[wanted]
    begins = [each for each in plain if len(each) >= _SHORTEST and wanted.startswith(each)]
    begun = [each for each in plain if len(wanted) >= _SHORTEST and each.startswith(wanted)]
    if begins or begun:
        return plain[max(begins, key=len) if begins else min(begun, key=len)]
    close = get_close_matches(wanted, plain, n=1, cutoff=0.7)
    return plain[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Make what an error goes on with after a name that is not known: a question, or nothing."""
    meant = nearest(word, known)
    return "" if meant is None else f"; did you mean {meant}?"


def not_known(value: Any, known: Iterable[Any], shown: Callable[[Any], str] = str) -> str:
    """Make what an error says of a value that is not known: what was probably meant, and all that may be chosen."""
    choices = list(known)
    meant = nearest(value, [each for each in choices if isinstance(each, str)]) if isinstance(value, str) else None
    choose = "; choose" if meant is None else f"; did you mean {shown(meant)}? Choose"
    return f"is not known{choose} one of {', '.join(map(shown, choices))}"


def _plain(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "")
