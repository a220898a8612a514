"""Metrics of image classifiers: tug of war, average gap, membership by a support vector machine, ZRF.

Each is a function of one model's numbers per sample, and of the retrained reference's where there is one. Lower is
never better by itself: what counts is the distance from the reference, in either direction.

Shape suffixes: N samples, F features, V classes, T terms, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expunge.errors import UserError, unknown
from expunge.metrics.registry import metric
from expunge.signals.record import Signals
from expunge.stats import (
    LEVEL,
    RESAMPLES,
    Estimate,
    Groups,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_means,
    group_codes,
    percentile_interval,
)

Floats = NDArray[np.float64]
Feature = Literal["confidence", "correctness", "entropy"]
Learner = Literal["svc", "logistic"]
MOST = 1000  # samples of each side that a learner is fitted on; the cost of a kernel machine grows with the square


def feature(signals: Sequence[Signals], kind: Feature = "confidence") -> Floats:
    """One number per sample, (N,): probability of its class, whether the class is the arg-max, or entropy in nats."""
    if kind not in get_args(Feature):
        raise unknown("membership feature", kind, get_args(Feature))
    if kind == "confidence":
        return np.array([s.prob for s in signals], dtype=np.float64)
    columns = [s.hit_L if kind == "correctness" else s.entropy_L for s in signals]
    return np.array([np.mean(c, dtype=np.float64) if len(c) else np.nan for c in columns], dtype=np.float64)


def modified_entropy(probs_NV: Floats, labels_N: ArrayLike) -> Floats:
    """-(1 - p_y) log p_y - sum over k != y of p_k log(1 - p_k), nats, (N,) (Song and Mittal 2021).

    It grows as the probability leaves the right class, where the entropy takes sure and wrong for sure and right.
    """
    places = np.arange(len(probs_NV))
    labels = np.asarray(labels_N, dtype=np.intp)
    inside_NV = np.clip(np.asarray(probs_NV, dtype=np.float64), 1e-30, 1.0)
    away_NV = np.clip(1.0 - np.asarray(probs_NV, dtype=np.float64), 1e-30, 1.0)
    terms_NV = -probs_NV * np.log(away_NV)
    own_N = -(1.0 - probs_NV[places, labels]) * np.log(inside_NV[places, labels])
    return np.asarray(own_N + terms_NV.sum(axis=1) - terms_NV[places, labels])


# -- beside the reference ------------------------------------------------------------------------------------------


def gap_to_reference(
    own_N: ArrayLike, reference_N: ArrayLike, groups: Groups = None, *, definition: str, level: float = LEVEL
) -> Estimate:
    """|mean of own - mean of the reference's| over the same samples, with the paired interval over subjects."""
    apart_N = np.asarray(own_N, dtype=np.float64) - np.asarray(reference_N, dtype=np.float64)
    return bootstrap_difference(apart_N, groups, level=level, definition=definition).distance_from(0.0)


def _gaps(
    own: Mapping[str, ArrayLike],
    reference: Mapping[str, ArrayLike],
    groups: Mapping[str, Groups],
    resamples: int,
    seed: int,
) -> tuple[Floats, Floats, int, bool]:
    """|own - reference| of every role's mean, (T,), its draws (R, T), samples, whether every role has subjects."""
    if set(own) != set(reference) or not own:
        raise UserError(
            f"own model has {', '.join(own) or 'no role'} and the reference {', '.join(reference) or 'no role'}: "
            "give the same roles for both."
        )
    values, draws, num, several = [], [], 0, True
    for number, role in enumerate(own):
        first, second = (np.asarray(side[role], dtype=np.float64).ravel() for side in (own, reference))
        if first.shape != second.shape:
            raise UserError(
                f"{role}: {len(first)} samples of the model and {len(second)} of the reference: give the same."
            )
        apart_N = first - second
        values.append(abs(float(np.nanmean(apart_N))) if np.isfinite(apart_N).any() else np.nan)
        draws.append(np.abs(bootstrap_means(apart_N, groups.get(role), resamples, seed + number)))
        codes_N = group_codes(groups.get(role), len(apart_N))
        several &= len(set(codes_N.tolist())) > 1
        num += int(np.isfinite(apart_N).sum())
    return np.array(values), np.stack(draws, axis=1), num, several


