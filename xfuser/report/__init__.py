"""Turn the JSON that a benchmark writes into things people read: an HTML report, pictures, a terminal table."""

from xfuser.report.figures import decision_map, quality_speed_curve
from xfuser.report.html import write_report
from xfuser.report.sheet import comparison_sheet
from xfuser.report.table import results_table

__all__ = ["comparison_sheet", "decision_map", "quality_speed_curve", "results_table", "write_report"]
