"""A page that tells what a run has done, or how several runs compare, in one file that needs no network."""

from agsel.report.page import require_place, write_report
from agsel.runs.folder import REPORT

__all__ = ["REPORT", "require_place", "write_report"]
