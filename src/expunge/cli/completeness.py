"""``expunge completeness``."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from expunge.cli.common import DataDir, DataOption, Json, Quiet, Seed, emit, key_values, progress, table
from expunge.errors import UserError

if TYPE_CHECKING:
    from expunge.completeness.readings import Form
    from expunge.completeness.run import Answer

SHOWN = ("id", "score", "completeness", "verdict")


def command(
    signals: Annotated[
        Path | None,
        typer.Option(
            "--signals", "-s", help="Table id,unlearned,original,shadow[,shadow_2,...][,subject][,label]: CSV or like."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--form", "-f", help="text: loss in nats per token; classifier: true-label probability."),
    ] = None,
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
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="Judge the scores where the truth is known: binui, scoreui, approximate, ..."),
    ] = None,
    data: Annotated[str, typer.Option("--data", "-d", help="With --protocol: dataset by name.")] = "people",
    data_dir: DataDir = None,
    data_option: DataOption = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="With --protocol: the base that every model is trained from.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init", help="With --protocol: or a new small base: tiny-test, tiny or small; resnet, vit or mlp."
        ),
    ] = None,
    shadows: Annotated[
        int | None, typer.Option("--shadows", min=1, help="With --protocol: shadow models in each group.")
    ] = None,
    groups: Annotated[
        int | None, typer.Option("--groups", min=1, help="With --protocol: groups of shadows, for the intervals.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="With --protocol: a smaller form, under a minute.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="With --protocol: its option, e.g. targets=2; repeat for more."
        ),
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder for table, results and figure.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say for each sample of a table of readings whether it is gone, with calibrated verdicts.

    Labels, where given, are 1 for a sample that is still a member and 0 for one that is not. With --protocol it
    trains the models of an experiment whose truth is known, and compares all scores on it.

    Examples:
      expunge completeness --signals table.csv --form text
      expunge completeness --signals table.csv --form classifier --holdout unseen.csv --out runs/completeness
      expunge completeness --signals table.csv --form text --parity --json
      expunge completeness --protocol binui --data people --quick --out runs/protocols
      expunge completeness --protocol scoreui --data digits --shadows 4 --groups 6 --out runs/digits
      expunge completeness --protocol approximate --data digits --set methods=ssd,scrub --out runs/digits
    """
    if protocol is not None:
        if signals is not None or form is not None or out is None:
            raise UserError("--protocol makes its own models and needs --out: give it without --signals and --form.")
        from expunge.completeness.protocols import run_protocol

        results = run_protocol(
            protocol,
            out=out,
            data=data,
            data_dir=data_dir,
            data_options=key_values(data_option, "--data-option"),
            model=model,
            init=init,
            seed=seed,
            shadows=shadows,
            groups=groups,
            quick=quick,
            options=key_values(set_),
            progress=progress(quiet),
        )
        page = (out / protocol / "results.md").read_text(encoding="utf-8")
        emit(results, f"{aligned(page)}\nwritten to {out / protocol}.", json)
        return
    if signals is None or form is None:
        raise UserError("nothing to measure: give --signals TABLE and --form text or classifier, or --protocol NAME.")

    from expunge.completeness.run import completeness

    answer = completeness(
        signals,
        cast("Form", form),
        parity=parity,
        holdout=holdout,
        anchor=anchor,
        level=level,
        fdr=fdr,
        batch_size=batch_size,
        out=out,
    )
    if not (quiet or json):
        for note in answer.notes:
            print(f"note: {note}", file=sys.stderr)
    emit(answer.record() if json else None, "" if json else rows(answer), json)


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


def aligned(page: str) -> str:
    """The tables of a Markdown page with their columns aligned for a terminal; other lines as they are."""
    lines: list[str] = []
    for is_table, block in groupby(page.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block if line[:4] != "|---"]
            lines += table(cells).rstrip("\n").split("\n")
        else:
            lines += block
    return "\n".join(lines)
