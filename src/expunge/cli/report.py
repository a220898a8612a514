"""``expunge report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import Json, emit


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    json: Json = False,
) -> None:
    """Rebuild results.md and report.html of run folders from the per-sample record.

    Example:
      expunge report runs/people
    """
    from expunge.report import write_report

    pages = [str(write_report(folder)) for folder in runs]
    emit({"reports": pages}, "\n".join(pages), json)
