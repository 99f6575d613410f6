"""The benchmark's results as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from xfuser.report.columns import RESULT_COLUMNS, Cell


def results_table(document: Mapping[str, Any]) -> Table:
    """Lay out the results of a benchmark for a terminal of at least 140 columns.

    Each method takes two lines: the values, and under them, dimmed, the ends of their intervals. Fields that were not
    measured are dashes.

    Args:
        document: The benchmark's JSON document (schema 1).

    Returns:
        A table to pass to ``rich.console.Console.print``.

    Raises:
        KeyError: The document has no ``results`` or a row has no ``method``.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("Method", overflow="fold", max_width=30)
    for column in RESULT_COLUMNS:
        words = column.title.split(" ", 1)
        table.add_column(Text("\n".join(words)), justify="right", no_wrap=True)
    for row in document["results"]:
        # A plain string would be read as console markup, and "Tea[taylor-1]" would lose its brackets.
        table.add_row(Text(row["method"]), *(_stacked(column.cell(row)) for column in RESULT_COLUMNS))
    return table


def _stacked(cell: Cell) -> Text:
    """Put the interval below the value: side by side, six intervals would not fit."""
    text = Text(cell.value)
    if cell.low is not None and cell.high is not None:
        text.append(f"\n{_bare(cell.low)}..{_bare(cell.high)}", style="dim")
    return text


def _bare(number: str) -> str:
    return number.rstrip("%×")
