"""``expunge report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import Json, emit


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Put the runs together: one report of all of them, in this folder."),
    ] = None,
    json: Json = False,
) -> None:
    """Rebuild results.md and report.html of run folders from the per-sample record.

    With --out the runs, all of one data set, become one table: methods side by side, means and intervals over the seeds
    of all runs. A run that repeats another adds seeds; one that measured other methods on the same models adds rows.

    Examples:
      expunge report runs/people
      expunge report runs/first runs/second --out runs/both
    """
    from expunge.report import write_report
    from expunge.report.merge import merge_runs

    folders = runs if out is None else [merge_runs(runs, out)]
    pages = [str(write_report(folder)) for folder in folders]
    emit({"reports": pages}, "\n".join(pages), json)
