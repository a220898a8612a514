"""``expunge unlearn``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.common import (
    BatchSize,
    Data,
    DataDir,
    DataOption,
    DataSeed,
    Delete,
    Device,
    DryRun,
    Dtype,
    Epochs,
    Forget,
    Holdout,
    Json,
    LearningRate,
    Lora,
    Model,
    Out,
    Quiet,
    Reference,
    Retain,
    Seed,
    Set,
    Template,
    Utility,
    function_of,
    key_values,
    pairs,
)
from expunge.cli.studies import DTYPES, tell


def command(
    model: Model,
    out: Out,
    forget: Forget = None,
    retain: Retain = None,
    holdout: Holdout = None,
    utility: Utility = None,
    earlier: Annotated[
        Path | None, typer.Option("--earlier", help="File of samples that earlier requests erased: kept erased.")
    ] = None,
    data: Data = None,
    data_dir: DataDir = None,
    data_option: DataOption = None,
    delete: Delete = None,
    method: Annotated[str, typer.Option("--method", help="Method; see 'expunge ls methods'.")] = "cluster",
    set_: Set = None,
    scope: Annotated[
        str, typer.Option("--scope", help="Which weights may move: all, or a selector; see 'expunge ls scopes'.")
    ] = "all",
    through: Annotated[
        str,
        typer.Option("--through", help="Forget samples that the method is shown: all, or those with image or text."),
    ] = "all",
    then: Annotated[
        list[str] | None,
        typer.Option("--then", metavar="METHOD[:KEY=VALUE;...]", help="A method to run afterwards; repeat for more."),
    ] = None,
    llm: Annotated[
        str | None, typer.Option("--llm", metavar="FILE.py:NAME", help="A function prompt -> text, where one is used.")
    ] = None,
    keep_helpers: Annotated[
        Path | None,
        typer.Option("--keep-helpers", help="Folder to keep helper models in, which hold private data."),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="adamw, muon, sgd or sophia; the method's own if none.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The model from before the private data was learnt, if it was kept.")
    ] = None,
    reference: Reference = None,
    suite: Annotated[str, typer.Option("--suite", help="What to measure: none, quick, standard or full.")] = "standard",
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    lora: Lora = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    template: Template = None,
    seed: Seed = 0,
    data_seed: DataSeed = 0,
    json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> None:
    """Make a model forget samples; the unlearned model, its measurement and a report go to --out.

    The forget file holds one JSON object per line with 'prompt' and 'target', or 'text' for a document. The retain
    file has samples of the same training set that must stay; the holdout file has samples of the same kind that no
    model was trained on, and lets the edit be calibrated and membership be measured.

    Examples:
      expunge unlearn --model ./my-model --forget forget.jsonl --retain retain.jsonl --out runs/erase-17
      expunge unlearn -m ./my-model --base ./before --forget f.jsonl --retain r.jsonl --holdout h.jsonl -o runs/e18
      expunge unlearn -m ./my-model --forget f.jsonl --retain r.jsonl --method npo --set beta=0.05 -o runs/npo
      expunge unlearn -m ./my-model --forget f.jsonl --retain r.jsonl --method npo --then task-vector -o runs/npo-2
    """
    from expunge.api import unlearn

    result = unlearn(
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
        earlier=earlier,
        method=method,
        set=key_values(set_),
        scope=scope,
        through=through,
        then=then or (),
        llm=None if llm is None else function_of(llm, "--llm"),
        keep_helpers=keep_helpers,
        optimizer=optimizer,
        base=base,
        references=reference or (),
        suite=suite,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        lora=pairs(lora, "--lora") if lora is not None else None,
        device=device,
        dtype=DTYPES.get(dtype, dtype),
        template=template or "auto",
        seed=seed,
        data_seed=data_seed,
        quiet=quiet,
        dry_run=dry_run,
    )
    tell(result, json)
