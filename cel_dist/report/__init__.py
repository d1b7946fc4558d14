"""The report of a run, or of several beside each other: one HTML file without outside resources."""

from cel_dist.report.comparison import write_comparison
from cel_dist.report.page import PLOTS, write_report

__all__ = ["PLOTS", "write_comparison", "write_report"]
