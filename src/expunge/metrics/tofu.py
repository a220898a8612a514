"""The metrics of TOFU (Maini et al. 2024) under named definitions, since its own code has two truth ratios.

All are functions of mean losses per token (nats): of the answer, of the answer in other words ("paraphrased"), and
of wrong answers ("perturbed"). Ratios are kept as logarithms: after gradient ascent a loss of 1000 is common.

Shape suffix: N items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logsumexp

from expunge.data.samples import Sample
from expunge.errors import UserError, unknown
from expunge.metrics.registry import metric
from expunge.signals.record import Signals
from expunge.stats import (
    LEVEL,
    RESAMPLES,
    Estimate,
    Groups,
    bootstrap_mean,
    bootstrap_means,
    kolmogorov_smirnov,
    percentile_interval,
)

Floats = NDArray[np.float64]
Ratio = Literal["geometric", "arithmetic", "openunlearning"]
Score = Literal["closer_to_1_better", "true_better", "prob_mean"]
OPENUNLEARNING_EPSILON = 1e-10  # added to denominators by OpenUnlearning; it decides once a loss exceeds 20

# What TOFU's logs call the sets, and whether the probability is normalised by the wrong answers there.
LOG_SETS = {
    "forget": ("eval_log_forget.json", False),
    "retain": ("eval_log.json", False),
    "real_authors": ("eval_real_author_wo_options.json", True),
    "world_facts": ("eval_real_world_wo_options.json", True),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TofuSet:
    """Per-item numbers of one set. nan, or no perturbed answers, means: not measured.

    ``options``: the perturbed answers are the other options of a multiple choice, so that the probability is the
    share of the right one (real authors and world facts).
    """

    loss_N: Floats
    paraphrased_N: Floats
    perturbed: tuple[Floats, ...]
    rouge_N: Floats
    groups: tuple[str, ...] | None = None
    options: bool = False

    def probabilities(self) -> Floats:
        """Probability of each answer, among the options where there are some."""
        return option_probability(self.loss_N, self.perturbed) if self.options else np.exp(-self.loss_N)

    def log_ratios(self, ratio: Ratio = "geometric") -> Floats:
        return log_truth_ratio(self.paraphrased_N, self.perturbed, ratio)


# -- per item ------------------------------------------------------------------------------------------------------


def option_probability(loss_N: ArrayLike, perturbed: Sequence[ArrayLike]) -> Floats:
    """p(right) / (p(right) + sum p(wrong)) with length-normalised probabilities, (N,); nan without wrong answers."""
    right_N = -np.asarray(loss_N, dtype=np.float64)
    wrong_N = np.array([_log_sum(wrong) for wrong in perturbed], dtype=np.float64).reshape(right_N.shape)
    share_N: Floats = expit(right_N - wrong_N)
    return share_N


def log_truth_ratio(paraphrased_N: ArrayLike, perturbed: Sequence[ArrayLike], ratio: Ratio = "geometric") -> Floats:
    """log(P(wrong) / P(right in other words)) of each item, (N,).

    "geometric": wrong answers averaged as losses: exp(paraphrased - mean(perturbed)). TOFU's evaluate_util.py (the
    ``truth_ratio`` field of its logs) and aggregate_eval_stat.py (which tests its reciprocal; KS is the same).
    "arithmetic": wrong answers averaged as probabilities: mean(exp(-perturbed)) / exp(-paraphrased). The
    paper's formula, and get_model_utility in TOFU's utils.py.
    "openunlearning": geometric, with 1e-10 added to the denominator as in OpenUnlearning.
    """
    right_N = np.asarray(paraphrased_N, dtype=np.float64)
    if len(right_N) != len(perturbed):
        raise UserError(f"{len(right_N)} paraphrased but {len(perturbed)} perturbed answers: give both per item.")
    if ratio not in get_args(Ratio):
        raise unknown("truth ratio", ratio, get_args(Ratio))
    if ratio == "arithmetic":
        counts_N = np.array([max(1, np.size(wrong)) for wrong in perturbed], dtype=np.float64)
        wrong_N = np.array([_log_sum(wrong) for wrong in perturbed], dtype=np.float64).reshape(right_N.shape)
        return wrong_N - np.log(counts_N) + right_N
    wrong_N = -np.array(
        [float(np.mean(np.asarray(w, dtype=np.float64))) if np.size(w) else np.nan for w in perturbed], dtype=np.float64
    )
    wrong_N = wrong_N.reshape(right_N.shape)
    if ratio == "openunlearning":
        return wrong_N - np.logaddexp(-right_N, np.log(OPENUNLEARNING_EPSILON))
    return wrong_N + right_N


def truth_scores(log_ratio_N: ArrayLike, score: Score, epsilon: float = 0.0) -> Floats:
    """Each log ratio, log R, as a score in [0, 1] in which higher is better.

    "closer_to_1_better": min(R, 1/R), for the forget set. "true_better": max(0, 1 - R), for all others.
    "prob_mean": p(right) / (p(right) + p(wrong)) = 1 / (1 + R). ``epsilon`` is added to R in 1/R.
    """
    log_r_N = np.asarray(log_ratio_N, dtype=np.float64)
    if score == "closer_to_1_better":
        inverse_N = -np.logaddexp(log_r_N, np.log(epsilon)) if epsilon else -log_r_N
        return np.asarray(np.exp(np.minimum(log_r_N, inverse_N)), dtype=np.float64)
    if score == "true_better":
        return np.asarray(np.maximum(0.0, -np.expm1(np.minimum(log_r_N, 0.0))), dtype=np.float64)
    if score == "prob_mean":
        return np.asarray(expit(-log_r_N), dtype=np.float64)
    raise unknown("truth ratio score", score, get_args(Score))


def _log_sum(losses: ArrayLike) -> float:
    array = np.asarray(losses, dtype=np.float64)
    return float(logsumexp(-array)) if array.size else np.nan


# -- aggregates ----------------------------------------------------------------------------------------------------


@metric(
    name="prob",
    definition="prob/1",
    formula="mean exp(-loss); with options p(right) / (p(right) + sum p(wrong))",
    direction="forget: two-sided to the reference; retain and utility: higher is better",
    source="TOFU (Maini et al. 2024)",
)
def probability(items: TofuSet) -> Estimate:
    """Mean length-normalised probability of the answers.

    Shows how likely the very wording is. Lower than the retrained reference is a trace of the forgetting itself.
    """
    return bootstrap_mean(
        items.probabilities(), items.groups, definition="prob-options/1" if items.options else "prob/1"
    )


@metric(
    name="truth_ratio",
    definition="truth_ratio-geometric-closer_to_1_better/1 (forget), -true_better/1 (others)",
    formula="R = P(wrong) / P(right in other words); mean min(R, 1/R), max(0, 1 - R) or 1 / (1 + R)",
    direction="higher is better within its score; two-sided to the reference on forget",
    source="TOFU (Maini et al. 2024), paper and code; OpenUnlearning (Dorna et al. 2025)",
)
def truth_ratio(items: TofuSet, score: Score = "closer_to_1_better", ratio: Ratio = "geometric") -> Estimate:
    """Whether the truth in other words is still preferred to well-formed wrong answers.

    Sees knowledge beyond the wording. min(R, 1/R) reads 1 only when the truth is exactly as likely as the lies,
    which a retrained model need not be: compare with the reference, not with 1.
    """
    epsilon = OPENUNLEARNING_EPSILON if ratio == "openunlearning" else 0.0
    scores_N = truth_scores(items.log_ratios(ratio), score, epsilon)
    return bootstrap_mean(scores_N, items.groups, definition=f"truth_ratio-{ratio}-{score}/1")


@dataclass(frozen=True, slots=True)
class ForgetQuality:
    """Both readings of the KS test between the truth ratios of an unlearned and of a retrained model."""

    p_value: Estimate
    ks_distance: Estimate


@metric(
    name="forget_quality",
    definition="forget_quality-geometric/1",
    formula="two-sample KS of per-item truth ratios, unlearned against reference: p-value; sup|F - G| with DKW bound",
    direction="distance: 0 is best, the upper bound is the claim; p-value: high means only that no difference was seen",
    source="TOFU (Maini et al. 2024); bound: Massart 1990",
)
def forget_quality(
    unlearned: TofuSet, reference: TofuSet, ratio: Ratio = "geometric", level: float = LEVEL
) -> ForgetQuality:
    """KS test of the truth ratios on the forget set against those of the retrained model.

    The p-value depends on the number of items and is no evidence of equality; the distance with its upper bound is.
    Items are taken as independent, which several questions about one author are not.
    """
    first, second = unlearned.log_ratios(ratio), reference.log_ratios(ratio)  # KS does not change under exp
    found = kolmogorov_smirnov(first, second, level=level, definition=f"forget_quality-{ratio}-ks_distance/1")
    note = "" if len(first) == len(second) else f"{len(first)} against {len(second)} items: are the questions the same?"
    p_value = Estimate(found.p_value, n=found.distance.n, definition=f"forget_quality-{ratio}-p_value/1", note=note)
    return ForgetQuality(p_value, found.distance.named(found.distance.definition, note))


def utility_parts(sets: Mapping[str, TofuSet], ratio: Ratio = "geometric") -> dict[str, Estimate]:
    """Probability, ROUGE and truth ratio (true_better) of each set: the nine terms of model utility."""
    parts: dict[str, Estimate] = {}
    for name, items in sets.items():
        parts[f"prob.{name}"] = probability(items)
        parts[f"rouge.{name}"] = bootstrap_mean(items.rouge_N, items.groups, definition="rougeL_recall/1")
        parts[f"truth_ratio.{name}"] = truth_ratio(items, "true_better", ratio)
    return parts


@metric(
    name="model_utility",
    definition="model_utility-geometric-9/1",
    formula="harmonic mean of {prob, ROUGE-L recall, truth ratio (true_better)} x {retain, real authors, world facts}",
    direction="higher is better; compare with the original and the reference",
    source="TOFU (Maini et al. 2024); geometric: aggregate_eval_stat.py, arithmetic: paper, utils.py",
)
def model_utility(
    sets: Mapping[str, TofuSet],
    ratio: Ratio = "geometric",
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Harmonic mean of probability, ROUGE and truth ratio over every set that must be kept.

    One term near zero pulls the whole to zero. The three terms of a set are resampled together by subject, sets
    independently. With other sets than TOFU's three, the number of terms stands in the definition.
    """
    if not sets:
        raise UserError("model utility needs at least one set to be kept: give retain, or retain and utility sets.")
    parts = utility_parts(sets, ratio)
    draws_RT = np.concatenate(
        [
            bootstrap_means(
                np.stack([s.probabilities(), s.rouge_N, truth_scores(s.log_ratios(ratio), "true_better")], axis=1),
                s.groups,
                resamples,
                seed + number,
            )
            for number, s in enumerate(sets.values())
        ],
        axis=1,
    )
    value = harmonic_mean(np.array([[part.value for part in parts.values()]]))[0]
    low, high = percentile_interval(harmonic_mean(draws_RT), level)
    num = sum(len(s.loss_N) for s in sets.values())
    return Estimate(float(value), low, high, num, f"model_utility-{ratio}-{len(parts)}/1")


