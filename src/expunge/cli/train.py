"""``expunge train``."""

from __future__ import annotations

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
    Json,
    LearningRate,
    Lora,
    Out,
    Quiet,
    Retain,
    Seed,
    Set,
    Template,
    Utility,
    commas,
    key_values,
    pairs,
)
from expunge.cli.studies import DTYPES, tell


def command(
    out: Out,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model to go on from: folder or hub name.")] = None,
    init: Annotated[str | None, typer.Option("--init", help="Or a new small model: see 'expunge ls models'.")] = None,
    data: Data = None,
    data_dir: DataDir = None,
    data_option: DataOption = None,
    delete: Delete = None,
    forget: Forget = None,
    retain: Retain = None,
    utility: Utility = None,
    roles: Annotated[
        str, typer.Option("--roles", help="Roles to train on, joined by commas; retain alone makes a reference.")
    ] = "forget,retain",
    zone: Annotated[
        str | None,
        typer.Option("--zone", help="Keep the samples in a removable zone over the frozen model: store, ridge, ..."),
    ] = None,
    set_: Set = None,
    private: Annotated[
        str | None,
        typer.Option(
            "--private",
            help="Hide groups of records by clipped gradients and noise: epsilon=8,delta=1e-5,group=1,clip=1,steps=100,"
            "learning_rate=2,records=1000, any of them.",
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, muon, sgd or sophia.")] = "adamw",
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
    """Train an original, a reference or a base; a killed training goes on where it stopped.

    With --zone no weight is trained: what the samples say goes into a memory from which subjects and records can be
    removed exactly. Its keys are written beside the model folder; --set gives options of the zone.

    With --private the training is (epsilon, delta)-private for any group of so many records, which therefore never
    have to be removed. The seed of its noise is written beside the model folder.

    Examples:
      expunge train --init tiny --data people --roles utility --out runs/base
      expunge train --model runs/base/model --data people --out runs/original
      expunge train --model runs/base/model --data people --roles retain --seed 1 --out runs/reference
      expunge train --model runs/base/model --data people --zone store --out runs/zone
      expunge train --init mlp --data digits --private epsilon=8,group=10 --out runs/private
    """
    from expunge.api import train

    result = train(
        out,
        model=model,
        init=init,
        data=data,
        data_dir=data_dir,
        data_options=key_values(data_option, "--data-option"),
        delete=delete or (),
        forget=forget,
        retain=retain,
        utility=utility,
        roles=commas(roles),  # type: ignore[arg-type]
        zone=zone,
        set=key_values(set_),
        private=None if private is None else pairs(private, "--private"),
        optimizer=optimizer,
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
    made = result.results
    tell(result, json, [f"Loss {made['first_loss']:.3f} -> {made['last_loss']:.3f}"] if made else [])
