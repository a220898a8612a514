"""One model at a time: train one, unlearn from one, measure some. The same rows and report as a study."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from expunge.bench import results
from expunge.bench.cost import Cost, measure
from expunge.bench.evaluate import Evaluation, References, evaluate
from expunge.bench.plan import Entry, StudyOptions
from expunge.bench.prepare import Workshop, initialised
from expunge.bench.provenance import record_training
from expunge.bench.study import Study, anchor
from expunge.certify.provenance import Mechanism
from expunge.data.deletion import by_wishes
from expunge.data.files import load_files, read_samples
from expunge.data.registry import load_dataset
from expunge.data.samples import ROLES, Dataset, Role, Sample
from expunge.errors import UserError, unknown
from expunge.files import digest_folder
from expunge.models.adapter import Adapter
from expunge.models.load import Loaded, dtype_of, load_model, save_model
from expunge.models.lora import LoraOptions
from expunge.models.memory import check_resources, estimate
from expunge.noise import kept_seed
from expunge.options import configure
from expunge.progress import Progress
from expunge.runs import Run
from expunge.training.loop import TrainOptions, fit
from expunge.training.private import NOISE, PrivateOptions, train_private

TRAINING = "expunge.training/1"  # schema of results.json of a training


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for: the data (a dataset by name, or files), and how models are loaded."""

    data: str | None = None
    data_dir: Path | str | None = None
    data_options: Mapping[str, Any] | None = None
    forget: Path | str | None = None
    retain: Path | str | None = None
    holdout: Path | str | None = None
    utility: Path | str | None = None
    earlier: Path | str | None = None
    delete: Sequence[str] = ()
    device: str = "auto"
    dtype: str = "fp32"
    template: str = "auto"
    context: int | None = None
    lora: Mapping[str, Any] | None = None
    seed: int = 0
    data_seed: int = 0  # of generated data and of what --delete draws: models of one dataset differ in ``seed`` alone

    def dataset(self) -> Dataset:
        """Load and check it.

        Raises:
            UserError: neither or both of a dataset and files, or whatever is wrong with them.
        """
        if (self.data is None) == (self.forget is None):
            raise UserError("name the data: either --data NAME, or --forget FILE (with --retain FILE).")
        if self.data is not None:
            found = load_dataset(self.data, data_dir=self.data_dir, seed=self.data_seed, options=self.data_options)
        else:
            assert self.forget is not None
            found = load_files(forget=self.forget, retain=self.retain, holdout=self.holdout, utility=self.utility)
        return by_wishes(found.check(), self.delete, self.data_seed)

    def earlier_samples(self) -> tuple[Sample, ...]:
        """What earlier requests have erased from the same model, and must stay erased."""
        return () if self.earlier is None else tuple(read_samples(self.earlier, prefix="earlier"))

    @property
    def loading(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "dtype": self.dtype,
            "template": self.template,
            "context": self.context,
        }

    @property
    def half(self) -> bool:
        return self.dtype in ("bf16", "bfloat16", "fp16", "float16")

    @property
    def training(self) -> dict[str, Any]:
        """As :attr:`loading`, but half-precision models train on fp32 weights (small steps would round away), with
        passes under autocast; they are saved and measured in their own precision."""
        return {**self.loading, "dtype": "fp32" if self.half else self.dtype}

    def served(self, model: nn.Module) -> nn.Module:
        """The model in the precision that was asked for."""
        number_type = dtype_of(self.dtype)
        return model if number_type is None else model.to(number_type)

    def lora_options(self) -> LoraOptions | None:
        return None if self.lora is None else configure(LoraOptions, self.lora, "option of --lora")

    def config(self) -> dict[str, Any]:
        """For run.yaml; files by the name that was given, their content by the dataset's digest."""
        return {k: (str(v) if isinstance(v, Path) else v) for k, v in dataclasses.asdict(self).items()}


def check_room(model: str, out: Path, request: Request, *, train: bool, copies: int = 1) -> str:
    """Refuse before the start if memory or disk are too small; else the estimate in words."""
    dtype = request.training["dtype"] if train else request.dtype
    needed = estimate(model, dtype=dtype, train=train, lora=request.lora_options(), copies=copies)
    check_resources(needed, out, device=request.device)
    return str(needed)


