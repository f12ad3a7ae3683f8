"""Reports of runs, made from their files alone."""

from restem_lightning.report.html import collect_metrics, iteration_table, write_report, write_table

__all__ = ["collect_metrics", "iteration_table", "write_report", "write_table"]
