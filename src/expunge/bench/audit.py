"""``expunge audit``: checkpoints in folders become an exam; metrics, attacks and completeness become one report."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.attacks.exam import Checkpoint, Exam, Kind
from expunge.attacks.registry import TIERS, Tier
from expunge.bench import results
from expunge.bench.evaluate import Evaluation
from expunge.bench.examine import FAIL_ON, Audit, Plan, examine, plan, strangers
from expunge.bench.measuring import EvaluateOptions, chosen
from expunge.bench.plan import StudyOptions
from expunge.bench.prepare import Workshop, split_holdout
from expunge.bench.provenance import provenance
from expunge.bench.single import Request, measure_row, measured_references, say_truncated
from expunge.bench.study import Study, anchor
from expunge.data.samples import Dataset, Role, Sample
from expunge.errors import UserError, unknown
from expunge.files import digest_file, digest_folder
from expunge.models.adapter import Adapter
from expunge.models.classifier import ClassifierAdapter
from expunge.models.load import Loaded, load_model
from expunge.options import name_and_settings
from expunge.progress import Progress
from expunge.runs import Run
from expunge.signals.cache import SignalCache

AUX_SHARE = 0.34  # of the holdout subjects: prefixes, calibration and attack training come from them alone


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What is audited, beside the data and how models are loaded."""

    model: str
    original: str | None = None
    references: Sequence[str] = ()
    shadows: Sequence[str] = ()
    base: str | None = None
    suite: str = "standard"
    attacks: str = ""
    level: float = 0.05
    fdr: float = 0.05
    fail_on: Sequence[str] = ()
    llm: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for an unknown suite, attack, option or axis, and for a level outside (0, 1)."""
        if self.suite not in TIERS:
            raise unknown("suite", self.suite, TIERS)
        for name in self.fail_on:
            if name not in FAIL_ON:
                raise unknown("--fail-on", name, FAIL_ON)
        for name, value in (("level", self.level), ("fdr", self.fdr)):
            if not 0 < value < 1:
                raise UserError(f"--{name} {value} is not between 0 and 1: give for example 0.05.")
        self.plan(None)

    @property
    def tier(self) -> Tier:
        return next(t for t in TIERS if t == self.suite)

    def plan(self, exam: Exam | None) -> Plan:
        return plan(exam, self.tier, parse_attacks(self.attacks))

    @property
    def num_models(self) -> int:
        return 1 + (self.original is not None) + len(self.references)

    def config(self) -> dict[str, Any]:
        """For run.yaml: what the numbers depend on."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("llm", "fail_on")}
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
        return listed | {"llm": None if self.llm is None else getattr(self.llm, "__qualname__", repr(self.llm))}


