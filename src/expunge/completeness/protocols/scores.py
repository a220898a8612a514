"""Every score that a protocol compares, on the same numbers: one :class:`Case` is one target under one group.

Every score is higher the more of a sample is left. Shape suffixes: N samples, Z population, K shadows, M half models, V
classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from expunge.attacks.exam import Checkpoint
from expunge.completeness import iam, scoring
from expunge.completeness.calibration import Completeness, calibrate
from expunge.completeness.lira import Variance, confidence, lira_offline, lira_online, split_models
from expunge.completeness.protocols.world import Group, Halves, Target
from expunge.completeness.readings import Floats, Form, Readings
from expunge.completeness.rmia import rmia_offline, rmia_online, tuned_offset
from expunge.completeness.simple import emia_population, emia_reference, update_attack
from expunge.completeness.unleak import Learner, UnLeak
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.signals.distribution import class_probabilities

OFFSET = 0.3  # RMIA's a where no two shadows are there to tune it on


def losses(checkpoint: Checkpoint, samples: Sequence[Sample], unit: str = "token") -> Floats:
    """Mean negative log-likelihood, (N,): nats per target token, or nats per byte where tokenizers differ."""
    found = checkpoint.signals(samples)
    checkpoint.release()  # the numbers stay; dozens of models would not fit
    if unit == "byte":
        return np.array([s.bits_per_byte * np.log(2) for s in found])
    return np.array([s.loss for s in found])


def posteriors(checkpoint: Checkpoint, samples: Sequence[Sample]) -> Floats:
    """Class probabilities of a classifier, (N, V), in the order given."""
    return class_probabilities(checkpoint.model, checkpoint.adapter, samples)


@dataclass(frozen=True, eq=False)
class Case:
    """One target under one group. The losses of every model are read when first asked for."""

    target: Target
    group: Group
    halves: Halves | None = None
    form: Form = "classifier"
    unit: str = "token"

    def of(self, checkpoint: Checkpoint) -> Floats:
        return losses(checkpoint, self.target.samples, self.unit)

    def on_population(self, checkpoint: Checkpoint) -> Floats:
        return losses(checkpoint, self.group.population, self.unit)

    @cached_property
    def unlearned_N(self) -> Floats:
        return self.of(self.target.unlearned)

    @cached_property
    def original_N(self) -> Floats:
        return self.of(self.target.original)

    @cached_property
    def out_KN(self) -> Floats:
        return np.stack([self.of(s) for s in self.group.shadows])

    @cached_property
    def population_Z(self) -> Floats:
        return self.on_population(self.target.unlearned)

    @cached_property
    def out_KZ(self) -> Floats:
        return np.stack([self.on_population(s) for s in self.group.shadows])

    @cached_property
    def halves_MN(self) -> Floats:
        assert self.halves is not None
        return np.stack([self.of(m) for m in self.halves.models])

    @property
    def readings(self) -> Readings:
        """The same numbers as IAM takes them: losses of texts, probabilities of images."""

        def read(loss: Floats) -> Floats:
            return loss if self.form == "text" else np.asarray(np.exp(-loss))

        samples = self.target.samples
        return Readings(
            self.form,
            [s.id for s in samples],
            read(self.unlearned_N),
            read(self.out_KN),
            read(self.original_N),
            [s.subject for s in samples],
        )

    @cached_property
    def answer(self) -> Completeness:
        """Expunge's own answer; the population, which no model was trained on, is its holdout."""
        population = replace(self, target=replace(self.target, samples=self.group.population, posteriors={}))
        return calibrate(self.readings, holdout=population.readings)

    def offline(self) -> Readings:
        """The readings with the shadows' typical reading of their own training samples in the original's place."""
        own = [losses(s, part, self.unit) for s, part in zip(self.group.shadows, self.group.parts, strict=True)]
        values = np.concatenate(own) if self.form == "text" else np.exp(-np.concatenate(own))
        return iam.offline(self.readings, iam.typical(values, self.form))


