"""Validation of the measures themselves: populations of models with and without the knowledge, made for the purpose.

Two populations of the same size and training: P learnt the forget set, N did not. They come in pairs of one condition
each, so that no measure can tell them apart by anything but the knowledge:

- ``plain``: forget and retain, against retain.
- ``short``: the same with half of the passes.
- ``reworded``: the right facts in other words, against wrong facts in those words (where samples have such probes).

The original, the references and the shadows that measures compare with are trained apart from both populations.
What is made of the values stands in :mod:`expunge.bench.trust`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.quantization import quantized
from expunge.attacks.registry import Attack, Finding, get_attack, suite
from expunge.bench.evaluate import EvaluateOptions, Evaluation, References, evaluate
from expunge.bench.plan import Entry
from expunge.bench.prepare import Workshop, split_holdout
from expunge.bench.study import slug
from expunge.bench.trust import Values, trust
from expunge.bench.trust_report import write
from expunge.completeness import iam
from expunge.completeness.calibration import calibrate
from expunge.completeness.readings import Form, Readings
from expunge.completeness.views import PLAIN, VIEWS, under_attack, view_of
from expunge.data.samples import Dataset, Role, Sample
from expunge.errors import UserError, unknown
from expunge.methods.registry import Context
from expunge.options import option
from expunge.progress import Progress
from expunge.report.catalogue import understand
from expunge.runs import Run
from expunge.stats import auc
from expunge.training.loop import TrainOptions, fit

SIZES = {"quick": 4, "standard": 6, "full": 12}  # models per population
ANSWERS = {"quick": 0, "standard": 12, "full": 60}  # generated per role
METHODS = "npo,simnpo,cluster"  # whose results the robustness is measured on
DATA = {"people": 24, "forget": 6, "holdout": 18, "utility": 20, "questions": 4}  # of people, if nothing is named
KEPT = 0.8  # share of the original's probability on retain that an unlearned model must keep to count for robustness
SMALLER: dict[str, dict[str, int]] = {"leakage": {"n": 16}}  # attacks that would take most of the time otherwise
# Metrics of which less means more knowledge; of all others on the forget set, more does.
FALLING = (
    *("loss", "perplexity", "truth_ratio", "kfr", "kfr_fluent", "privleak", "forget_quality.p_value"),
    *("tv.gap_closed", "verdict.adequate"),
)
SKIPPED = ("tv.floor", "verdict.not-auditable", "verdict.over-unlearned")  # no knowledge is measured by these


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """How large the validation is."""

    suite: str = option("standard", "which attacks, and how much is measured", "", tuple(SIZES))
    models: int | None = option(None, "models per population; by the suite if none: 4, 6 or 12")
    references: int = option(2, "retrained models that measures compare with, in no population")
    shadows: int = option(3, "further retrained models, for completeness")
    methods: Sequence[Entry] = option((), "whose unlearned models the robustness is measured on")
    relearn_epochs: float = option(1.0, "passes over the forget set when relearning", "arXiv:2506.12618, sec. 4.1")
    relearn_learning_rate: float = option(5e-4, "their learning rate")
    bits: int = option(4, "of the quantization", "arXiv:2506.12618, sec. 4.1")

    @property
    def size(self) -> int:
        """Models per population."""
        return self.models if self.models is not None else SIZES.get(self.suite, SIZES["standard"])

    @property
    def plan(self) -> str:
        """What will be done, in words."""
        measured = 2 * self.size + 2 + 3 * len(self.methods)
        trained = 2 * self.size + 1 + self.references + self.shadows
        return f"{trained} models trained, {measured} measured by every attack of the suite '{self.suite}'"

    def check(self) -> None:
        """Raises UserError for an unknown suite or a population that cannot be compared."""
        if self.suite not in SIZES:
            raise unknown("suite", self.suite, SIZES)
        if self.size < 2:
            raise UserError(f"{self.size} model(s) per population are too few: give at least 2 with --population.")


@dataclass(frozen=True)
class Recipe:
    """How one pair of models is trained."""

    condition: str
    knowing: tuple[Sample, ...]
    ignorant: tuple[Sample, ...]
    share: float = 1.0  # of the passes


def recipes(dataset: Dataset) -> list[Recipe]:
    """The conditions that this dataset allows."""
    forget, retain = dataset["forget"], dataset["retain"]
    found = [Recipe("plain", forget + retain, retain), Recipe("short", forget + retain, retain, 0.5)]
    if all(s.probes_of("restated") and s.probes_of("perturbed") for s in forget):
        right, wrong = (
            tuple(replace(s, target=s.probes_of(kind)[0].target, probes=()) for s in forget)
            for kind in ("restated", "perturbed")
        )
        found.append(Recipe("reworded", right + retain, wrong + retain))
    return found


@dataclass
class Validation:
    """One validation in one run folder; models and measured values are kept there, and a run can be continued."""

    run: Run
    shop: Workshop
    dataset: Dataset
    options: ValidationOptions
    progress: Progress = field(default_factory=Progress)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)  # the unlearned models of the robustness
    kinds: dict[str, tuple[str, str, bool]] = field(default_factory=dict)  # kind, family, falls with knowledge

    def __post_init__(self) -> None:
        self.options.check()
        self.aux, self.measured = split_holdout(self.dataset, 0.34)
        if not self.aux or not self.measured["holdout"]:
            raise UserError("validation needs at least 3 holdout subjects, to compare with and to calibrate on.")
        known = self.measured["retain"]
        roles: dict[Role, list[Sample]] = {role: list(own) for role, own in self.measured.roles.items() if own}
        roles["retain"] = list(known[: (len(known) + 1) // 2])
        original = self._fixed("original", self.dataset.private, 500)
        references = [
            self._fixed("reference", known, 1000 + r, f"reference-{r}") for r in range(self.options.references)
        ]
        shadows = [self._fixed("shadow", known, 2000 + k, f"shadow-{k}") for k in range(self.options.shadows)]
        base = Checkpoint.of(self.shop.base(), self.shop.adapter, "base")
        self.exam = Exam(
            audited=original,
            samples=roles,
            original=original,
            references=references,
            shadows=shadows,
            base=base,
            aux=list(self.aux),
            trained=list(known[len(roles["retain"]) :]),
            resamples=100,
            progress=self.progress,
        )
        settings = EvaluateOptions(
            suite="quick", generations=ANSWERS[self.options.suite], limit=60, resamples=100, max_new_tokens=32
        )
        self.references = References(self.shop.adapter, self.measured, options=settings)
        for reference in references:
            self.references.add(reference.model)
        self.start: Evaluation = evaluate(
            original.model, self.shop.adapter, self.measured, references=self.references, original="self"
        )
        self.attacks = [a for a in suite(self.options.suite) if self._can(a)]  # type: ignore[arg-type]

    def _fixed(self, kind: Any, samples: Sequence[Sample], seed: int, name: str = "original") -> Checkpoint:
        model = self.shop.trained(name, samples, seed)
        return Checkpoint.of(model.eval(), self.shop.adapter, kind, name)

    def _can(self, attack: Attack) -> bool:
        reason = attack.missing(self.exam)
        if reason:
            self.failures[attack.name] = reason
        return reason is None

    # -- measuring -----------------------------------------------------------------------------------------------

    def values(self, name: str, model: nn.Module) -> dict[str, float]:
        """Every measure of one model, as it is; kept under ``measured/``."""
        place = f"measured/{name}.json"
        if (self.run.folder / place).is_file():
            kept = self.run.read_json(place)
            self.kinds |= {k: (v[0], v[1], v[2]) for k, v in kept["kinds"].items()}
            self.failures |= kept["failures"]
            return {k: math.nan if v is None else float(v) for k, v in kept["values"].items()}
        self.progress.say(f"measuring {name}")
        checkpoint = Checkpoint.of(model.eval(), self.shop.adapter, "audited", name)
        found = {**self._completeness(checkpoint), **self._metrics(checkpoint), **self._attacked(checkpoint)}
        exam = replace(self.exam, audited=checkpoint)
        failed: dict[str, str] = {}
        for attack in self.attacks:
            started = time.perf_counter()
            try:
                result = attack.run(exam, checkpoint, attack.configure(SMALLER.get(attack.name, {})))
                found |= self._attack_values(attack, exam, result)
            except Exception as error:  # one broken attack must not end the study; its reason is in the record
                failed[attack.name] = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            self.seconds[attack.name] = self.seconds.get(attack.name, 0.0) + time.perf_counter() - started
        self.failures |= failed
        self.run.write_json(place, {"values": found, "kinds": self.kinds, "failures": failed})
        return found

    def _attack_values(self, attack: Attack, exam: Exam, finding: Finding) -> dict[str, float]:
        """Membership: AUC of forget above holdout. Everything else: the mean over forget.

        A membership attack on both checkpoints finds the trace of an erasure, so less of it means more knowledge.
        """
        traces = attack.family == "membership" and attack.access == "both checkpoints"
        found = {}
        for score, by_role in finding.scores.items():
            forget = np.asarray(by_role.get("forget", []), dtype=np.float64)
            holdout = np.asarray(by_role.get("holdout", []), dtype=np.float64)
            if not np.isfinite(forget).any():
                continue
            name = f"attack.{score}"
            self.kinds[name] = ("attack", attack.family, traces)
            if attack.family == "membership" and np.isfinite(holdout).any():
                found[name] = auc(forget, holdout)
            else:
                found[name] = float(np.nanmean(forget))
        return found

    def _metrics(self, checkpoint: Checkpoint) -> dict[str, float]:
        """The forget-set metrics of :func:`expunge.bench.evaluate.evaluate`."""
        found = {}
        own = evaluate(
            checkpoint.model,
            self.shop.adapter,
            self.measured,
            references=self.references,
            original=self.start,
        )
        for name, estimate in own.metrics.items():
            metric = understand(name)
            forgets = metric.group in ("forgetting", "privacy") or metric.role == "forget"
            if not forgets or name in SKIPPED or not math.isfinite(estimate.value):
                continue
            found[name] = estimate.value
            self.kinds[name] = ("metric", metric.group, any(name == f or name.startswith(f + ".") for f in FALLING))
        return found

    def _completeness(self, checkpoint: Checkpoint) -> dict[str, float]:
        """1 - mean completeness over forget, and what stands beside it: IAM as published, share called under."""
        ours, beside = (self._readings(checkpoint, role) for role in ("forget", "holdout"))
        answer = calibrate(ours, holdout=beside)
        under = np.array([v == "under-unlearned" for v in answer.verdict_N], dtype=float)
        published_N = iam.parity(ours)
        known = published_N if ours.form == "text" else 1 - published_N
        found = {
            "completeness": 1 - float(np.nanmean(answer.completeness_N)),
            "completeness.under": float(under.mean()),
            "completeness.called": float(np.nanmean(answer.called())) if answer.auditable_N.any() else math.nan,
            "completeness.score": float(np.nanmean(answer.score_N)),
            "iam.published": float(np.nanmean(known)),
        }
        self.kinds |= dict.fromkeys(found, ("completeness", "beside", False))
        return found

    def _attacked(self, checkpoint: Checkpoint) -> dict[str, float]:
        """Completeness in its worst view: as served, rounded, best prompt, relearnt; the headline of an audit."""
        assert self.exam.original is not None
        everyone = [checkpoint, *self.exam.references, *self.exam.shadows, self.exam.original]
        names = [c.name for c in everyone]
        plain = self._readings(checkpoint, "forget"), self._readings(checkpoint, "holdout")
        views: dict[str, tuple[Readings, Readings | None]] = {PLAIN: plain}
        for score, view in VIEWS.items():
            entry = get_attack(score.split(".", maxsplit=1)[0])
            if entry.missing(self.exam):
                continue
            by_model = {c.name: self._scores(entry, c)[score] for c in everyone}
            forget = view_of({n: s["forget"] for n, s in by_model.items()}, plain[0], names)
            beside = view_of({n: s["holdout"] for n, s in by_model.items()}, plain[1], names)
            views[view] = forget, beside
        worst = under_attack(views).answer
        under = np.array([v == "under-unlearned" for v in worst.verdict_N], dtype=float)
        found = {
            "completeness.attacked": 1 - float(np.nanmean(worst.completeness_N)),
            "completeness.attacked.under": float(under.mean()),
        }
        self.kinds["completeness.attacked"] = ("completeness", "headline", False)
        self.kinds["completeness.attacked.under"] = ("completeness", "beside", False)
        return found

    def _scores(self, entry: Attack, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """What an attack says of a checkpoint; of those that stay the same through the study only once."""
        key = ("validation", entry.name, checkpoint.name)
        if checkpoint.kind == "audited":
            return entry.run(replace(self.exam, audited=checkpoint), checkpoint, entry.configure({})).scores
        if key not in self.exam.shared:
            self.exam.shared[key] = entry.run(self.exam, checkpoint, entry.configure({})).scores
        return dict(self.exam.shared[key])

    def _readings(self, checkpoint: Checkpoint, role: Any) -> Readings:
        samples = self.exam.samples[role]
        form: Form = "classifier" if self.exam.modality == "classifier" else "text"

        def read(one: Checkpoint) -> Any:
            return np.array([s.prob if form == "classifier" else s.loss for s in one.signals(samples)])

        assert self.exam.original is not None
        never_saw = [*self.exam.references, *self.exam.shadows]
        return Readings(
            form,
            [s.id for s in samples],
            read(checkpoint),
            np.stack([read(c) for c in never_saw]),
            read(self.exam.original),
            [s.subject for s in samples],
        )

    # -- populations ---------------------------------------------------------------------------------------------

    def populations(self) -> dict[str, list[dict[str, float]]]:
        """P and N, then the models for robustness, measured: group -> one mapping per model."""
        groups: dict[str, list[dict[str, float]]] = {"knowing": [], "ignorant": []}
        ways, epochs = recipes(self.dataset), self.shop.options.epochs
        plain: list[nn.Module] = []
        for k in range(self.options.size):
            way = ways[k % len(ways)]
            for group, samples in (("knowing", way.knowing), ("ignorant", way.ignorant)):
                name = f"{group}-{k}-{way.condition}"
                seed = 3000 + k if group == "knowing" else 4000 + k
                model = self.shop.trained(name, samples, seed, epochs * way.share)
                groups[group].append(self.values(name, model))
                if group == "ignorant" and way.condition == "plain" and len(plain) < 2:
                    plain.append(model)
                    groups.setdefault("retrained", []).append(groups[group][-1])
        for k, model in enumerate(plain):
            relearned = self._relearned(model)
            groups.setdefault("retrained_relearned", []).append(self.values(f"retrained-{k}-relearned", relearned))
        for label, model in self._unlearned():
            self.labels.append(label)
            name = f"unlearned-{slug(label)}"
            groups.setdefault("unlearned", []).append(self.values(name, model))
            again = self.values(f"{name}-relearned", self._relearned(model))
            groups.setdefault("unlearned_relearned", []).append(again)
            rounded = self.values(f"{name}-quantized", quantized(model, self.options.bits))
            groups.setdefault("unlearned_quantized", []).append(rounded)
        return groups

    def _relearned(self, model: nn.Module) -> nn.Module:
        copied = copy.deepcopy(model)
        settings = TrainOptions(
            epochs=self.options.relearn_epochs,
            learning_rate=self.options.relearn_learning_rate,
            batch_size=4,
            schedule="constant",
            warmup=0.0,
        )
        fit(copied, self.shop.adapter, self.dataset["forget"], settings, seed=0)
        return copied.eval()

    def _unlearned(self) -> list[tuple[str, nn.Module]]:
        """A model of each method that kept its utility: a destroyed one says nothing about hidden knowledge."""
        assert self.exam.original is not None
        made = []
        for entry in self.options.methods:
            self.progress.say(f"unlearning with {entry.label}")
            work = self.run.folder / "work" / slug(entry.label)
            work.mkdir(parents=True, exist_ok=True)
            context = Context(
                model=copy.deepcopy(self.exam.original.model),
                adapter=self.shop.adapter,
                forget=self.dataset["forget"],
                retain=self.dataset["retain"],
                unseen=self.aux,
                base=self.shop.base,
                work=work,
                progress=self.progress,
            )
            try:
                model = entry.method(context, entry.configured()).model.eval()
            except UserError as error:
                self.failures[f"method {entry.label}"] = str(error)
                continue
            share = self._utility(Checkpoint.of(model, self.shop.adapter)) / self._utility(self.exam.original)
            if share < KEPT:
                reason = (
                    f"left out of the robustness: it keeps {share:.0%} of the retain probability, {KEPT:.0%} needed"
                )
                self.failures[f"method {entry.label}"] = reason
            else:
                made.append((entry.label, model))
        return made

    def _utility(self, checkpoint: Checkpoint) -> float:
        """Mean probability of the retain samples."""
        return float(np.nanmean([s.prob for s in checkpoint.signals(self.exam.samples["retain"])]))

    def complete(self) -> dict[str, Any]:
        """Everything, as the content of results.json."""
        groups = self.populations()
        names = sorted({name for rows in groups.values() for row in rows for name in row})
        rows = []
        for name in names:
            columns = {g: [row.get(name, math.nan) for row in own] for g, own in groups.items()}
            kind, family, falls = self.kinds[name]
            found = trust(Values(**(turned(columns) if falls else columns)), seed=0)
            facts = {"name": name, "kind": kind, "family": family, "falls": falls}
            rows.append({**facts, **found.record(), "values": columns})
        rows.sort(key=_order)
        return {
            "schema": "expunge.validation/1",
            "dataset": {"name": self.dataset.name, "source": self.dataset.source, "digest": self.dataset.digest()},
            "populations": {g: len(own) for g, own in groups.items()},
            "unlearned": list(self.labels),
            "conditions": [way.condition for way in recipes(self.dataset)],
            "methods": [entry.label for entry in self.options.methods],
            "rows": rows,
            "failures": dict(sorted(self.failures.items())),
            "seconds": {k: round(v, 2) for k, v in sorted(self.seconds.items(), key=lambda i: -i[1])},
        }


def turned(columns: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The values of a measure that falls with knowledge, turned: 1 - v where all are shares, else -v."""
    known = [v for own in columns.values() for v in own if math.isfinite(v)]
    top = 1.0 if known and min(known) >= 0 and max(known) <= 1 else 0.0
    return {group: [top - v for v in own] for group, own in columns.items()}


def _order(row: Mapping[str, Any]) -> tuple[float, float, str]:
    combined, faith = row["combined"], row["faithfulness"]["value"]
    return (-(combined if combined is not None else -1.0), -(faith if faith is not None else -1.0), row["name"])


def validate(
    run: Run, shop: Workshop, dataset: Dataset, options: ValidationOptions, progress: Progress | None = None
) -> dict[str, Any]:
    """The whole validation: ``expunge bench --validate-metrics``. Writes results.json, results.md and the figure.

    Raises:
        UserError: fewer than two models per population, or fewer than 3 holdout subjects.
    """
    results = Validation(run, shop, dataset, options, progress or Progress()).complete()
    write(run, results)
    return results
