"""``expunge completeness``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.common import Json, emit

if TYPE_CHECKING:
    from expunge.completeness.run import Answer

SHOWN = ("id", "score", "completeness", "verdict")


def command(
    signals: Annotated[
        Path,
        typer.Option(
            "--signals", "-s", help="Table id,unlearned,original,shadow[,shadow_2,...][,subject][,label]: CSV or like."
        ),
    ],
    form: Annotated[
        str, typer.Option("--form", "-f", help="text: loss in nats per token; classifier: true-label probability.")
    ],
    parity: Annotated[bool, typer.Option("--parity", help="IAM's published score, without verdicts.")] = False,
    holdout: Annotated[
        Path | None, typer.Option("--holdout", help="The same table for samples that no model was trained on.")
    ] = None,
    anchor: Annotated[
        float | None,
        typer.Option("--anchor", help="Typical reading of trained samples, where the original cannot be asked."),
    ] = None,
    level: Annotated[
        float, typer.Option("--level", help="Share of truly forgotten samples that may be called under-unlearned.")
    ] = 0.05,
    fdr: Annotated[float, typer.Option("--fdr", help="False discovery rate among the calls.")] = 0.05,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=0, help="With --parity: rows pooled together; 0 for all, 64 for text if none."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder for table, results and figure.")] = None,
    json: Json = False,
) -> None:
    """Say for each sample of a table of readings whether it is gone, with calibrated verdicts.

    Labels, where given, are 1 for a sample that is still a member and 0 for one that is not.

    Examples:
      expunge completeness --signals table.csv --form text
      expunge completeness --signals table.csv --form classifier --holdout unseen.csv --out runs/completeness
      expunge completeness --signals table.csv --form text --parity --json
    """
    from typing import cast

    from expunge.completeness.readings import Form
    from expunge.completeness.run import completeness

    answer = completeness(
        signals,
        cast(Form, form),
        parity=parity,
        holdout=holdout,
        anchor=anchor,
        level=level,
        fdr=fdr,
        batch_size=batch_size,
        out=out,
    )
    if json:
        emit(answer.record(), "", True)
        return
    for note in answer.notes:
        print(f"note: {note}", file=sys.stderr)
    emit(None, rows(answer), False)


def rows(answer: Answer) -> str:
    """One line per sample in aligned columns, an empty line, and the summary."""
    names = [name for name in SHOWN if name in answer.columns]
    cells = []
    for name in names:
        values = answer.columns[name]
        texts = [f"{x:.4f}" if isinstance(x, float) else str(x) for x in values]
        width = max(map(len, [name, *texts]))
        cells.append([f"{text:<{width}}" for text in [name, *texts]])
    lines = ["  ".join(line).rstrip() for line in zip(*cells, strict=True)]
    folder = [f"written to {answer.folder}."] if answer.folder else []
    return "\n".join([*lines, "", *answer.lines(), *folder])
