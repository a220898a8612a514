"""Dataset inference: all texts of a subject together, where single texts say little (Maini et al. 2024).

Several scores of a text are put into one number, with weights learnt from known members and unseen texts outside of
the evaluation. A subject is the mean of its texts. It is compared with the subjects of the holdout set, since texts
of one subject are alike and must not count as independent.

Shape suffixes: N texts, F features, S subjects, R permutations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy import stats as scipy_stats

from expunge.attacks import features
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.membership import (
    WORDS,
    measured,
    min_k_plus_plus_score,
    min_k_score,
    surp_score,
    zlib_score,
)
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.options import option
from expunge.stats import Estimate, clopper_pearson

SCORES = (zlib_score, min_k_score, min_k_plus_plus_score, surp_score)
FEWEST_MEMBERS = 8  # known members below which no weights are learnt

Floats = NDArray[np.float64]


def matrix(exam: Exam, checkpoint: Checkpoint, samples: Sequence[Sample]) -> Floats:
    """All CAMIA features (the loss among them) and the other scores of each text, higher = more a member, (N, F)."""
    signals = checkpoint.signals(samples)
    own = np.array([[score(s) for score in SCORES] for s in signals], dtype=np.float64).reshape(-1, len(SCORES))
    return np.concatenate([features.table(exam, checkpoint, samples), own], axis=1)


@dataclass(frozen=True)
class Weights:
    """``(x - centre_F) / spread_F @ weight_F``; a feature that a text lacks counts as average."""

    centre_F: Floats
    spread_F: Floats
    weight_F: Floats

    def score(self, values_NF: Floats) -> Floats:
        """One number per text, (N,); nan where a text has no feature at all."""
        standard_NF = (values_NF - self.centre_F) / self.spread_F
        known_NF = np.isfinite(standard_NF)
        score_N: Floats = np.where(known_NF, standard_NF, 0.0) @ self.weight_F
        return np.where(known_NF.any(1), score_N, math.nan)


def learn(unseen_NF: Floats, members_NF: Floats, ridge: float) -> Weights:
    """Weights that tell known members from unseen texts: ridge regression with weights of at least 0.

    Every feature is turned so that higher means member, so a negative weight could only be an accident of few texts.
    Features are standardised by the unseen texts. Fewer than 8 members, or no feature that tells the two apart, give
    equal weights.
    """
    everyone = np.concatenate([unseen_NF, members_NF])
    usable_F = (np.isfinite(unseen_NF).sum(0) >= 2) & np.isfinite(everyone).any(0)
    counted_NF = np.where(np.isfinite(unseen_NF), unseen_NF, math.nan)[:, usable_F]
    centre_F, spread_F, weight_F = np.zeros(len(usable_F)), np.ones(len(usable_F)), usable_F.astype(np.float64)
    centre_F[usable_F] = np.nanmean(counted_NF, axis=0)
    deviation = np.nanstd(counted_NF, axis=0)
    # A feature that is the same in all unseen texts has no scale of its own.
    spread_F[usable_F] = np.where(deviation > 1e-9, deviation, 1.0)
    weight_F /= max(1.0, weight_F.sum())
    if len(members_NF) >= FEWEST_MEMBERS:
        plain = Weights(centre_F, spread_F, weight_F)
        standard_NF = np.nan_to_num((everyone - plain.centre_F) / plain.spread_F, nan=0.0, posinf=0.0, neginf=0.0)
        label_N = np.concatenate([np.zeros(len(unseen_NF)), np.ones(len(members_NF))])
        # Both sides weigh the same, however many there are of each.
        side_N = np.where(label_N == 1, 1 / len(members_NF), 1 / len(unseen_NF))
        inputs_NF = standard_NF * usable_F
        inputs_NF = (inputs_NF - np.average(inputs_NF, axis=0, weights=side_N)) * np.sqrt(side_N)[:, None]
        wanted_N = (label_N - 0.5) * np.sqrt(side_N)
        padded = np.concatenate([inputs_NF, math.sqrt(ridge) * np.eye(len(usable_F))])
        learnt_F, _ = optimize.nnls(padded, np.concatenate([wanted_N, np.zeros(len(usable_F))]))
        if learnt_F.sum() > 0:
            weight_F = learnt_F / learnt_F.sum()
    return Weights(centre_F, spread_F, weight_F)


def subject_means(scores_N: Sequence[float] | Floats, subjects: Sequence[str]) -> dict[str, float]:
    """Mean score of each subject's texts, texts without a score left out; subjects in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for score, subject in zip(scores_N, subjects, strict=True):
        groups.setdefault(subject, []).append(float(score))
    known = {subject: [s for s in found if not math.isnan(s)] for subject, found in groups.items()}
    return {subject: float(np.mean(found)) if found else math.nan for subject, found in known.items()}


