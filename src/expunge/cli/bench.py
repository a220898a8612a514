"""``expunge bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from expunge.cli.common import (
    BatchSize,
    DataDir,
    DataOption,
    Delete,
    Device,
    DryRun,
    Dtype,
    Epochs,
    Forget,
    Holdout,
    Json,
    LearningRate,
    Out,
    Quiet,
    Retain,
    Template,
    Utility,
    commas,
    key_values,
)
from expunge.cli.studies import DTYPES, tell
from expunge.errors import UserError


def command(
    out: Out,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base, which knows nothing of the private data.")
    ] = None,
    init: Annotated[
        str | None, typer.Option("--init", help="Or a new small base, trained on the utility role: tiny, small …")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Dataset by name; see 'expunge ls datasets'.")
    ] = None,
    data_dir: DataDir = None,
    data_option: DataOption = None,
    delete: Delete = None,
    forget: Forget = None,
    retain: Retain = None,
    holdout: Holdout = None,
    utility: Utility = None,
    methods: Annotated[
        str, typer.Option("--methods", help="all, or a comma list with settings: 'cluster,npo:beta=0.05;retain=kl'.")
    ] = "all",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Originals; every method runs once from each.")] = 3,
    references: Annotated[int, typer.Option("--references", min=1, help="Retrained models to compare with.")] = 3,
    tune: Annotated[int, typer.Option("--tune", min=0, help="Trials per method on validation subjects.")] = 0,
    sequential: Annotated[int, typer.Option("--sequential", min=0, help="Requests one after another.")] = 0,
    size_impact: Annotated[
        str | None, typer.Option("--size-impact", help="Numbers of forget samples: 10,50,100.")
    ] = None,
    matched: Annotated[
        int,
        typer.Option(
            "--matched",
            metavar="PERCENT",
            min=0,
            max=100,
            help="At equal utility too: each edit as far as retain keeps so much of the original's probability.",
        ),
    ] = 0,
    blind: Annotated[bool, typer.Option("--blind", help="Do not give the base to the methods.")] = False,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the unlearned models.")] = False,
    validate_metrics: Annotated[
        bool, typer.Option("--validate-metrics", help="Test the measures instead: how far can each be trusted?")
    ] = False,
    population: Annotated[
        int | None, typer.Option("--population", min=2, help="Models with and without the knowledge, each.")
    ] = None,
    suite: Annotated[str, typer.Option("--suite", help="What to measure: quick, standard or full.")] = "standard",
    base_epochs: Annotated[float, typer.Option("--base-epochs", help="Passes that make the base of --init.")] = 24.0,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    template: Template = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of generated data.", min=0)] = 0,
    json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> None:
    """Compare methods over seeds with retrained references: who comes closest, at what cost.

    --model is the base: originals are trained from it on forget and retain, references on retain alone, with
    --epochs, --learning-rate and --batch-size. Original, references, identity and a random edit are always among
    the rows. Running the same command again goes on where it stopped.

    --validate-metrics trains --population models with the knowledge and as many without, and says of every metric,
    of every attack of the suite and of completeness how well it tells the two apart (faithfulness) and whether
    relearning or quantization shows that it was wrong (robustness). Without --data it uses people and --init tiny.

    Examples:
      expunge bench --data people --init tiny --methods all --seeds 3 --out runs/people
      expunge bench --data tofu --data-dir ./tofu --model ./my-base --methods cluster,npo --seeds 2 --out runs/tofu
      expunge bench --validate-metrics --suite quick --out runs/trust
      expunge bench --data people --init tiny --methods cluster,graddiff --sequential 3 --size-impact 10,40 --out runs/s
    """
    from expunge.api import bench

    result = bench(
        out,
        model=model,
        init=init,
        data=data,
        data_dir=data_dir,
        data_options=key_values(data_option, "--data-option"),
        delete=delete or (),
        forget=forget,
        retain=retain,
        holdout=holdout,
        utility=utility,
        methods=methods,
        seeds=seeds,
        references=references,
        tune=tune,
        sequential=sequential,
        size_impact=numbers(size_impact),
        matched=matched,
        blind=blind,
        keep_models=keep_models,
        validate_metrics=validate_metrics,
        population=population,
        suite=suite,
        base_epochs=base_epochs,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        device=device,
        dtype=DTYPES.get(dtype, dtype),
        template=template or "auto",
        seed=seed,
        quiet=quiet,
        dry_run=dry_run,
    )
    more: list[str] = []
    if validate_metrics and result.plan is None:
        from expunge.bench.trust_report import headline

        more = [headline(result.results["rows"])]
    tell(result, json, more)


def numbers(text: str | None) -> list[int]:
    """``"10,50"`` as numbers.

    Raises:
        UserError: something is not a number.
    """
    found = []
    for item in commas(text):
        if not item.isdecimal():
            raise UserError(f"--size-impact '{item}' is not a number of samples: write for example 10,50,100.")
        found.append(int(item))
    return found