def harmonic_mean(values_RT: Floats) -> Floats:
    """Harmonic mean along the last axis; 0 as soon as one term is 0, nan when one is nan."""
    with np.errstate(divide="ignore"):
        return np.asarray(values_RT.shape[-1] / (1 / values_RT).sum(-1), dtype=np.float64)


# -- from samples, and from the authors' logs ----------------------------------------------------------------------


def wanted(samples: Sequence[Sample]) -> list[Sample]:
    """Every text whose loss is needed: each sample, its restated answer, and its perturbed answers."""
    found: list[Sample] = []
    for sample in samples:
        found.append(sample)
        for kind in ("restated", "perturbed"):
            found += [sample.as_probe(p, number) for number, p in enumerate(sample.probes_of(kind))]
    return found


def tofu_set(
    samples: Sequence[Sample],
    signals: Iterable[Signals],
    rouge: Mapping[str, float] | None = None,
    options: bool = False,
) -> TofuSet:
    """The set from the signals of :func:`wanted`, and ROUGE scores by sample id.

    A sample without a restated answer stands for it itself, as in TOFU's real authors and world facts.
    """
    losses = {s.id: s.loss for s in signals}
    missing = [s.id for s in wanted(samples) if s.id not in losses]
    if missing:
        raise UserError(f"there are no signals of '{missing[0]}': collect them for all of wanted(samples).")
    scores = rouge or {}
    own = [losses[s.id] for s in samples]
    restated = [losses[f"{s.id}/restated/0" if s.probes_of("restated") else s.id] for s in samples]
    perturbed = tuple(
        np.array([losses[f"{s.id}/perturbed/{k}"] for k in range(len(s.probes_of("perturbed")))], dtype=np.float64)
        for s in samples
    )
    return TofuSet(
        loss_N=np.array(own, dtype=np.float64),
        paraphrased_N=np.array(restated, dtype=np.float64),
        perturbed=perturbed,
        rouge_N=np.array([scores.get(s.id, np.nan) for s in samples], dtype=np.float64),
        groups=tuple(s.subject for s in samples),
        options=options,
    )


def read_log(log: Mapping[str, Any], groups: Mapping[str, Groups] | None = None) -> dict[str, TofuSet]:
    """The sets of an ``eval_log_aggregated.json`` as TOFU writes it, items in the order of their numbers.

    Raises:
        UserError: none of TOFU's sets is in the log.
    """
    found: dict[str, TofuSet] = {}
    for name, (key, options) in LOG_SETS.items():
        if key not in log:
            continue
        entry = log[key]
        order = sorted(entry["avg_gt_loss"], key=int)
        own_groups = (groups or {}).get(name)
        found[name] = TofuSet(
            loss_N=np.array([entry["avg_gt_loss"][i] for i in order], dtype=np.float64),
            paraphrased_N=np.array([entry["avg_paraphrased_loss"][i] for i in order], dtype=np.float64),
            perturbed=tuple(np.array(entry["average_perturb_loss"][i], dtype=np.float64) for i in order),
            rouge_N=np.array([entry["rougeL_recall"][i] for i in order], dtype=np.float64),
            groups=None if own_groups is None else tuple(str(g) for g in own_groups),
            options=options,
        )
    if not found:
        raise UserError(f"this is no TOFU evaluation log: none of {', '.join(k for k, _ in LOG_SETS.values())} in it.")
    return found
