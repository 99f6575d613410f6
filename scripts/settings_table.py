"""Write the tables of settings in README.md and docs anew, from what the settings say of themselves.

python scripts/settings_table.py            # writes them
python scripts/settings_table.py --check    # exits with 1 where one is not current
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from xfuser.config.cache import by_reader  # noqa: E402
from xfuser.config.settings import default_of, setting_of  # noqa: E402
from xfuser.config.trajectory import TrajectoryConfig  # noqa: E402

BEGIN, END = "<!-- settings: by scripts/settings_table.py -->", "<!-- end of settings -->"
TRAJECTORY = "the trajectory"
# Which settings each page shows, those of the trajectory first.
PAGES: dict[str, Callable[[str, str], bool]] = {
    "docs/methods.md": lambda name, reader: reader != TRAJECTORY,
    "docs/choose-a-setting.md": lambda name, reader: reader == TRAJECTORY,
    "README.md": lambda name, reader: (
        name in ("target_speedup", "min_psnr", "use_cache", "rel_l1_thresh", "enable_adacorrection")
        or (reader == TRAJECTORY and name in ("adacorr_budget", "calibration", "calibration_images"))
    ),
}


def table(shown: Callable[[str, str], bool]) -> str:
    """Draw the table of some settings, in the order of `TrajectoryConfig` and `CacheConfig`."""
    lines = ["| setting | what it does | default | range | belongs to |", "|---|---|---|---|---|"]
    for reader, settings in [(TRAJECTORY, fields(TrajectoryConfig)), *by_reader()]:
        for each in settings:
            known = setting_of(each)
            if shown(each.name, reader):
                belongs = ", ".join(known.readers) or reader or "all"
                default = default_of(each) if known.otherwise else f"`{each.default!r}`"
                lines.append(f"| `{each.name}` | {known.text} | {default} | {known.allowed} | {belongs} |")
    return "\n".join(lines)


def current(page: str, text: str) -> str:
    """Put the table of a page in the place of the one that its text has."""
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{page} has no place for the settings: {BEGIN} and {END}")
    return pattern.sub(lambda found: f"{BEGIN}\n{table(PAGES[page])}\n{END}", text)


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where one is not current")
    args = parser.parse_args()
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if current(page, text) != text:
            if args.check:
                raise SystemExit(f"{page}: its settings are not current; run python scripts/settings_table.py")
            path.write_text(current(page, text), encoding="utf-8")
            print(page)


if __name__ == "__main__":
    main()
