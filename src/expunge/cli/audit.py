"""``expunge audit``."""

from __future__ import annotations

from typing import Annotated

import typer

from expunge.cli.common import (
    Data,
    DataDir,
    DataOption,
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
from expunge.cli.studies import DTYPES, tell


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
    suite: Annotated[str, typer.Option("--suite", help="What to measure: quick, standard or full.")] = "standard",
    device: Device = "auto",
    dtype: Dtype = "fp32",
    template: Template = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> None:
    """Measure a model against its original and retrained references.

    Nothing is trained but the copies that the attacks need.

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
        suite=suite,
        device=device,
        dtype=DTYPES.get(dtype, dtype),
        template=template or "auto",
        seed=seed,
        quiet=quiet,
        dry_run=dry_run,
    )
    tell(result, json)