def parse_attacks(text: str) -> list[tuple[str, dict[str, str]]]:
    """A comma list of names with options: ``loss,recall:shots=5;seed=1``; nothing means the whole suite.

    Raises:
        UserError: an option that is not key=value, or an attack that is named twice.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for item in filter(None, (raw.strip() for raw in text.split(","))):
        name, values = name_and_settings(item, "attack", "recall:shots=5")
        if any(name == other for other, _ in found):
            raise UserError(f"attack '{name}' is named twice: name it once.")
        found.append((name, values))
    return found


def audit_models(
    run: Run, request: Request, dataset: Dataset, options: AuditOptions, *, progress: Progress | None = None
) -> Audit:
    """Measure a model against its original, references and shadows; only the attacks' own copies are trained.

    Raises:
        UserError: a reference or shadow was trained on a forget sample, or whatever loading finds wrong.
    """
    progress = progress or Progress(event=run.event)
    blank = [*options.references, *options.shadows, *([options.base] if options.base else [])]
    notes = provenance(dataset["forget"], blank)
    loaded = load_model(options.model, **request.loading)
    study_options = StudyOptions(
        evaluate=EvaluateOptions(suite=options.suite, verdicts=False),  # its own are calibrated
        calibration=0.0,  # nothing calibrates on the holdout: all of it is measured
        references=len(options.references),
        seeds=1,
    )
    shop = Workshop(run.folder / "work", loaded, study_options, progress)
    study = Study(run, shop, dataset, [], study_options, progress)
    exam = examination(run, request, dataset, options, loaded, progress)
    odd = {c.name for c in strangers(exam)}  # the metrics read all models through the audited one's adapter
    alike = [c.path for c in exam.references if c.name not in odd]
    compared = measured_references(study, request, alike)
    before: Evaluation | None = None
    if options.original is not None and "original" not in odd:
        first = load_model(options.original, **request.loading).model
        before = measure_row(study, "main/original/0", anchor("original", 0), first, compared, "self")
        del first
    content = {**anchor("audited", 0), "kind": "method", "notes": [f"model: {options.model}"]}
    measure_row(study, "main/audited/0", content, loaded.model, compared, before)
    name = f"Audit of {options.model}"
    results.write(run, shop, dataset, study_options, [request.seed], name)

    wanted = options.plan(exam)
    for note in notes:
        progress.say(note)
    audit = examine(exam, wanted, run, level=options.level, fdr=options.fdr, notes=notes)
    say_truncated(run, shop.adapter, progress)
    said = {"vector": {t["axis"]: t["verdict"] for t in audit.content["vector"]}}
    said["completeness"] = {} if audit.completeness is None else dict(audit.completeness.counts())
    outputs = {name: digest_file(run.folder / name) for name in ("audit.json", "drill.jsonl")}
    run.finish(flops=shop.adapter.meter.flops, notes=notes, figures=said, outputs=outputs)
    shutil.rmtree(run.folder / "work", ignore_errors=True)
    return audit


def check_kind(name: str, adapter: Adapter, audited: Adapter) -> None:
    """Refuse a model whose answers cannot be compared with the audited model's.

    Raises:
        UserError: it is of another kind, or has other classes.
    """

    def kind(of: Adapter) -> str:
        classes = f"a classifier of {of.num_classes} classes" if isinstance(of, ClassifierAdapter) else ""
        return classes or f"a {of.modality} model"

    if kind(adapter) != kind(audited):
        raise UserError(f"{name} is {kind(adapter)} and the audited model {kind(audited)}: compare models of one kind.")


def examination(
    run: Run, request: Request, dataset: Dataset, options: AuditOptions, loaded: Loaded, progress: Progress
) -> Exam:
    """The exam: the audited model is in memory, the others are loaded when their turn comes."""
    cache = SignalCache(run.folder / "signals")

    def checkpoint(folder: str, kind: Kind, name: str) -> Checkpoint:
        path = Path(folder).expanduser()
        digest = digest_folder(path) if path.is_dir() else ""  # a hub name has no digest: nothing is kept of it
        key = f"{digest}/{request.dtype}/{request.device}" if digest else ""
        if kind == "audited":
            return Checkpoint(name, kind, loaded.adapter, lambda: loaded.model, key, cache, path=folder)
        adapter = load_model(folder, **request.loading).adapter
        check_kind(name, adapter, loaded.adapter)
        load = lambda: load_model(folder, **request.loading).model  # noqa: E731
        return Checkpoint(name, kind, adapter, load, key, cache, path=folder)

    aux, measured = split_holdout(dataset, AUX_SHARE)
    samples: dict[Role, list[Sample]] = chosen(measured, EvaluateOptions(suite=options.suite).resolved())
    taken = {s.id for s in samples.get("retain", [])}
    trained = [s for s in dataset["retain"] if s.id not in taken]
    if not trained and len(samples.get("retain", ())) >= 8:
        # Attacks that want known members get a quarter of the subjects, which are then not measured.
        subjects = list(dict.fromkeys(s.subject for s in samples["retain"]))
        given = set(subjects[-max(1, len(subjects) // 4) :])
        trained = [s for s in samples["retain"] if s.subject in given]
        samples["retain"] = [s for s in samples["retain"] if s.subject not in given] or samples["retain"]
    return Exam(
        audited=checkpoint(options.model, "audited", "audited"),
        original=checkpoint(options.original, "original", "original") if options.original else None,
        references=[checkpoint(f, "reference", f"reference-{i}") for i, f in enumerate(options.references)],
        shadows=[checkpoint(f, "shadow", f"shadow-{i}") for i, f in enumerate(options.shadows)],
        base=checkpoint(options.base, "base", "base") if options.base else None,
        samples=samples,
        aux=list(aux),
        trained=trained,
        llm=options.llm,
        seed=request.seed,
        work=run.folder / "work",
        progress=progress,
    )


def failures(audit: Mapping[str, Any], wanted: Sequence[str]) -> list[str]:
    """Which of the wishes of ``--fail-on`` came true: axes that failed, "under" or "over" where samples are so."""
    found = [t["axis"] for t in audit["vector"] if t["verdict"] == "failed"]
    counts = (audit.get("completeness") or {}).get("counts", {})
    found += [word for word in ("under", "over") if counts.get(f"{word}-unlearned")]
    return found if "any" in wanted else [name for name in found if name in wanted]
