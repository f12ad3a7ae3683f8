"""Reports of runs, made from their metrics.json and funnel.json alone."""

from restem_lightning.report.html import collect_metrics, iteration_table, write_report

__all__ = ["collect_metrics", "iteration_table", "write_report"]
