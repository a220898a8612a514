"""Membership scores from the signals of one model: does it betray that it was trained on these samples?

Every score is higher for a more likely member. One forward pass per model serves all of them. Scores that compare
two models stand in :mod:`expunge.attacks.pairs`, features of the course of a text in :mod:`expunge.attacks.features`.

Shape suffix: L target tokens of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, NoOptions, attack
from expunge.data.samples import Modality, Role
from expunge.errors import UserError, unknown
from expunge.metrics.registry import metric
from expunge.options import option
from expunge.signals.record import Signals
from expunge.stats import LEVEL, Estimate, auc, auc_estimate, bootstrap_auc, percentile_interval, tpr_at_fpr

K_PERCENT = 20.0  # share of the least likely tokens, in percent; Shi et al. 2024 use 20, OpenUnlearning 40
FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
MEASURED: tuple[Role, ...] = ("forget", "retain", "holdout")
WORDS: tuple[Modality, ...] = ("text", "multimodal")  # several target tokens per sample
ALL: tuple[Modality, ...] = (*WORDS, "classifier")
STD_FLOOR = 1e-3  # a token whose distribution has no spread; OpenUnlearning clamps the variance at 1e-6 as well

Floats = NDArray[np.float64]


def loss_score(signals: Signals) -> float:
    """Mean log-probability of the target tokens (Yeom et al. 2018)."""
    return -signals.loss


def zlib_score(signals: Signals) -> float:
    """Minus log-perplexity (mean loss in nats per token) over the zlib-compressed bytes (Carlini et al. 2021)."""
    return -signals.loss / signals.zlib_bytes


def lowest_mean(values_L: NDArray[np.floating], percent: float) -> float:
    """Mean of the lowest ``percent`` % of the values, at least one of them; nan without values."""
    if not 0 < percent <= 100:
        raise UserError(f"k = {percent} percent is not above 0 and at most 100: give for example 20.")
    if not len(values_L):
        return math.nan
    count = max(1, int(len(values_L) * percent / 100 + 1e-9))
    return float(np.mean(np.partition(values_L, count - 1)[:count], dtype=np.float64))


def min_k_score(signals: Signals, percent: float = K_PERCENT) -> float:
    """Mean of the lowest k % of the token log-probabilities (Shi et al. 2024)."""
    return lowest_mean(signals.log_prob_L, percent)


def min_k_plus_plus_score(signals: Signals, percent: float = K_PERCENT) -> float:
    """Mean of the lowest k % of (log p - mu) / sigma, moments under the model itself (Zhang et al. 2025)."""
    standard_L = (signals.log_prob_L - signals.mean_L) / np.maximum(signals.std_L, STD_FLOOR)
    return lowest_mean(standard_L, percent)


def surp_score(signals: Signals, percent: float = 40.0, entropy: float = 2.0) -> float:
    """Mean log-probability of the surprising tokens: among the lowest k %, and where the model was sure (low entropy).

    Zhang and Wu 2024 (arXiv:2407.21248), with the entropy in nats. Where no token is both, the one of the lowest k %
    at which the model was surest stands for them, so that no text is left without a score.
    """
    if not 0 < percent <= 100:
        raise UserError(f"k = {percent} percent is not above 0 and at most 100: give for example 40.")
    if not len(signals):
        return math.nan
    count = max(1, int(len(signals) * percent / 100 + 1e-9))
    lowest = np.argsort(signals.log_prob_L, kind="stable")[:count]
    sure = lowest[signals.entropy_L[lowest] < entropy]
    if not len(sure):
        sure = lowest[[int(np.argmin(signals.entropy_L[lowest]))]]
    return float(np.mean(signals.log_prob_L[sure], dtype=np.float64))


SCORES: dict[str, Callable[[Signals], float]] = {
    "loss": loss_score,
    "zlib": zlib_score,
    "min_k": min_k_score,
    "min_k++": min_k_plus_plus_score,
}


def scores(signals: Sequence[Signals], name: str) -> Floats:
    """The scores of all samples, (N,); nan where a sample has no target token."""
    if name not in SCORES:
        raise unknown("membership score", name, SCORES)
    return np.array([SCORES[name](s) for s in signals], dtype=np.float64)


@metric(
    name="mia",
    definition="mia-{loss,zlib,min_k-20,min_k++-20}/1",
    formula="AUC and TPR at FPR 0.1, 1, 10 % of forget above holdout; gap = |AUC - AUC_ref|",
    direction="gap: 0 is best, two-sided; AUC: equal to the reference's, which is 0.5 on data without shift",
    source="Yeom et al. 2018; Carlini et al. 2021; Shi et al. 2024 (Min-K%); Zhang et al. 2025 (Min-K%++)",
)
def membership(
    forget: Sequence[Signals],
    holdout: Sequence[Signals],
    reference: tuple[Sequence[Signals], Sequence[Signals]] | None = None,
    *,
    names: Sequence[str] = tuple(SCORES),
    rates: Sequence[float] = FALSE_POSITIVE_RATES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Estimate]:
    """How well each score tells forget samples from holdout samples that no model has seen.

    ``reference``: signals of the retrained model on the same forget and holdout samples. Gives ``mia.NAME.auc``,
    ``mia.NAME.tpr@RATE`` and ``mia.NAME.gap``, with subjects as the unit of resampling.
    A low AUC shows only that these scores fail. An AUC below the reference's is a trace of forgetting, hence the
    two-sided gap. If forget and holdout differ in kind, the reference's AUC shows it.
    """
    found: dict[str, Estimate] = {}
    for name in names:
        label = f"{name}-{K_PERCENT:g}" if name.startswith("min_k") else name
        inside, outside = scores(forget, name), scores(holdout, name)
        groups = [s.subject for s in forget], [s.subject for s in holdout]
        found[f"mia.{name}.auc"] = auc_estimate(inside, outside, *groups, level=level, definition=f"mia-{label}-auc/1")
        for rate in rates:
            found[f"mia.{name}.tpr@{rate:g}"] = tpr_at_fpr(
                inside, outside, rate, *groups, level=level, seed=seed, definition=f"mia-{label}-tpr@{rate:g}/1"
            )
        theirs = None if reference is None else (scores(reference[0], name), scores(reference[1], name))
        gap = auc_gap((inside, outside), theirs, *groups, level=level, seed=seed)
        found[f"mia.{name}.gap"] = gap.named(f"mia-{label}-{gap.definition}")
    return found


def auc_gap(
    ours: tuple[Floats, Floats],
    theirs: tuple[Floats, Floats] | None = None,
    forget_groups: Sequence[str] | None = None,
    holdout_groups: Sequence[str] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """|AUC - AUC_ref|, paired: both models are resampled on the same subjects. Without a reference |AUC - 0.5|.

    Items without a score under either model are left out for both.
    """
    definition = "gap/1" if theirs is not None else "gap-chance/1"
    sides: list[list[Floats]] = []
    kept_groups: list[list[str] | None] = []
    for side, groups in enumerate((forget_groups, holdout_groups)):
        models = [np.asarray(m[side], dtype=np.float64) for m in ((ours,) if theirs is None else (ours, theirs))]
        if len({len(m) for m in models}) > 1:
            raise UserError("model and reference were scored on different samples: use the same forget and holdout.")
        kept = [not any(math.isnan(score) for score in item) for item in zip(*models, strict=True)]
        sides.append([m[np.array(kept, dtype=bool)] for m in models])
        kept_groups.append(None if groups is None else [g for g, keep in zip(groups, kept, strict=True) if keep])
    pairs = list(zip(sides[0], sides[1], strict=True))
    num = len(sides[0][0]) + len(sides[1][0])
    if min(len(sides[0][0]), len(sides[1][0])) == 0:
        return Estimate(math.nan, n=num, definition=definition)
    draws = bootstrap_auc(pairs, kept_groups[0], kept_groups[1], resamples=resamples, seed=seed)
    values = [auc(*pair) for pair in pairs] + [0.5]
    low, high = percentile_interval(draws[0] - (draws[1] if theirs is not None else 0.5), level)
    if any(g is not None and len(set(g)) < 2 for g in kept_groups):
        low = high = math.nan  # one subject says nothing about other subjects
    return Estimate(values[0] - values[1], low, high, num, definition).distance_from(0.0)


def per_sample(signals: Sequence[Signals]) -> list[Mapping[str, float | None]]:
    """The scores of each sample for samples.jsonl; null where there is no target token."""
    columns = {name.replace("++", "_plus_plus"): scores(signals, name) for name in SCORES}
    return [
        {name: None if math.isnan(column[i]) else float(column[i]) for name, column in columns.items()}
        for i in range(len(signals))
    ]


# -- as attacks ----------------------------------------------------------------------------------------------------


def measured(exam: Exam) -> list[Role]:
    """The roles that membership is scored on: forget, retain and holdout, as far as the exam has them."""
    return [role for role in MEASURED if exam.samples.get(role)]


def read(exam: Exam, checkpoint: Checkpoint) -> dict[Role, list[Signals]]:
    """Signals of every measured sample."""
    return {role: checkpoint.signals(exam.samples[role]) for role in measured(exam)}


def scored(exam: Exam, checkpoint: Checkpoint, **columns: Callable[[Signals], float]) -> Finding:
    """A finding with each of the ``columns`` computed from the signals of every measured sample."""
    signals = read(exam, checkpoint)
    return Finding({n: {r: [score(s) for s in found] for r, found in signals.items()} for n, score in columns.items()})


@attack(
    name="loss",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Yeom et al. 2018, arXiv:1709.01604",
    formula="mean over target tokens of log p(x_t | x_<t)",
    modalities=ALL,
)
def loss_attack(exam: Exam, checkpoint: Checkpoint, options: NoOptions) -> Finding:
    """Mean log-probability of the target tokens.

    The LOSS attack, minus the sample's cross-entropy in nats per token. Easy texts score high whether they were
    learnt or not, so it is the weakest of the family and the base line of the others.
    """
    return scored(exam, checkpoint, loss=loss_score)


@attack(
    name="zlib",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Carlini et al. 2021, arXiv:2012.07805",
    formula="-(mean loss in nats per token) / (bytes of the zlib-compressed target text, level 6)",
    modalities=WORDS,
)
def zlib_attack(exam: Exam, checkpoint: Checkpoint, options: NoOptions) -> Finding:
    """Log-perplexity over the compressed length of the text.

    The compressed length stands for how hard any reader would find the text, so that repetitive texts are not taken for
    members. It needs no other model.
    """
    return scored(exam, checkpoint, zlib=zlib_score)


@dataclass(frozen=True, kw_only=True)
class MinKOptions:
    """Options of Min-K % and Min-K++."""

    percent: float = option(K_PERCENT, "share of the least likely tokens, in percent", "Shi et al. 2024")


@attack(
    name="min_k",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Shi et al. 2024, arXiv:2310.16789",
    formula="mean of the lowest max(1, floor(k L)) of log p(x_t | x_<t)",
    options=MinKOptions,
    modalities=WORDS,
)
def min_k_attack(exam: Exam, checkpoint: Checkpoint, options: MinKOptions) -> Finding:
    """Mean log-probability of the least likely tokens.

    Min-K% Prob: a text that was never seen holds a few tokens that the model finds very unlikely; a member has none
    left.
    """
    return scored(exam, checkpoint, min_k=lambda s: min_k_score(s, options.percent))


@attack(
    name="min_k++",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Zhang et al. 2025, arXiv:2404.02936",
    formula="mean of the lowest max(1, floor(k L)) of (log p(x_t) - mu_t) / sigma_t; mu, sigma of log p(v) with v ~ p",
    options=MinKOptions,
    modalities=ALL,
)
def min_k_plus_plus_attack(exam: Exam, checkpoint: Checkpoint, options: MinKOptions) -> Finding:
    """Least likely tokens after each is measured against what the model itself would draw there.

    Min-K%++: log p of the token in standard deviations from its mean under the model's own prediction. The moments are
    weighted by p over the whole vocabulary, as in the paper; an unweighted mean over the vocabulary is another score.
    """
    return scored(exam, checkpoint, **{"min_k++": lambda s: min_k_plus_plus_score(s, options.percent)})


@dataclass(frozen=True, kw_only=True)
class SurpOptions:
    """Options of SURP."""

    percent: float = option(40.0, "share of the least likely tokens, in percent", "mia_llms_benchmark")
    entropy: float = option(2.0, "highest entropy of a sure prediction, in nats", "mia_llms_benchmark")


@attack(
    name="surp",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Zhang and Wu 2024, arXiv:2407.21248",
    formula="mean log p(x_t) over tokens of the lowest k % whose entropy is below the bound",
    options=SurpOptions,
    modalities=WORDS,
)
def surp_attack(exam: Exam, checkpoint: Checkpoint, options: SurpOptions) -> Finding:
    """Log-probability of the tokens that surprised a model which was sure of something else.

    SURP: tokens of low probability at places of low entropy. On a member there are few, and they are less unlikely.
    Where no token is both, the one of the lowest k % at which the model was surest stands for them.
    """
    return scored(exam, checkpoint, surp=lambda s: surp_score(s, options.percent, options.entropy))
