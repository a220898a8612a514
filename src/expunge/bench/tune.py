"""The same number of trials for every method, on validation subjects that the measured forget set never contains.

The rule is fixed beforehand: the first trial is the method's defaults; the others draw the learning rate (×10^U(-1,1)
for families, ×2^U(-1,1) for the flagship, which is less sensitive), the passes (×½, 1, 2) and the retain term; a
method without a learning rate has all its options that are fractional numbers above 0 drawn (×4^U(-1,1)). A trial's
score is the share of the total-variation gap closed on the validation forget set, less 10 per point of retain
ratio below .985, less 2 per point of two-sided membership distance above .05, less 5 per point of the cost of
retraining above .25; the best trial's settings are used.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from expunge.bench.evaluate import evaluate
from expunge.data.deletion import by_subject
from expunge.data.samples import Dataset, subjects
from expunge.errors import UserError
from expunge.training.optimizers import sized_rate

if TYPE_CHECKING:
    from expunge.bench.plan import Entry
    from expunge.bench.study import Study

TUNING_SEED = 97
RETAIN_GOAL, MEMBERSHIP_GOAL, COST_GOAL = 0.985, 0.05, 0.25


def score(metrics: dict[str, Any], share: float = 0.0) -> float:
    """The predeclared rule; missing numbers count as failure of their part. ``share`` is that of retraining's cost."""

    def value(name: str, otherwise: float) -> float:
        found = metrics.get(name)
        number = getattr(found, "value", None)
        return otherwise if number is None or not np.isfinite(number) else float(number)

    closed = value("tv.gap_closed", -1.0)
    retain = value("retain_ratio", 0.0)
    gap = value("mia.loss.gap", 0.5)
    missed = 10 * max(0.0, RETAIN_GOAL - retain) + 2 * max(0.0, gap - MEMBERSHIP_GOAL)
    return closed - missed - 5 * max(0.0, share - COST_GOAL)


def draws(study: Study, entry: Entry, trials: int) -> list[dict[str, Any]]:
    """Settings of each trial: the defaults first, then random ones by the entry's own stream."""
    rng = np.random.default_rng([TUNING_SEED, *map(ord, entry.label)])
    defaults = entry.configured()
    fields = {f.name for f in dataclasses.fields(defaults)}
    found: list[dict[str, Any]] = [dict(entry.settings)]
    for _ in range(trials - 1):
        found.append(drawn(entry, defaults, fields, study.shop.loaded.model, rng) | dict(entry.settings))
    return found


def drawn(entry: Entry, defaults: Any, fields: set[str], model: nn.Module, rng: np.random.Generator) -> dict[str, Any]:
    """One random trial; what the method refuses is drawn again, a few times."""
    spread = 2 ** rng.uniform(-1, 1) if entry.method.name == "cluster" else 10 ** rng.uniform(-1, 1)
    passes, kind = float(rng.choice([0.5, 1.0, 2.0])), str(rng.choice(["nll", "kl"]))
    one: dict[str, Any] = {}
    if "learning_rate" in fields:
        rate = defaults.learning_rate
        one["learning_rate"] = float((rate if rate is not None else sized_rate(model, 1e-5)) * spread)
        if "epochs" in fields:
            one["epochs"] = float(defaults.epochs * passes)
        if getattr(defaults, "retain", None) in ("nll", "kl"):
            one["retain"] = kind
        return one
    for _ in range(10):
        numbers = {n: v for n in sorted(fields) if isinstance(v := getattr(defaults, n), float) and v > 0}
        one = {n: float(v * 4 ** rng.uniform(-1, 1)) for n, v in numbers.items()}
        try:
            entry.configured(one)
            return one
        except UserError:
            continue
    return {}


def validation(dataset: Dataset) -> Dataset:
    """As many other subjects to forget, chosen among those who stay in the measured study.

    The measured forget set is in no role of it, so that no trial sees it, not even as something to keep.

    Raises:
        UserError: too few subjects stay.
    """
    others = [s for s in subjects(dataset["retain"]) if s not in set(subjects(dataset["forget"]))]
    count = len(subjects(dataset["forget"]))
    if len(others) <= count:
        raise UserError(f"--tune needs more than {count} subjects in the retain set for validation: leave it out.")
    rng = np.random.default_rng(TUNING_SEED)
    chosen = [others[int(i)] for i in rng.permutation(len(others))[:count]]
    return by_subject(dataclasses.replace(dataset, roles={**dataset.roles, "forget": ()}), chosen)


def tuned(study: Study, trials: int) -> dict[str, dict[str, Any]]:
    """The best settings of each entry; every trial is recorded in ``tuning.json``."""
    dataset = validation(study.measured)
    quick = dataclasses.replace(study.options.evaluate, suite="quick")
    record: dict[str, Any] = {}
    if (study.run.folder / "tuning.json").exists():
        record = study.run.read_json("tuning.json")
    references = None
    for entry in study.entries:
        done: list[dict[str, Any]] = record.setdefault(entry.label, [])
        for number, settings in enumerate(draws(study, entry, trials)):
            if number < len(done):
                continue
            if references is None:
                references = study.references(dataset, 2, "tune", "~tune")
                original = study.shop.original(study.dataset, 0)
                adapter = study.shop.adapter
                start = evaluate(original, adapter, dataset, references=references, original="self", options=quick)
            study.announce(f"tune/{entry.label}, trial {number + 1} of {trials}")
            try:
                context = study.context(entry, copy.deepcopy(original), 0, dataset, f"tune/{entry.label}/{number}")
                outcome, cost = study.apply(context, *entry.whole(settings))
                found = evaluate(outcome.model, adapter, dataset, references=references, original=start, options=quick)
                spent = cost.record(study.shop.retraining("~tune"))
                scored = score(found.metrics, spent["share_of_retraining"] or 0.0)
                done.append({"settings": settings, "score": scored, "metrics": found.record(), "cost": spent})
            except Exception as error:
                done.append(
                    {"settings": settings, "score": None, "failed": study.failure(f"tune/{entry.label}", error)}
                )
            study.run.write_json("tuning.json", record)
    best: dict[str, dict[str, Any]] = {}
    for entry in study.entries:
        good = [t for t in record[entry.label] if t["score"] is not None]
        if not good:
            raise UserError(f"every trial of '{entry.label}' failed: {record[entry.label][0]['failed']}")
        best[entry.label] = max(good, key=lambda t: float(t["score"]))["settings"]
    return best
