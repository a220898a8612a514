"""The report of a run: results.md, report.html and figures from results.json and samples.jsonl alone."""

from __future__ import annotations

from expunge.report.schema import SCHEMA, Results, load_results, parse_results, results_schema
from expunge.report.write import write_report

__all__ = ["SCHEMA", "Results", "load_results", "parse_results", "results_schema", "write_report"]
