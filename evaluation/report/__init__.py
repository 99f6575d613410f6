"""Turn the JSON that a benchmark writes into things people read: an HTML report, pictures, a terminal table."""

from evaluation.report.curves import sweep_curves
from evaluation.report.figures import decision_map, quality_speed_curve
from evaluation.report.frontier import frontier, frontiers
from evaluation.report.html import write_report
from evaluation.report.sheet import comparison_sheet
from evaluation.report.table import frontier_table, results_table

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
