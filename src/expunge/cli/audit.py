"""``expunge audit``."""

from __future__ import annotations

from typing import Annotated

import typer

from expunge.cli.common import (
    Data,
    DataDir,
    DataOption,
    DataSeed,
    Delete,
    Device,
    DryRun,
    Dtype,
    Forget,
    Holdout,
    Json,
    Model,
    Original,
    Out,
    Quiet,
    Reference,
    Retain,
    Seed,
    Template,
    Utility,
    key_values,
)
from expunge.cli.studies import DTYPES, audit_lines, tell


def command(
    model: Model,
    out: Out,
    original: Original = None,
    reference: Reference = None,
    forget: Forget = None,
    retain: Retain = None,
    holdout: Holdout = None,
    utility: Utility = None,
    data: Data = None,
    data_dir: DataDir = None,
    data_option: DataOption = None,
    delete: Delete = None,
    shadow: Annotated[
        list[str] | None,
        typer.Option("--shadow", metavar="FOLDER", help="Model that never saw the target set; repeat for more."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The model from before the data was learnt.")] = None,
    suite: Annotated[
        str, typer.Option("--suite", help="quick (minutes), standard or full; --dry-run tells the cost.")
    ] = "standard",
    attacks: Annotated[
        str,
        typer.Option("--attacks", help="These instead of the suite's: 'loss,recall:shots=5;seed=1'. See ls attacks."),
    ] = "",
    level: Annotated[float, typer.Option("--level", help="Level of the test of what is auditable.")] = 0.05,
    fdr: Annotated[float, typer.Option("--fdr", help="Share of wrong calls allowed among called samples.")] = 0.05,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="WHAT",
            help="Exit with 1 if it fails: effectiveness, privacy, robustness, utility, under, over or any; repeat.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    template: Template = None,
    seed: Seed = 0,
    data_seed: DataSeed = 0,
    json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> int:
    """Attack a model beside its original, retrained references and shadows, and say for each sample if it is gone.

    Nothing is trained but the copies that the attacks need. Exit code 1 when something named by --fail-on came true.

    Examples:
      expunge audit --model runs/erase-17/model --original ./my-model --forget f.jsonl --holdout h.jsonl --out runs/a17
      expunge audit -m runs/e/model --original runs/o/model --reference runs/r/model --data people -o runs/audit
    """
    from expunge.api import audit

    result = audit(
        model,
        out,
        data=data,
        data_dir=data_dir,
        data_options=key_values(data_option, "--data-option"),
        delete=delete or (),
        forget=forget,
        retain=retain,
        holdout=holdout,
        utility=utility,
        original=original,
        references=reference or (),
        shadows=shadow or (),
        base=base,
        suite=suite,
        attacks=attacks,
        level=level,
        fdr=fdr,
        fail_on=fail_on or (),
        device=device,
        dtype=DTYPES.get(dtype, dtype),
        template=template or "auto",
        seed=seed,
        data_seed=data_seed,
        quiet=quiet,
        dry_run=dry_run,
    )
    tell(result, json, audit_lines(result))
    return 1 if result.failures else 0
