"""The report of a run: results.md, report.html and figures, from the records in its folder alone."""

from __future__ import annotations

from expunge.report.audit_schema import AUDIT_SCHEMA, Audit, audit_schema, load_audit
from expunge.report.schema import SCHEMA, Results, load_results, parse_results, results_schema
from expunge.report.write import write_report

__all__ = [
    "AUDIT_SCHEMA",
    "SCHEMA",
    "Audit",
    "Results",
    "audit_schema",
    "load_audit",
    "load_results",
    "parse_results",
    "results_schema",
    "write_report",
]
