"""The verbs as Python functions, with the names of the command line's options.

``import expunge; expunge.unlearn(model="./my-model", forget="f.jsonl", retain="r.jsonl", out="runs/erase-17")``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from expunge.bench.audit import AuditOptions, audit_models, failures
from expunge.bench.evaluate import EvaluateOptions
from expunge.bench.plan import (
    SCOPE,
    THROUGH,
    StudyOptions,
    check_study,
    entry_of,
    everything,
    parse_method,
    parse_methods,
)
from expunge.bench.prepare import Workshop, check_preset, start_model
from expunge.bench.single import (
    Request,
    check_roles,
    check_room,
    say_truncated,
    train_model,
    unlearn_model,
)
from expunge.bench.study import Study
from expunge.bench.validation import DATA, METHODS, ValidationOptions, validate
from expunge.bench.zones import check_zone, train_zone
from expunge.certify import issue as _issue
from expunge.certify import signing as _signing
from expunge.certify import verify as _verify
from expunge.completeness import run as _completeness
from expunge.data.samples import Dataset, Role
from expunge.errors import UserError
from expunge.opening import Result, Text, check_models, finished, numbered, open_run, shown
from expunge.options import configure
from expunge.runs import read_config
from expunge.training.loop import TrainOptions
from expunge.training.private import PrivateOptions

completeness = _completeness.completeness
certify, verify, keygen = _issue.certify, _verify.verify, _signing.keygen


def unlearn(
    model: Text,
    out: Text,
    *,
    forget: Text | None = None,
    retain: Text | None = None,
    holdout: Text | None = None,
    utility: Text | None = None,
    earlier: Text | None = None,
    data: str | None = None,
    data_dir: Text | None = None,
    data_options: Mapping[str, Any] | None = None,
    delete: Sequence[str] = (),
    method: str = "cluster",
    set: Mapping[str, Any] | None = None,
    scope: str = "all",
    through: str = "all",
    then: Sequence[str] = (),
    llm: Callable[[str], str] | None = None,
    keep_helpers: Text | None = None,
    optimizer: str | None = None,
    base: Text | None = None,
    references: Sequence[Text] = (),
    suite: str = "standard",
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    lora: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    template: str = "auto",
    context: int | None = None,
    seed: int = 0,
    data_seed: int = 0,
    quiet: bool = True,
    dry_run: bool = False,
) -> Result:
    """Make ``model`` forget the samples of ``forget`` (or of a dataset's forget role); see ``expunge unlearn --help``.

    Raises:
        UserError: one sentence for whatever is wrong with the input; nothing has been overwritten.
    """
    request = Request(
        data=data,
        data_dir=data_dir,
        data_options=data_options,
        delete=tuple(delete),
        forget=forget,
        retain=retain,
        holdout=holdout,
        utility=utility,
        earlier=earlier,
        lora=lora,
        device=device,
        dtype=dtype,
        template=template,
        context=context,
        seed=seed,
        data_seed=data_seed,
    )
    settings = {k: str(v) for k, v in (set or {}).items()}
    given = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "optimizer": optimizer}
    settings |= {key: str(value) for key, value in given.items() if value is not None}
    settings |= {k: v for k, v in ((SCOPE, scope), (THROUGH, through)) if v != "all"}
    label = ">".join([method, *then])
    entry = entry_of(label, method, settings, [parse_method(step) for step in then])
    options = StudyOptions(evaluate=EvaluateOptions(suite="quick" if suite == "none" else suite))
    options.evaluate.resolved()
    dataset = request.dataset()
    entry.forget(dataset["forget"])
    before_this = request.earlier_samples()
    estimate = check_room(str(model), Path(out), request, train=True, copies=1 + (base is not None))
    check_models(base, *references)
    folders = [str(r) for r in references]
    before = None if base is None else str(base)
    config = {"model": str(model), "base": before, "method": label, "set": settings, "references": folders}
    config |= {"suite": suite, **request.config()}
    if dry_run:
        return Result(Path(out), plan={"config": config, "estimate": estimate})
    with open_run(out, "unlearn", config, dataset, {"model": model, "base": base, **numbered(folders)}, [seed]) as run:
        if not run.done:
            unlearn_model(
                run,
                request,
                dataset,
                entry,
                options,
                model=str(model),
                base=before,
                references=folders,
                earlier=before_this,
                llm=llm,
                keep_helpers=None if keep_helpers is None else Path(keep_helpers),
                measured=suite != "none",
                progress=shown(quiet, run),
            )
        made = run.folder / "model"
        return finished(run, made) if suite != "none" else Result(run.folder, made)


def audit(
    model: Text,
    out: Text,
    *,
    original: Text | None = None,
    references: Sequence[Text] = (),
    shadows: Sequence[Text] = (),
    base: Text | None = None,
    forget: Text | None = None,
    retain: Text | None = None,
    holdout: Text | None = None,
    utility: Text | None = None,
    data: str | None = None,
    data_dir: Text | None = None,
    data_options: Mapping[str, Any] | None = None,
    delete: Sequence[str] = (),
    suite: str = "standard",
    attacks: str = "",
    level: float = 0.05,
    fdr: float = 0.05,
    fail_on: Sequence[str] = (),
    llm: Callable[[str], str] | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    template: str = "auto",
    context: int | None = None,
    seed: int = 0,
    data_seed: int = 0,
    quiet: bool = True,
    dry_run: bool = False,
) -> Result:
    """Measure and attack ``model`` beside its original, references and shadows; see ``expunge audit --help``.

    ``llm`` is a callable prompt -> text for attacks that translate or paraphrase. Which of ``fail_on`` came true
    stands in ``Result.failures``.

    Raises:
        UserError: see :func:`unlearn`.
    """
    request = Request(
        data=data,
        data_dir=data_dir,
        data_options=data_options,
        delete=tuple(delete),
        forget=forget,
        retain=retain,
        holdout=holdout,
        utility=utility,
        device=device,
        dtype=dtype,
        template=template,
        context=context,
        seed=seed,
        data_seed=data_seed,
    )
    options = AuditOptions(
        model=str(model),
        original=None if original is None else str(original),
        references=[str(r) for r in references],
        shadows=[str(s) for s in shadows],
        base=None if base is None else str(base),
        suite=suite,
        attacks=attacks,
        level=level,
        fdr=fdr,
        fail_on=tuple(fail_on),
        llm=llm,
    )
    dataset = request.dataset()
    estimate = check_room(str(model), Path(out), request, train=True, copies=1)
    check_models(original, base, *references, *shadows)
    config = {**options.config(), **request.config()}
    if dry_run:
        cost = f"{estimate}; {options.plan(None).estimate(options.num_models)}"
        return Result(Path(out), plan={"config": config, "estimate": cost})
    models = {"model": model, "original": original, "base": base, **numbered(options.references)}
    models |= {f"shadow-{i}": folder for i, folder in enumerate(options.shadows)}
    with open_run(out, "audit", config, dataset, models, [seed]) as run:
        if not run.done:
            audit_models(run, request, dataset, options, progress=shown(quiet, run))
        return replace(finished(run), failures=failures(run.read_json("audit.json"), fail_on))


def train(
    out: Text,
    *,
    model: Text | None = None,
    init: str | None = None,
    data: str | None = None,
    data_dir: Text | None = None,
    data_options: Mapping[str, Any] | None = None,
    delete: Sequence[str] = (),
    forget: Text | None = None,
    retain: Text | None = None,
    utility: Text | None = None,
    roles: Sequence[Role] = ("forget", "retain"),
    zone: str | None = None,
    set: Mapping[str, Any] | None = None,
    private: Mapping[str, Any] | None = None,
    optimizer: str = "adamw",
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    lora: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    template: str = "auto",
    context: int | None = None,
    seed: int = 0,
    data_seed: int = 0,
    quiet: bool = True,
    dry_run: bool = False,
) -> Result:
    """Train an original, a reference or a base, or put a zone over a base; see ``expunge train --help``.

    Raises:
        UserError: see :func:`unlearn`.
    """
    either(model, init)
    request = Request(
        data=data,
        data_dir=data_dir,
        data_options=data_options,
        delete=tuple(delete),
        forget=forget,
        retain=retain,
        utility=utility,
        lora=lora,
        device=device,
        dtype=dtype,
        template=template,
        context=context,
        seed=seed,
        data_seed=data_seed,
    )
    given = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "optimizer": optimizer}
    values = {k: v for k, v in given.items() if v is not None}
    hidden = None if private is None else configure(PrivateOptions, private, "option of --private")
    if hidden is not None and (zone is not None or values != {"optimizer": "adamw"}):
        raise UserError(
            "--private has steps and a learning rate of its own: write them into it, e.g. --private "
            "epsilon=8,steps=100,learning_rate=1, and leave --zone, --epochs, --batch-size, --learning-rate and "
            "--optimizer out."
        )
    values |= {"precision": "bf16"} if request.half else {}
    options = configure(TrainOptions, values, "option of train")
    dataset = request.dataset()
    check_roles(dataset, roles)
    check_preset(init, dataset.modality)
    if set and zone is None:
        raise UserError("--set gives options of a zone, and no --zone was named: add --zone store, or leave --set out.")
    if zone is not None:
        check_zone(dataset, roles, zone, set or {}, start=model)
    estimate = "a small new model"
    if model is not None:
        estimate = check_room(str(model), Path(out), request, train=True, copies=0)
    start = None if model is None else str(model)
    config = {"model": start, "init": init, "roles": list(roles), "training": values, **request.config()}
    if zone is not None:
        config |= {"zone": zone, "set": dict(set or {})}
    if hidden is not None:
        config |= {"private": asdict(hidden)}
    if dry_run:
        return Result(Path(out), plan={"config": config, "estimate": estimate})
    with open_run(out, "train", config, dataset, {"model": model}, [seed]) as run:
        if not run.done and zone is not None:
            train_zone(
                run, request, dataset, zone, set or {}, model=str(model), roles=roles, progress=shown(quiet, run)
            )
        elif not run.done:
            train_model(
                run, request, dataset, options, model=start, init=init, roles=roles, private=hidden,
                progress=shown(quiet, run),
            )  # fmt: skip
        return Result(run.folder, run.folder / "model", None, run.read_json("results.json"))


def bench(
    out: Text,
    *,
    model: Text | None = None,
    init: str | None = None,
    data: str | None = None,
    data_dir: Text | None = None,
    data_options: Mapping[str, Any] | None = None,
    delete: Sequence[str] = (),
    forget: Text | None = None,
    retain: Text | None = None,
    holdout: Text | None = None,
    utility: Text | None = None,
    methods: str = "all",
    seeds: int = 3,
    references: int = 3,
    tune: int = 0,
    sequential: int = 0,
    size_impact: Sequence[int] = (),
    matched: int = 0,
    blind: bool = False,
    keep_models: bool = False,
    validate_metrics: bool = False,
    population: int | None = None,
    suite: str = "standard",
    base_epochs: float = 24.0,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    template: str = "auto",
    context: int | None = None,
    seed: int = 0,
    quiet: bool = True,
    dry_run: bool = False,
    command: str = "bench",
) -> Result:
    """Compare methods over seeds with retrained references; see ``expunge bench --help``.

    Raises:
        UserError: see :func:`unlearn`.
    """
    if validate_metrics:
        methods = METHODS if methods == "all" else methods
        init = "tiny" if model is None and init is None else init
        if data is None and forget is None:
            data, data_options = "people", {**DATA, **(data_options or {})}
    either(model, init)
    request = Request(
        data=data,
        data_dir=data_dir,
        data_options=data_options,
        delete=tuple(delete),
        forget=forget,
        retain=retain,
        holdout=holdout,
        utility=utility,
        device=device,
        dtype=dtype,
        template=template,
        context=context,
        seed=seed,
        data_seed=seed,
    )
    entries = parse_methods(methods)
    given = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    options = StudyOptions(
        seeds=seeds,
        references=references,
        base_epochs=base_epochs,
        blind=blind,
        sequential=sequential,
        size_impact=tuple(size_impact),
        matched=matched,
        tune=tune,
        keep_models=keep_models,
        precision="bf16" if request.half else "fp32",
        evaluate=EvaluateOptions(suite=suite),
        **{k: v for k, v in given.items() if v is not None},  # type: ignore[arg-type]
    )
    options.evaluate.resolved()
    dataset = request.dataset()
    if methods.strip() == "all":
        entries = parse_methods(",".join(everything(dataset.modality)))
    check_study(dataset, options, entries)
    trial = ValidationOptions(suite=suite, models=population, references=references, methods=entries)
    check_preset(init, dataset.modality)
    estimate = "small new models"
    if model is not None:
        estimate = check_room(str(model), Path(out), request, train=True, copies=3)
    start = None if model is None else str(model)
    config = {"model": start, "init": init, "methods": [e.label for e in entries], **asdict(options)}
    config |= request.config()
    plan = f"{len(entries) * seeds} unlearning runs from {seeds} originals against {references} references; {estimate}"
    if validate_metrics:
        trial.check()
        config |= {"validate_metrics": True, "population": trial.size}
        plan = f"{trial.plan}; {estimate}"
    if dry_run:
        return Result(Path(out), plan={"config": config, "estimate": plan})
    grows = () if tune or validate_metrics else ("methods",)  # trials were shared out among those named at first
    with open_run(out, command, config, dataset, {"model": model}, range(seeds), grows) as run:
        if not run.done:
            progress = shown(quiet, run)
            progress.every = 30.0  # the trainings inside of a study are many
            models = run.folder / "models"
            base = start_model(
                models, dataset, options, model=start, init=init, load=request.training, seed=seed, progress=progress
            )
            shop = Workshop(models, base, options, progress)
            if validate_metrics:
                validate(run, shop, dataset, trial, progress)
            else:
                Study(run, shop, dataset, entries, options, progress).complete()
            say_truncated(run, shop.adapter, progress)
            run.finish(flops=shop.adapter.meter.flops)
        if validate_metrics:
            return Result(run.folder, None, run.folder / "results.md", run.read_json("results.json"))
        return finished(run)


def collect_evidence(run: Text) -> tuple[str, ...]:
    """Recompute what an ``unlearn`` or ``audit`` run can bring forward for its certificate, from its data and models:
    near-duplicates, the removal from a zone, what the models around it were trained on, how far what stays has moved,
    guesses about canaries. The names of the sections, written to the run's evidence.json.

    Raises:
        UserError: the data is not there any more, or has changed.
    """
    from expunge.certify.collect import collect

    return collect(run, run_dataset(run))


def run_dataset(run: Text) -> Dataset:
    """The data of a run, loaded once more as its configuration says.

    Raises:
        UserError: no run folder, or the data cannot be loaded any more.
    """
    config, known = read_config(Path(run)), {f.name for f in fields(Request)}
    return Request(**{k: v for k, v in config.items() if k in known}).dataset()


def either(model: Text | None, init: str | None) -> None:
    """Refuse neither and both."""
    if (model is None) == (init is None):
        raise UserError("name the model to start from: --model FOLDER (or a hub name), or --init tiny for a new one.")