# -- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One score. ``note`` is printed with it; ``missing`` says why a case cannot have it, or None."""

    name: str
    compute: Callable[[Case], Floats]
    note: str = ""
    needs: str = ""  # "halves" or "posteriors"

    def missing(self, case: Case) -> str | None:
        if self.needs == "halves" and case.halves is None:
            return "needs models trained on halves of the private samples"
        if self.needs == "posteriors" and case.group.origin is None:
            return "needs class probabilities and a shadow trained on the whole shadow set"
        return None


def _logit(loss: Floats) -> Floats:
    return confidence(np.exp(-loss))


def _iam(case: Case, offline: bool = False) -> Floats:
    found = iam.parity(case.offline() if offline else case.readings)
    return found if case.form == "text" else 1 - found


def _frozen(case: Case) -> Floats:
    return iam.score(case.readings, iam.fit(case.readings))


def _in_out(case: Case) -> tuple[Floats, Floats]:
    """(IN, OUT) losses of the half models and the group's shadows; nan where a model is of the other kind."""
    assert case.halves is not None
    inside, outside = split_models(case.halves_MN, case.halves.saw_MN)
    return inside, np.concatenate([outside, case.out_KN])


def _in_place_of_nan(values_N: Floats, usual: float) -> Floats:
    return np.where(np.isfinite(values_N), values_N, usual)


def _lira_online(case: Case, variance: Variance) -> Floats:
    inside, outside = _in_out(case)
    return lira_online(_logit(case.unlearned_N), _logit(inside), _logit(outside), variance)


def _lira_single(case: Case) -> Floats:
    return lira_online(_logit(case.unlearned_N), _logit(case.original_N)[None], _logit(case.out_KN), "fixed")


def _lira_offline(case: Case, variance: Variance) -> Floats:
    return lira_offline(_logit(case.unlearned_N), _logit(case.out_KN), variance)


def rmia_offset(case: Case) -> float:
    """RMIA's a, tuned on what the first shadow learnt and the second did not; :data:`OFFSET` with one shadow."""
    if "offset" not in case.group.learnt:
        case.group.learnt["offset"] = _tuned(case)
    return float(case.group.learnt["offset"])


def _tuned(case: Case) -> float:
    if len(case.group.shadows) < 2:
        return OFFSET
    (first, second), known = case.group.shadows[:2], {s.id for s in case.group.parts[1]}
    own = [s for s in case.group.parts[0] if s.id not in known]
    if not own:
        return OFFSET
    member_N, out_N = (np.exp(-losses(c, own, case.unit)) for c in (first, second))
    return tuned_offset(
        member_N, out_N[None], np.exp(-case.on_population(first)), np.exp(-case.on_population(second))[None]
    )


def _rmia_offline(case: Case) -> Floats:
    unlearned_N, out_KN, population_Z, out_KZ = (
        np.exp(-v) for v in (case.unlearned_N, case.out_KN, case.population_Z, case.out_KZ)
    )
    return rmia_offline(unlearned_N, out_KN, population_Z, out_KZ, offset=rmia_offset(case))


def _rmia_online(case: Case) -> Floats:
    inside, outside = _in_out(case)
    assert case.halves is not None
    on_Z = np.concatenate([case.out_KZ, np.stack([case.on_population(m) for m in case.halves.models])])
    return rmia_online(
        np.exp(-case.unlearned_N), np.exp(-inside), np.exp(-outside), np.exp(-case.population_Z), np.exp(-on_Z)
    )


def _rmia_single(case: Case) -> Floats:
    on_Z = np.concatenate([case.out_KZ, case.on_population(case.target.original)[None]])
    inside = np.exp(-case.original_N)[None]
    return rmia_online(
        np.exp(-case.unlearned_N), inside, np.exp(-case.out_KN), np.exp(-case.population_Z), np.exp(-on_Z)
    )


def _unleak(case: Case, learner: Learner) -> Floats:
    group, samples = case.group, case.target.samples
    if learner not in group.learnt:
        assert group.origin is not None
        whole_NV, parts, kept = posteriors(group.origin, group.whole), [], []
        for shadow, part in zip(group.shadows, group.parts, strict=True):
            parts.append(posteriors(shadow, group.whole))
            known = {s.id for s in part}
            kept.append([s.id in known for s in group.whole])
        kept_N: NDArray[np.bool_] = np.array(kept).ravel()
        wholes = np.concatenate([whole_NV] * len(parts))
        group.learnt[learner] = UnLeak(learner).fit(wholes, np.concatenate(parts), kept_N)
    attack: UnLeak = group.learnt[learner]
    pair = []
    for model in (case.target.original, case.target.unlearned):
        if model.name not in case.target.posteriors:
            case.target.posteriors[model.name] = posteriors(model, samples)
        pair.append(case.target.posteriors[model.name])
    return attack.score(*pair)


