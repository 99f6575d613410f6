"""The benchmark's report as a single HTML file that needs neither network nor script."""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np

from evaluation.report.columns import COMPARISON_COLUMNS, RESULT_COLUMNS, psnr_verdict
from evaluation.report.curves import sweep_curves
from evaluation.report.figures import decision_map, quality_speed_curve, trace_arrays
from evaluation.report.settings import split_settings
from evaluation.report.sheet import draw_sheet
from evaluation.report.table import frontier_rows
from evaluation.report.trajectory import trajectory_panel
from xfuser.core.files import write_text

_SCHEMA = 1


def write_report(
    path: str | os.PathLike[str],
    document: Mapping[str, Any],
    images: Mapping[str, Sequence[np.ndarray]],
    traces: Mapping[str, Mapping[str, Any]],
    trajectories: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the whole report to ``path``, replacing what is there only once the new file is complete.

    Args:
        path: Where the HTML goes; missing folders are made.
        document: The benchmark's JSON document (schema 1).
        images: For each method its sample images, arrays ``[H, W, C]`` of floats in [0, 1] with C = 1 or 3. May be
            empty: the report then has no comparison sheet. Where a row names its ``images``, files relative to the
            report, the sheet links to them.
        traces: For each corrected method the record of one run, as for
            :func:`evaluation.report.figures.decision_map`. May be empty.
        trajectories: For each method on the trajectory its record, as for
            :func:`evaluation.report.trajectory.trajectory_panel`.

    Raises:
        ValueError: The document's schema is not 1, or an image or a trace has the wrong shape.
        KeyError: The document lacks ``results``, or a row or trace lacks a field that it must have.
        OSError: The file cannot be written.
    """
    if document.get("schema") != _SCHEMA:
        raise ValueError(f"the report reads documents of schema {_SCHEMA}, this one has {document.get('schema')!r}")
    source = resources.files(__package__).joinpath("template.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(source).render(_context(document, images, traces, trajectories or {}))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def _context(
    document: Mapping[str, Any],
    images: Mapping[str, Sequence[np.ndarray]],
    traces: Mapping[str, Mapping[str, Any]],
    trajectories: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    model, sweep = document.get("model") or {}, document.get("sweep")
    shared, own = split_settings(document["results"])
    facts = [(title, _pairs(document.get(title.lower()) or {})) for title in ("Model", "Settings")]
    facts += [("Settings of every cache", _pairs(shared)), ("Environment", _pairs(document.get("environment") or {}))]
    return {
        "title": f"Caching benchmark: {model['name']}" if model.get("name") else "Caching benchmark",
        "facts": [(title, pairs) for title, pairs in facts if pairs],
        "columns": RESULT_COLUMNS,
        "rows": [
            {
                "method": row["method"],
                "settings": ", ".join(f"{name}={value}" for name, value in _pairs(settings)),
                "inactive": row.get("inactive"),
                "cells": [column.cell(row) for column in RESULT_COLUMNS],
            }
            for row, settings in zip(document["results"], own, strict=True)
        ],
        "failures": document.get("failures") or {},
        "comparison_columns": COMPARISON_COLUMNS,
        "comparisons": [
            {
                "method": row["method"],
                "against": row["against"],
                "cells": [column.cell(row) for column in COMPARISON_COLUMNS],
                "verdict": psnr_verdict(row),
            }
            for row in document.get("comparisons") or []
        ],
        "sheet": _sheet(images, document["results"]) if images else None,
        "curve": None if sweep else _data_uri(quality_speed_curve(document["results"])),
        "sweep": _data_uri(sweep_curves(document["results"], sweep)) if sweep else None,
        "frontier": [
            {"method": row["method"], "cells": [column.cell(row) for column in RESULT_COLUMNS], "speeds": speeds}
            for row, speeds in (frontier_rows(document) if sweep else [])
        ],
        "left_out": list(dict.fromkeys(sweep["left_out"].values())) if sweep else [],
        "maps": [
            {"method": method, "caption": _caption(trace), "picture": _data_uri(decision_map(trace))}
            for method, trace in traces.items()
        ],
        "trajectories": [
            {"method": method, "picture": _data_uri(trajectory_panel(record))}
            for method, record in trajectories.items()
        ],
    }


def _pairs(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), _said(value)) for name, value in mapping.items()]


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "; ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _sheet(images: Mapping[str, Sequence[np.ndarray]], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sheet as a picture, and links over its tiles to the files of the images, in percent of its sides."""
    sheet = draw_sheet(images)
    files = {row["method"]: row.get("images") or [] for row in results}
    width, height = sheet.picture.size
    buffer = io.BytesIO()
    sheet.picture.save(buffer, format="PNG", optimize=True)
    return {
        "picture": _data_uri(buffer.getvalue()),
        "width": width,
        "links": [
            {
                "file": quote(Path(file).as_posix()),
                "title": f"{method}, image {index}",
                "left": f"{100 * left / width:.3f}",
                "top": f"{100 * top / height:.3f}",
                "width": f"{100 * wide / width:.3f}",
                "height": f"{100 * high / height:.3f}",
            }
            for method, places in sheet.places.items()
            for index, ((left, top, wide, high), file) in enumerate(zip(places, files.get(method, []), strict=False))
        ],
    }


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _caption(trace: Mapping[str, Any]) -> str:
    """One line that says how often blocks were evaluated and how far the predictions were off."""
    fields = trace_arrays(trace)
    steps, blocks = fields["evaluated"].shape
    text = f"{100 * fields['evaluated'].mean():.0f}% of {steps} steps × {blocks} blocks were evaluated"
    predicted, true = fields["predicted"], fields["true"]
    both = np.isfinite(predicted) & np.isfinite(true) & (predicted > 0) & (true > 0)
    if not both.any():
        return f"{text}; no evaluation had a prediction to check."
    ratio = float(np.median(predicted[both] / true[both]))
    return f"{text}; the median ratio of predicted to true error over {both.sum()} checked evaluations is {ratio:.2f}."
