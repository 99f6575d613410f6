"""What a setting is called on the command line, so that an error there speaks of flags."""

from __future__ import annotations

import re
from dataclasses import fields

from xfuser.config.cache import CacheConfig
from xfuser.config.methods import learning_settings

_OTHERS = {"num_steps": "num_inference_steps", "calibration_reference": "reference_steps"}
_SETTINGS = {each.name for each in fields(CacheConfig)} | {"target_speedup", "min_psnr"} | set(_OTHERS)
_SETTINGS |= {each.name for _, settings in learning_settings() for each in settings}
_NAMES = "|".join(sorted(_SETTINGS, key=len, reverse=True))
_LONG = "|".join(name for name in sorted(_SETTINGS, key=len, reverse=True) if "_" in name)

_WITH_VALUE = re.compile(rf"(?<![\w.-])({_NAMES})=('[^']*'|[^\s,;:)]+)")
_ALONE = re.compile(rf"(?<![\w.-])({_LONG})(?![\w(=])")
# Names that are words of English too are taken for settings only where a sentence begins with one.
_BEGINNING = re.compile(rf"(^|: )({_NAMES})(?=:| belongs| needs)")


def in_flags(text: str) -> str:
    """Rewrite a message about settings (``adacorr_mode='gate'``) as one about flags (``--adacorr_mode gate``)."""
    text = _WITH_VALUE.sub(lambda found: _flag(found[1], found[2].strip("'")), text)
    text = _ALONE.sub(lambda found: _flag(found[1]), text)
    return _BEGINNING.sub(lambda found: found[1] + _flag(found[2]), text)


def _flag(name: str, value: str = "True") -> str:
    flag = f"--{_OTHERS.get(name, name)}"
    if value == "True":
        return flag
    return f"no {flag}" if value in ("False", "None") else f"{flag} {value}"
