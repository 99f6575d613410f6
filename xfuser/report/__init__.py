"""Turn the JSON that a benchmark writes into things people read: an HTML report, pictures, a terminal table."""

from xfuser.report.curves import sweep_curves
from xfuser.report.figures import decision_map, quality_speed_curve
from xfuser.report.frontier import frontier, frontiers
from xfuser.report.html import write_report
from xfuser.report.sheet import comparison_sheet
from xfuser.report.table import frontier_table, results_table

__all__ = [
    "comparison_sheet",
    "decision_map",
    "frontier",
    "frontier_table",
    "frontiers",
    "quality_speed_curve",
    "results_table",
    "sweep_curves",
    "write_report",
]