def against(value: float, others: Sequence[float]) -> tuple[float, float, float]:
    """(t, one-sided p of t, rank p) of one subject against the holdout subjects, as one more draw from them.

    t = (value - mean) / (sd sqrt(1 + 1/S)) with S - 1 degrees of freedom: the prediction interval of a normal sample.
    Rank p = (1 + number at least as high) / (1 + S) is exact for exchangeable subjects. nan for fewer than two.
    """
    known = np.array([x for x in others if not math.isnan(x)])
    if math.isnan(value) or len(known) < 2:
        return math.nan, math.nan, math.nan
    rank_p = (1 + int(np.sum(known >= value))) / (1 + len(known))
    spread = float(known.std(ddof=1)) * math.sqrt(1 + 1 / len(known))
    t = (value - float(known.mean())) / max(spread, 1e-12)  # finite also where all holdout subjects are alike
    return t, float(scipy_stats.t.sf(t, len(known) - 1)), rank_p


def permutation_p(first: Sequence[float], second: Sequence[float], resamples: int, rng: np.random.Generator) -> float:
    """One-sided p-value that the mean of ``first`` is not above that of ``second``, subjects shuffled.

    (1 + number of shuffles with at least the difference) / (1 + R); nan when a side is empty.
    """
    one, two = (np.array([x for x in side if not math.isnan(x)]) for side in (first, second))
    if not len(one) or not len(two):
        return math.nan
    pooled = np.concatenate([one, two])
    places_RS = rng.permuted(np.tile(np.arange(len(pooled)), (resamples, 1)), axis=1)[:, : len(one)]
    sums_R = pooled[places_RS].sum(1)  # the sum of the first side orders shuffles as the difference does
    return float((1 + np.sum(sums_R >= one.sum() - 1e-12 * np.abs(pooled).sum())) / (1 + resamples))


def holm_bonferroni_count(p_values: Sequence[float], level: float) -> int:
    """How many hypotheses Holm's procedure (1979) rejects at family-wise level ``level``."""
    known = sorted(p for p in p_values if not math.isnan(p))
    for rank, p in enumerate(known):
        if p > level / (len(known) - rank):
            return rank
    return len(known)


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Options of dataset inference."""

    level: float = option(0.05, "family-wise level at which a subject counts as found")
    ridge: float = option(0.1, "ridge penalty of the weights; features are standardised")


@attack(
    name="dataset_inference",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Maini et al. 2024, arXiv:2406.06443",
    formula="text = weighted scores; subject = mean of its texts; t and rank of it among the holdout subjects",
    options=InferenceOptions,
    passes=1.0,  # over the unseen texts and known members outside of the evaluation
    needs=("holdout", "aux"),
    modalities=WORDS,
)
def dataset_inference(exam: Exam, checkpoint: Checkpoint, options: InferenceOptions) -> Finding:
    """All texts of a subject together, against the subjects of the holdout set.

    A text's scores are the features of CAMIA, zlib, Min-K%, Min-K%++ and SURP. Every sample gets the t of its
    subject; a holdout subject is compared with the other holdout subjects. Details carry each subject's p-values,
    figures the share of subjects found and the p-value of a permutation of all of them. Weights are learnt anew for
    every checkpoint, from texts outside of the evaluation.
    """
    unseen_NF, members_NF = (matrix(exam, checkpoint, texts) for texts in (exam.aux, exam.trained))
    weights = learn(unseen_NF, members_NF, options.ridge)
    means: dict[Role, dict[str, float]] = {}
    for role in measured(exam):
        samples = exam.samples[role]
        means[role] = subject_means(weights.score(matrix(exam, checkpoint, samples)), [s.subject for s in samples])
    seen = set(means["holdout"])
    results = {
        role: {
            subject: against(value, [m for other, m in means["holdout"].items() if other != subject])
            for subject, value in found.items()
        }
        for role, found in means.items()
    }
    scores = {role: [found[s.subject][0] for s in exam.samples[role]] for role, found in results.items()}
    found = results["forget"]
    counts = {s.subject: sum(other.subject == s.subject for other in exam.forget) for s in exam.forget}
    details = {}
    for sample in exam.forget:
        values = zip(("t", "p", "rank_p"), found[sample.subject], strict=True)
        numbers = {name: None if math.isnan(x) else x for name, x in values}
        details[sample.id] = {"subject": sample.subject, "subject_texts": counts[sample.subject], **numbers}
    p_all = permutation_p(
        list(means["forget"].values()), list(means["holdout"].values()), exam.resamples, exam.rng("dataset_inference")
    )
    tested = [p for _, p, _ in found.values() if not math.isnan(p)]
    hits = holm_bonferroni_count(tested, options.level)
    figures = {
        "dataset_inference.p_value": Estimate(p_all, n=len(found) + len(seen), definition="subject-permutation-p/1"),
        "dataset_inference.subjects_found": clopper_pearson(
            hits, len(tested), level=exam.level, definition="subjects-found-holm/1"
        ),
    }
    notes = []
    if len(exam.trained) < FEWEST_MEMBERS:
        notes.append(f"dataset_inference: only {len(exam.trained)} known members outside of the evaluation, so all "
                     "scores weigh the same")  # fmt: skip
    if len(seen) < 20:
        notes.append(f"dataset_inference: {len(seen)} holdout subjects, so no rank p-value can be below "
                     f"{1 / (1 + len(seen)):.2g}")  # fmt: skip
    return Finding({"dataset_inference": scores}, figures, details, notes)
