"""A page that tells what a run has done, or how several runs compare, in one file that needs no network."""

from agsel.report.page import REPORT, write_report

__all__ = ["REPORT", "write_report"]
