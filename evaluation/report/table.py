"""The benchmark's results as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from evaluation.report.columns import RESULT_COLUMNS, Cell

WIDE = 130
FRONTIER_COLUMNS = ("speedup", "flops_saved", "psnr", "fid_vs_uncached", "fid")
NARROW_COLUMNS = ("speedup", "images_per_second", "hit_rate", "psnr", "fid_vs_uncached")


def results_table(document: Mapping[str, Any], width: int = 140) -> Table:
    """Lay out the results of a benchmark for a terminal; one of fewer than 130 columns gets the most telling fields.

    Each method takes two lines: the values, and under them, dimmed, the ends of their intervals. Fields that were not
    measured are dashes; a cache that never hit is marked under its name.

    Args:
        document: The benchmark's JSON document (schema 1).
        width: Columns of the terminal.

    Returns:
        A table to pass to ``rich.console.Console.print``.

    Raises:
        KeyError: The document has no ``results`` or a row has no ``method``.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("Method", no_wrap=True)
    columns = [column for column in RESULT_COLUMNS if width >= WIDE or column.key in NARROW_COLUMNS]
    for column in columns:
        words = column.title.split(" ", 1)
        table.add_column(Text("\n".join(words)), justify="right", no_wrap=True)
    for row in document["results"]:
        # A plain string would be read as console markup, and "Tea[taylor-1]" would lose its brackets.
        name = Text(row["method"])
        if row.get("inactive"):
            name.append("\ninactive", style="dim")
        table.add_row(name, *(_stacked(column.cell(row)) for column in columns))
    return table


def frontier_table(document: Mapping[str, Any]) -> Table:
    """The rows of a sweep that no other one beats in both speed and PSNR, fastest first.

    Args:
        document: The benchmark's JSON document (schema 1), with a ``sweep``.

    Returns:
        A table to pass to ``rich.console.Console.print``. A row may be on the frontier by its measured speed, by the
        FLOPs it saved, or by both.
    """
    table = Table(title="Quality-speed frontier", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("Method", no_wrap=True)
    columns = [column for column in RESULT_COLUMNS if column.key in FRONTIER_COLUMNS]
    for column in columns:
        table.add_column(column.title, justify="right")
    table.add_column("On it by")
    for row, speeds in frontier_rows(document):
        cells = [column.cell(row) for column in columns]
        table.add_row(Text(row["method"]), *(Text(cell.value) for cell in cells), speeds)
    return table


def frontier_rows(document: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """The rows on a sweep's frontiers, fastest first, each with what makes it fast there."""
    frontier = document["sweep"]["frontier"]
    names = {"speedup": "time", "flops_saved": "FLOPs"}
    rows = sorted(document["results"], key=lambda row: -row["speedup"])
    told = [(row, [name for key, name in names.items() if row["method"] in frontier[key]]) for row in rows]
    return [(row, " and ".join(speeds)) for row, speeds in told if speeds]


def _stacked(cell: Cell) -> Text:
    """Put the interval below the value: side by side, six intervals would not fit."""
    text = Text(cell.value)
    if cell.low is not None and cell.high is not None:
        text.append(f"\n{_bare(cell.low)}..{_bare(cell.high)}", style="dim")
    return text


def _bare(number: str) -> str:
    return number.rstrip("%×")
