"""Tables of the docs that tests make: compared, or written anew where XFUSER_WRITE_DOCS is set."""

from __future__ import annotations

import os
from pathlib import Path


def assert_written(page: Path, begin: str, table: str, end: str) -> None:
    """Assert that a page has this table between its marks."""
    text = page.read_text(encoding="utf-8")
    written = text.partition(begin)[0] + begin + "\n" + table + end + end.join(text.split(end)[1:])
    if os.environ.get("XFUSER_WRITE_DOCS"):
        page.write_text(written, encoding="utf-8")
        text = written
    assert text == written, f"run this test with XFUSER_WRITE_DOCS=1 to write docs/{page.name} anew"
