"""Writes a report: rows as JSON, Markdown, one self-contained HTML page, plots, and a table for the terminal."""

from daekit.report.contents import Report, Row, Sample
from daekit.report.tables import format_table
from daekit.report.write import write_report

__all__ = ["Report", "Row", "Sample", "format_table", "write_report"]
