"""report.html: throughput over time, a line a group, a contact sheet, and what was rejected."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from xfuser.core.files import write_text
from xfuser.ray.batch.folder import REPORT
from xfuser.ray.batch.manifest import TABLE
from xfuser.ray.batch.prompts import Rejected

SHOWN = 48  # images of the contact sheet
SIDE = 96  # pixels of each
LISTED = 200  # rejected ones


def write_report(folder: Path, summary: Mapping[str, Any], rejected: Sequence[Rejected]) -> None:
    """Write the report of all runs of a job, from its manifest.

    Args:
        folder: The job's.
        summary: What summary.json holds.
        rejected: What was not made.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / TABLE, columns=["group", "finished", "seconds", "attempt"])
    columns = {name: table[name].to_numpy() for name in table.column_names}
    text = files("xfuser.ray.batch").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(text)
    write_text(
        folder / REPORT,
        page.render(
            folder=folder.name,
            summary=summary,
            settings=json.dumps(summary["settings"], indent=2),
            groups=_lines(columns),
            throughput=_throughput(columns["finished"]),
            sheet=_contact_sheet(folder, _chosen_paths(folder)),
            rejected=rejected[:LISTED],
            more=max(0, len(rejected) - LISTED),
        ),
    )


def _lines(columns: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    groups, seconds, attempts = columns["group"], columns["seconds"], columns["attempt"]
    found = []
    for number in np.unique(groups).tolist():
        own = groups == number
        found.append(
            {
                "group": number,
                "images": int(own.sum()),
                "seconds": float(seconds[own].sum()),
                "per_image": float(seconds[own].mean()),
                "again": int((attempts[own] > 1).sum()),
            }
        )
    return found


def _throughput(finished: np.ndarray) -> str:
    """Draw images a second over the time of all runs, as SVG."""
    from matplotlib.figure import Figure

    finished = np.sort(finished)
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    if len(finished) > 1 and finished[-1] > finished[0]:
        counts, edges = np.histogram((finished - finished[0]) / 60, bins=min(60, max(4, len(finished) // 8)))
        width = (edges[1] - edges[0]) * 60
        axes.stairs(counts / width, edges, fill=True, color="#4477aa")
    axes.set_xlabel("minutes since the first image")
    axes.set_ylabel("images a second")
    axes.spines[["top", "right"]].set_visible(False)
    kept = io.StringIO()
    figure.savefig(kept, format="svg", metadata={"Date": None})
    text = kept.getvalue()
    return text[text.index("<svg") :]


def _chosen_paths(folder: Path) -> list[str]:
    """Read the paths of some images, spread over all of them."""
    import pyarrow.parquet

    chosen: list[str] = []
    with pyarrow.parquet.ParquetFile(folder / TABLE) as table:
        count, seen = table.metadata.num_rows, 0
        wanted = np.unique(np.linspace(0, count - 1, min(SHOWN, count)).astype(int))
        for block in table.iter_batches(columns=["path"]):
            here = wanted[(wanted >= seen) & (wanted < seen + len(block))] - seen
            chosen += block["path"].take(pyarrow.array(here)).to_pylist()
            seen += len(block)
    return chosen


def _contact_sheet(folder: Path, chosen: Sequence[str]) -> str:
    """Put some images into one; as base64 of a JPEG."""
    columns = 12
    sheet = Image.new("RGB", (columns * SIDE, max(1, -(-len(chosen) // columns)) * SIDE), "white")
    for place, path in enumerate(chosen):
        with Image.open(folder / path) as image:
            small = image.convert("RGB")
            small.thumbnail((SIDE, SIDE))
            sheet.paste(small, (place % columns * SIDE, place // columns * SIDE))
    kept = io.BytesIO()
    sheet.save(kept, format="JPEG", quality=85)
    return base64.b64encode(kept.getvalue()).decode()
