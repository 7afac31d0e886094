"""Writes a report: rows as JSON, Markdown, one self-contained HTML page, plots, and a table for the terminal."""

from daekit.report.contents import Report, Row, Sample, read_rows
from daekit.report.tables import format_report, format_table
from daekit.report.write import write_report

__all__ = ["Report", "Row", "Sample", "format_report", "format_table", "read_rows", "write_report"]