def say_truncated(run: Run, adapter: Adapter, progress: Progress) -> None:
    """Never cut a sample silently."""
    if adapter.truncated:
        text = results.truncation(adapter)
        progress.say(text)
        run.note(text)


def check_roles(dataset: Dataset, roles: Sequence[Role]) -> None:
    """Raises UserError for a role that does not exist, or when the roles hold nothing to train on."""
    for role in roles:
        if role not in ROLES:
            raise unknown("role", role, ROLES)
    if not any(dataset[role] for role in roles):
        raise UserError(f"there are no samples in role(s) {', '.join(roles)}: nothing to train on.")


def train_model(
    run: Run,
    request: Request,
    dataset: Dataset,
    options: TrainOptions,
    *,
    model: str | None,
    init: str | None,
    roles: Sequence[Role] = ("forget", "retain"),
    private: PrivateOptions | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train a model, or a new small one, on the samples of some roles; the folder of the trained model.

    With ``private`` by noisy gradients (:mod:`expunge.training.private`) in place of ``options``.
    """
    progress = progress or Progress(event=run.event)
    check_roles(dataset, roles)
    samples: list[Sample] = [s for role in roles for s in dataset[role]]
    loaded, mechanism, figures = start_of(request, dataset, model, init), None, {}
    with measure(loaded.adapter, loaded.model) as cost:
        if private is None:
            log = fit(
                loaded.model, loaded.adapter, samples, options, seed=request.seed, work=run.folder / "work",
                progress=progress, name="train",
            )  # fmt: skip
            figures = {"first_loss": log.steps[0]["nll"], "last_loss": log.last("nll"), "steps": len(log.steps)}
        else:
            seed = kept_seed(run.folder / NOISE)
            losses = train_private(loaded.model, loaded.adapter, samples, private, seed, progress)
            progress.say(f"the seed of the noise is in {run.folder / NOISE}: keep it apart from the model")
            mechanism = Mechanism(noise=private.multiplier, **dataclasses.asdict(private))
            figures = {"first_loss": losses[0], "last_loss": losses[-1], "steps": len(losses), "noise": mechanism.noise}
    say_truncated(run, loaded.adapter, progress)
    loaded.model = request.served(loaded.model)
    folder = save_model(loaded, run.folder / "model")
    texts = [s for role in ("utility", "retain") for s in dataset[role]]
    record_training(run, folder, samples, roles, start=model, texts=texts, mechanism=mechanism)
    run.write_json("results.json", {"schema": TRAINING, **figures, "cost": cost.record(), "roles": roles})
    outputs = {"model": digest_folder(folder)}
    run.finish(flops=cost.flops, parameters_changed=cost.parameters_changed, figures=figures, outputs=outputs)
    return folder


def start_of(request: Request, dataset: Dataset, model: str | None, init: str | None) -> Loaded:
    """The model that a training starts from, as it is trained.

    Raises:
        UserError: neither or both of ``model`` and ``init``.
    """
    if (model is None) == (init is None):
        raise UserError("name what to train: --model FOLDER, or --init tiny for a new small model.")
    if model is not None:
        return load_model(model, **request.training, lora=request.lora_options(), seed=request.seed)
    assert init is not None
    return initialised(dataset, init, request.seed)


def unlearn_model(
    run: Run,
    request: Request,
    dataset: Dataset,
    entry: Entry,
    options: StudyOptions,
    *,
    model: str,
    base: str | None = None,
    references: Sequence[str] = (),
    earlier: Sequence[Sample] = (),
    llm: Callable[[str], str] | None = None,
    keep_helpers: Path | None = None,
    measured: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Unlearn once and measure before and after; the folder of the unlearned model.

    A run that was stopped after the unlearning goes on with the measurement.
    """
    progress = progress or Progress(event=run.event)
    loaded = load_model(model, **request.training, lora=request.lora_options(), seed=request.seed)
    entry.whole()[0].check_modality(loaded.adapter.modality)
    if base is not None:
        start = load_model(base, **request.training)
        shop = Workshop(run.folder / "work", Loaded(start.model, loaded.adapter, base), options, progress)
    else:
        shop = Workshop(run.folder / "work", Loaded(loaded.model, loaded.adapter, model), options, progress)
    blind = dataclasses.replace(options, blind=base is None, references=len(references), seeds=1)
    study = Study(run, shop, dataset, [entry], blind, progress)
    compared, original = (None, None)
    if measured:
        compared = measured_references(study, request, references)
        before = load_model(model, **request.loading).model if request.half else loaded.model
        original = measure_row(study, "main/original/0", anchor("original", 0), before, compared, "self")
        del before
    folder, made = run.folder / "model", "work/unlearned.json"
    if (run.folder / made).exists():
        common = run.read_json(made)
        model_after = load_model(folder, **request.loading).model
    else:
        context = study.context(entry, loaded.model, request.seed, dataset, f"main/{entry.label}/0")
        context.earlier = earlier
        has = {f.name for f in dataclasses.fields(entry.method.options)}
        more = {"precision": "bf16"} if request.half and "precision" in has else {}
        if "noise_seed" in has:
            more["noise_seed"] = kept_seed(run.folder / f"{entry.method.name}.noise.json").hex()
        context.llm = llm
        context.helpers.keep = keep_helpers
        outcome, cost = study.apply(context, *entry.whole(more))
        loaded.model = model_after = request.served(outcome.model)
        save_model(loaded, folder)
        common = {
            "method": entry.label,
            "kind": "method",
            "seed": request.seed,
            "position": None,
            "properties": results.properties(entry.whole()[0], outcome),
            "settings": entry.settings,
            "notes": outcome.notes,
            "record": {k: v for k, v in outcome.record.items() if k != "log"},
            "curve": results.curve(outcome.record.get("log", [])),
            "cost": cost.record(retraining_cost(references)),
        }
        run.write_json(made, common)
    if measured:
        measure_row(study, f"main/{entry.label}/0", common, model_after, compared, original)
        results.write(run, shop, dataset, blind, [request.seed], f"{entry.label} on {model}")
    say_truncated(run, shop.adapter, progress)
    run.finish(
        flops=shop.adapter.meter.flops,
        parameters_changed=common["cost"]["parameters_changed"],
        notes=common["notes"],
        figures=common["record"],
        outputs={"model": digest_folder(folder)},
    )
    shutil.rmtree(run.folder / "work", ignore_errors=True)
    return folder


def retraining_cost(folders: Sequence[str]) -> Cost | None:
    """Mean cost of training the references, where ``expunge train`` made them and its record stands beside them."""
    costs = [c for c in map(_training_cost, folders) if c is not None]
    if not costs or len(costs) < len(folders):
        return None
    return Cost(flops=sum(c.flops for c in costs) / len(costs), wall_s=sum(c.wall_s for c in costs) / len(costs))


def _training_cost(folder: str) -> Cost | None:
    path = Path(folder).expanduser().parent / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != TRAINING or Path(folder).name != "model":
            return None
        return Cost(flops=float(content["cost"]["flops"]), wall_s=float(content["cost"]["wall_s"]))
    except (OSError, ValueError, KeyError, TypeError):  # somebody else's folder
        return None


def measured_references(study: Study, request: Request, folders: Sequence[str]) -> References | None:
    """Retrained models from their folders, measured on the study's dataset."""
    if not folders:
        return None
    found = References(study.shop.adapter, study.measured, options=study.options.evaluate)
    for number, folder in enumerate(folders):
        study.progress.say(f"measuring reference {number + 1} of {len(folders)}")
        found.add(load_model(folder, **request.loading).model, study.progress)
    mean = retraining_cost(folders)
    for number, folder in enumerate(folders):
        key = f"main/reference/{number}"
        if not study.has(key):
            own = _training_cost(folder)
            cost = {"cost": own.record(mean)} if own is not None else {}
            content = {**anchor("reference", number), **cost, "notes": [f"model: {folder}"]}
            results.write_row(study.run, key, {**content, **results.of_evaluation(found.evaluation(number))})
    return found


def measure_row(
    study: Study,
    key: str,
    content: dict[str, Any],
    model: nn.Module,
    references: References | None,
    original: Any,
) -> Evaluation:
    """Evaluate a model and write its row."""
    study.progress.say(f"measuring {key.split('/')[1]}")
    found = evaluate(
        model,
        study.shop.adapter,
        study.measured,
        references=references,
        original=original,
        options=study.options.evaluate,
        progress=study.progress,
    )
    results.write_row(study.run, key, {**content, **results.of_evaluation(found)})
    return found