SINGLE = "single-IN: the original is the only model that saw the sample"
ROWS: tuple[Row, ...] = (
    Row("Expunge", lambda c: c.answer.score_N, "our score for ranking"),
    Row(
        "Expunge-completeness",
        lambda c: 1 - _in_place_of_nan(c.answer.completeness_N, 0.5),
        "1 - completeness; 1/2 where there is none",
    ),
    Row("Expunge-p", lambda c: 1 - _in_place_of_nan(c.answer.p_under_N, 0.5), "1 - conformal p of under-unlearned"),
    Row("IAM-On", _iam, "as published"),
    Row("IAM-Off", lambda case: _iam(case, offline=True), "as published, original not asked"),
    Row("IAM-frozen", _frozen, "our form: scale measured once, deviation per sample"),
    Row("LiRA-On", lambda c: _lira_online(c, "fixed"), "fixed variance, half models", "halves"),
    Row("LiRA-On-sample", lambda c: _lira_online(c, "sample"), "variance per sample, half models", "halves"),
    Row("LiRA-On-single", _lira_single, SINGLE),
    Row("LiRA-Off", lambda c: _lira_offline(c, "fixed"), "fixed variance"),
    Row("LiRA-Off-sample", lambda c: _lira_offline(c, "sample"), "variance per sample; fixed with one shadow"),
    Row("RMIA-On", _rmia_online, "gamma = 1, half models", "halves"),
    Row("RMIA-On-single", _rmia_single, f"gamma = 1; {SINGLE}"),
    Row("RMIA-Off", _rmia_offline, "gamma = 1, a tuned on shadows"),
    Row("EMIA-P", lambda c: emia_population(c.unlearned_N, c.population_Z)),
    Row("EMIA-R", lambda c: emia_reference(c.unlearned_N, c.out_KN)),
    Row("UpdateAtk", lambda c: update_attack(_logit(c.unlearned_N), _logit(c.original_N), _logit(c.out_KN))),
    Row("UnLeak-logistic", lambda c: _unleak(c, "logistic"), "sorted differences", "posteriors"),
    Row("UnLeak-mlp", lambda c: _unleak(c, "mlp"), "sorted differences", "posteriors"),
    *(
        Row(name, lambda c, name=name: scoring.simple_scores(c.readings)[name])  # type: ignore[misc]
        for name in ("prob", "loss", "prob-difference", "loss-difference", "gap-ratio", "prob-ratio")
    ),
)
SCORING_ROWS: tuple[Row, ...] = (
    Row("Expunge", lambda c: c.answer.score_N, "our score for ranking"),
    Row(
        "Expunge-completeness",
        lambda c: 1 - _in_place_of_nan(c.answer.completeness_N, 0.5),
        "1 - completeness; 1/2 where there is none",
    ),
    Row("Expunge-p", lambda c: 1 - _in_place_of_nan(c.answer.p_under_N, 0.5), "1 - conformal p of under-unlearned"),
    *(
        Row(f"line-{name}", lambda c, name=name: scoring.score(scoring.ladder(c.readings, name), name))  # type: ignore[misc]
        for name in scoring.SCORINGS
        if name != "taylor"
    ),
    *(row for row in ROWS if row.name in ("IAM-On", "IAM-frozen", "prob", "loss")),
)


def scores_of(case: Case, rows: Sequence[Row] = ROWS) -> tuple[dict[str, Floats], dict[str, str]]:
    """(scores by name, reasons by name of those that cannot be had)."""
    found: dict[str, Floats] = {}
    left_out: dict[str, str] = {}
    for row in rows:
        reason = row.missing(case)
        if reason is None:
            try:
                found[row.name] = row.compute(case)
            except UserError as error:
                reason = str(error)
        if reason is not None:
            left_out[row.name] = reason
    return found, left_out