@metric(
    name="tow",
    definition="tow/1, tow-mia/1",
    formula="product over forget, retain and holdout of 1 - |accuracy - accuracy of the retrained model|",
    direction="1 is best: as accurate as the retrained model in every role",
    source="RUM (Zhao et al. 2024, arXiv:2406.01257); tow-mia: MIA efficacy stands for the accuracy on forget",
)
def tug_of_war(
    own: Mapping[str, ArrayLike],
    reference: Mapping[str, ArrayLike],
    groups: Mapping[str, Groups],
    *,
    definition: str = "tow/1",
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Tug of war: forgetting, keeping and generalising, each measured by its distance from the retrained model.

    ``own``, ``reference``: per role one number in [0, 1] per sample (is it right; for tow-mia on forget: is it taken
    for a non-member; with several references their mean). Absolute differences never cancel, so with few samples the
    interval lies below 1 even for two retrained models. Says nothing of single samples.
    """
    gaps_T, draws_RT, num, several = _gaps(own, reference, groups, resamples, seed)
    bounds = percentile_interval((1 - draws_RT).prod(axis=1), level) if several else (np.nan, np.nan)
    return Estimate(float((1 - gaps_T).prod()), *bounds, num, definition)


@metric(
    name="average_gap",
    definition="average_gap/1",
    formula="mean over forget, retain, holdout accuracy and MIA efficacy of |own - retrained|",
    direction="0 is best",
    source="SalUn (Fan et al. 2024, arXiv:2310.12508), there in percent",
)
def average_gap(
    own: Mapping[str, ArrayLike],
    reference: Mapping[str, ArrayLike],
    groups: Mapping[str, Groups],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean distance from the retrained model over what SalUn reports: three accuracies and the MIA efficacy.

    Arguments as :func:`tug_of_war`, with the per-sample decisions of the MIA as a fourth role.
    """
    gaps_T, draws_RT, num, several = _gaps(own, reference, groups, resamples, seed)
    bounds = percentile_interval(draws_RT.mean(axis=1), level) if several else (np.nan, np.nan)
    return Estimate(float(gaps_T.mean()), *bounds, num, "average_gap/1")


# -- membership ----------------------------------------------------------------------------------------------------


def _learner(kind: Learner) -> Any:
    """A fresh classifier; classes weigh the same whatever their sizes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    if kind not in get_args(Learner):
        raise unknown("membership learner", kind, get_args(Learner))
    # SalUn's machine: radial kernel, C = 3, gamma = 1 / number of features.
    if kind == "svc":
        return SVC(C=3.0, gamma="auto", class_weight="balanced")
    return LogisticRegression(C=1e3, class_weight="balanced")


def _table(values: ArrayLike, groups: Groups) -> tuple[Floats, NDArray[np.intp]]:
    """At most MOST finite rows, (N, F), evenly spread, with their group numbers."""
    array = np.asarray(values, dtype=np.float64)
    table_NF = array[:, None] if array.ndim == 1 else array
    codes_N = group_codes(groups, len(table_NF))
    kept = np.flatnonzero(np.isfinite(table_NF).all(axis=1))
    if len(kept) > MOST:
        kept = kept[np.arange(MOST) * len(kept) // MOST]
    return table_NF[kept], codes_N[kept]


@metric(
    name="u_mia",
    definition="u_mia-{learner}/1",
    formula="balanced accuracy, out of fold, of a learner that tells members from non-members by their confidence",
    direction="0.5 is best for forget against holdout; compare with the reference",
    source="NeurIPS 2023 unlearning challenge and SCRUB (Kurmanji et al. 2023): logistic; SalUn's machine: svc",
)
def membership_accuracy(
    members: ArrayLike,
    others: ArrayLike,
    member_groups: Groups = None,
    other_groups: Groups = None,
    *,
    learner: Learner = "svc",
    folds: int = 5,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """How often a learner tells members from non-members by numbers of one model, cross-validated.

    ``members``, ``others``: (N,) or (N, F) each, usually the confidence on forget and on holdout.
    Subjects stay together in a fold where both sides have enough of them. A confidence on forget that is too low is
    learnt as well as one that is too high, so both kinds of trace show above 0.5. Failure of one learner is no proof.

    Raises:
        UserError: fewer than two folds asked for.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    name = f"u_mia-{learner}/1"
    if folds < 2:
        raise UserError(f"{folds} folds cannot be told apart: give at least 2.")
    (inside_NF, in_codes), (outside_NF, out_codes) = _table(members, member_groups), _table(others, other_groups)
    sizes = [len(inside_NF), len(outside_NF)]
    if min(sizes) < 2:
        return Estimate(np.nan, n=sum(sizes), definition=name, note="too few samples on one side")
    table_NF = np.concatenate([inside_NF, outside_NF])
    label_N = np.repeat([1, 0], sizes)
    subject_N = np.concatenate([in_codes, out_codes + in_codes.max() + 1])
    together = min(len(set(in_codes.tolist())), len(set(out_codes.tolist()))) >= folds
    splitter: Any = StratifiedGroupKFold if together else StratifiedKFold
    cuts: Any = splitter(min(folds, *sizes), shuffle=True, random_state=seed).split(
        table_NF, label_N, subject_N if together else None
    )
    right_N = np.full(len(label_N), np.nan)
    for train, test in cuts:
        if len(set(label_N[train].tolist())) < 2:
            continue
        fitted = _learner(learner).fit(table_NF[train], label_N[train])
        right_N[test] = fitted.predict(table_NF[test]) == label_N[test]
    halves = right_N[: sizes[0]], right_N[sizes[0] :]
    value = float(np.mean([np.nanmean(half) for half in halves]))
    several = min(len(set(in_codes.tolist())), len(set(out_codes.tolist()))) > 1
    if not several:  # one subject says nothing about other subjects
        return Estimate(value, n=sum(sizes), definition=name)
    draws = [
        bootstrap_means(half, codes.tolist(), resamples, seed + side)
        for side, (half, codes) in enumerate(zip(halves, (in_codes, out_codes), strict=True))
    ]
    low, high = percentile_interval((draws[0] + draws[1]) / 2, level)
    return Estimate(value, low, high, sum(sizes), name)


@dataclass(frozen=True, slots=True, eq=False)
class Efficacy:
    """``efficacy``: share of forget taken for non-members. ``attack``: how good the attacker is on retain and holdout.

    ``outside_N``: 1 where a forget sample is taken for a non-member; nan where the attacker has nothing to go by.
    """

    efficacy: Estimate
    attack: Estimate
    outside_N: Floats


@metric(
    name="mia_efficacy",
    definition="mia_efficacy-svc-{feature}/1",
    formula="share of forget that an SVC (rbf, C = 3), fitted on retain against holdout, takes for non-members",
    direction="two-sided: the gap to the retrained model's efficacy; meaningless where the attack is at 0.5",
    source="SalUn (Fan et al. 2024), after Song and Mittal 2021 and Jia et al. 2023",
)
def mia_efficacy(
    forget: ArrayLike,
    retain: ArrayLike,
    holdout: ArrayLike,
    forget_groups: Groups = None,
    retain_groups: Groups = None,
    holdout_groups: Groups = None,
    *,
    kind: str = "confidence",
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Efficacy:
    """Whether an attacker who knows members and non-members of the unlearned model counts forget among the latter.

    1 is no proof of forgetting: a model that is unsure of forget alone gets it too, and so does one whose members and
    non-members look alike. Read it beside ``attack`` (cross-validated, 0.5 = blind) and the reference's efficacy.
    """
    name = f"mia_efficacy-svc-{kind}/1"
    attack = membership_accuracy(
        retain, holdout, retain_groups, holdout_groups, level=level, resamples=resamples, seed=seed
    )
    (inside_NF, _), (outside_NF, _) = _table(retain, None), _table(holdout, None)
    asked = np.asarray(forget, dtype=np.float64)
    asked_NF = asked[:, None] if asked.ndim == 1 else asked
    found_N = np.full(len(asked_NF), np.nan)
    both_NF = np.concatenate([inside_NF, outside_NF])
    if min(len(inside_NF), len(outside_NF)) < 1 or np.all(both_NF == both_NF[0]):
        note = "retain and holdout cannot be told apart by this number"
        return Efficacy(Estimate(np.nan, definition=name, note=note), attack, found_N)
    fitted = _learner("svc").fit(both_NF, np.repeat([1, 0], [len(inside_NF), len(outside_NF)]))
    finite = np.isfinite(asked_NF).all(axis=1)
    if finite.any():
        found_N[finite] = fitted.predict(asked_NF[finite]) == 0
    mean = bootstrap_mean(found_N, forget_groups, level=level, resamples=resamples, seed=seed, definition=name)
    return Efficacy(mean, attack, found_N)


# -- zero retrain forgetting ---------------------------------------------------------------------------------------


def jensen_shannon(first_NV: ArrayLike, second_NV: ArrayLike) -> Floats:
    """Jensen-Shannon divergence of each pair of rows in bits, in [0, 1], (N,).

    Raises:
        UserError: the two are not tables of the same shape.
    """
    p_NV, q_NV = np.asarray(first_NV, dtype=np.float64), np.asarray(second_NV, dtype=np.float64)
    if p_NV.shape != q_NV.shape or p_NV.ndim != 2:
        raise UserError(f"distributions are compared as (N, V) tables of one shape: {p_NV.shape}, {q_NV.shape} given.")
    middle_NV = (p_NV + q_NV) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(side > 0, side * np.log2(side / middle_NV), 0.0) for side in (p_NV, q_NV)]
    return np.asarray(np.clip((terms[0] + terms[1]).sum(axis=1) / 2, 0.0, 1.0))


@metric(
    name="zrf",
    definition="zrf-bits/1",
    formula="1 - mean over forget of JS(model, incompetent teacher), in bits",
    direction="two-sided: the retrained model's own; 1 means as random as the teacher",
    source="Chundawat et al. 2023 (arXiv:2205.08096); the teacher has random weights",
)
def zero_retrain_forgetting(
    probs_NV: ArrayLike, teacher_NV: ArrayLike, groups: Groups = None, level: float = LEVEL
) -> Estimate:
    """How close the model's class probabilities on forget are to those of a model that has learnt nothing.

    Needs no retrained model, but a retrained model does not score 1 either: it generalises. In bits and summed over
    classes, so that 0 and 1 are reached; a mean over classes, as in common code, is near 1 for every model.
    """
    return bootstrap_mean(1 - jensen_shannon(probs_NV, teacher_NV), groups, level=level, definition="zrf-bits/1")
