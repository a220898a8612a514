"""CAMIA: membership from the course of the loss along a text (Chang et al. 2024, arXiv:2409.13745).

Each feature becomes the share of texts that no model has seen with at least as high a value, under the same model;
these shares are combined into one score. Which direction of a feature means "member" is fixed here, in the table,
and never read off labels. Shape suffixes: L target tokens of a sample, N texts, M unseen texts,
F features, K p-values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from expunge.attacks.exam import Checkpoint, Exam, key_of
from expunge.attacks.membership import WORDS, measured
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.options import option
from expunge.signals.record import Signals

CUTS = (200, 300)  # tokens after which a text is cut for the loss
LEVELS = (-1.0, -2.0, -3.0)  # nats
BINS = (3, 4, 5)
ENTROPY_LENGTH, ENTROPY_RADIUS = 8, 0.8  # tokens, nats
FEW = 20  # texts below which percentiles are coarse

Floats = NDArray[np.float64]


def features(signals: Signals) -> dict[str, float]:
    """The features of one text by name, each turned so that higher means more likely a member; nan where too short.

    Known texts have a lower loss, also for the diversity of their tokens; more tokens that are likely, also against
    the text's own mean and the mean so far (the context helps); a loss that falls faster along the text; and a
    smoother course of it (fewer phrases in the Lempel-Ziv sense, lower approximate entropy).
    """
    log_p_L = signals.log_prob_L.astype(np.float64)
    length = len(log_p_L)
    if not length:
        return dict.fromkeys(NAMES, math.nan)
    mean = float(log_p_L.mean())
    found = {"loss": mean, "diversity": mean / (len(set(signals.ids_L.tolist())) / length)}
    found |= {f"loss@{cut}": float(log_p_L[:cut].mean()) if length > cut else math.nan for cut in CUTS}
    for name, level in zip(ABOVE, (*LEVELS, mean), strict=True):
        found[name] = np.count_nonzero(log_p_L > level) / length
    so_far = np.cumsum(log_p_L)[:-1] / np.arange(1, length)
    found["above_so_far"] = np.count_nonzero(log_p_L[1:] > so_far) / (length - 1) if length > 1 else math.nan
    found |= {f"phrases{bins}": -phrases(levels_of(log_p_L, bins)) / length for bins in BINS}
    found["slope"] = slope(log_p_L)
    found["regularity"] = -approximate_entropy(log_p_L)
    return found


ABOVE = (*(f"above{level:g}" for level in LEVELS), "above_mean")
LATER = ("above_so_far", *(f"phrases{bins}" for bins in BINS), "slope", "regularity")
NAMES = ("loss", "diversity", *(f"loss@{cut}" for cut in CUTS), *ABOVE, *LATER)


def levels_of(values_L: Floats, bins: int) -> list[int]:
    """Which of ``bins`` equal parts of its own range each value falls into."""
    low, high = float(values_L.min()), float(values_L.max())
    if not (math.isfinite(low) and high > low):
        return [0] * len(values_L)
    parts: list[int] = np.minimum((values_L - low) / (high - low) * bins, bins - 1).astype(np.int64).tolist()
    return parts


def phrases(symbols: Sequence[int]) -> int:
    """Number of phrases of the Lempel-Ziv parsing (1978): each is the shortest that has not occurred before.

    >>> phrases([0, 0, 1, 0, 0, 1])  # 0 | 01 | 00 | 1
    4
    """
    symbols_used = max(symbols, default=0) + 1
    seen: dict[int, int] = {}  # an earlier phrase (0: the empty one) and one more symbol -> the phrase they make
    at = 0
    for symbol in symbols:
        key = at * symbols_used + symbol
        at = seen.get(key, 0)
        if not at:
            seen[key] = len(seen) + 1
    return len(seen) + (at != 0)  # what is left at the end counts as one


def slope(values_L: Floats) -> float:
    """Least-squares slope per token; nan for fewer than two tokens."""
    if len(values_L) < 2:
        return math.nan
    place_L = np.arange(len(values_L)) - (len(values_L) - 1) / 2
    return float(place_L @ values_L / (place_L @ place_L))


def approximate_entropy(values_L: Floats, length: int = ENTROPY_LENGTH, radius: float = ENTROPY_RADIUS) -> float:
    """Approximate entropy (Pincus 1991) of runs of ``length`` values that stay within ``radius`` of one another.

    phi(m) = mean over i of log of the share of j with max_k |x(i+k) - x(j+k)| <= r, k < m; ApEn = phi(m) - phi(m+1).
    nan for fewer than ``length`` + 1 values.
    """
    if len(values_L) <= length:
        return math.nan
    runs = np.abs(values_L[:, None] - values_L[None, :]) <= radius
    width = 1
    while width < length:  # two runs of w values, s <= w apart, are one run of w + s values
        step = min(width, length - width)
        runs = runs[:-step, :-step] & runs[step:, step:]
        width += step
    longer = runs[:-1, :-1] & runs[1:, 1:]
    shorter_phi, longer_phi = (float(np.log(np.count_nonzero(r, axis=1) / len(r)).mean()) for r in (runs, longer))
    return shorter_phi - longer_phi


def shares_above(values: ArrayLike, others: ArrayLike) -> Floats:
    """For each value (1 + how many of ``others`` are at least as high) / (1 + their number): one-sided p-values.

    nan for a nan value, and for all where none of ``others`` is a number.
    """
    sorted_others = np.sort(np.asarray(others, dtype=np.float64))
    sorted_others = sorted_others[~np.isnan(sorted_others)]
    array = np.asarray(values, dtype=np.float64)
    if not len(sorted_others):
        return np.full(len(array), math.nan)
    at_least = len(sorted_others) - np.searchsorted(sorted_others, array, side="left")
    return np.where(np.isnan(array), math.nan, (1 + at_least) / (1 + len(sorted_others)))


def fisher(p_values_NK: Floats) -> Floats:
    """-log of Fisher's combined p-value of each row, nan entries left out, (N,).

    Features of one text depend on one another, so this ranks texts; it is no valid p-value.
    """
    known_NK = ~np.isnan(p_values_NK)
    statistic_N = -2 * np.where(known_NK, np.log(np.where(known_NK, p_values_NK, 1.0)), 0.0).sum(1)
    count_N = known_NK.sum(1)
    found: Floats = np.where(count_N > 0, -scipy_stats.chi2.logsf(statistic_N, 2 * np.maximum(count_N, 1)), math.nan)
    return found


def mean_share(p_values_NK: Floats) -> Floats:
    """One minus the mean p-value of each row, nan entries left out, (N,)."""
    known_NK = ~np.isnan(p_values_NK)
    count_N = known_NK.sum(1)
    sums_N = np.where(known_NK, p_values_NK, 0.0).sum(1)
    return np.where(count_N > 0, 1 - sums_N / np.maximum(count_N, 1), math.nan)


def table(exam: Exam, checkpoint: Checkpoint, samples: Sequence[Sample]) -> Floats:
    """The features of every text under this checkpoint in the order of :data:`NAMES`, (N, F); computed once each."""
    known: dict[str, list[float]] = exam.shared.setdefault((__name__, checkpoint), {})
    rows = []
    for sample, signals in zip(samples, checkpoint.signals(samples), strict=True):
        key = key_of(sample)
        if key not in known:
            found = features(signals)
            known[key] = [found[name] for name in NAMES]
        rows.append(known[key])
    return np.array(rows, dtype=np.float64).reshape(len(samples), len(NAMES))


@dataclass(frozen=True, kw_only=True)
class CamiaOptions:
    """Options of CAMIA."""

    combine: str = option("fisher", "how the p-values of the features are combined", choices=("fisher", "mean"))


@attack(
    name="camia",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Chang et al. 2024, arXiv:2409.13745",
    formula="each feature -> share q of unseen texts at least as high; -log of Fisher's combined q, or 1 - mean q",
    options=CamiaOptions,
    passes=0.5,  # over the unseen texts
    needs=("aux",),
    modalities=WORDS,
)
def camia(exam: Exam, checkpoint: Checkpoint, options: CamiaOptions) -> Finding:
    """Features of the course of the loss, each against texts that no model has seen, combined.

    The features, each turned so that higher speaks for a member: mean loss, also of the first 200 and 300 tokens and by
    the share of distinct tokens; share of tokens likelier than 1, 2, 3 nats, than the text's mean and than the mean so
    far; slope of the loss; Lempel-Ziv phrases and approximate entropy of its course. Fisher's value ranks texts and is
    no valid p-value, since the features of a text depend on one another.

    The passes over a repeated text, which the paper adds, are left out: they are no signals of one pass. Unlike in the
    paper's code, neither the direction of a feature nor the combination looks at who is a member.
    """
    unseen_MF = table(exam, checkpoint, exam.aux)
    combine = fisher if options.combine == "fisher" else mean_share
    scores: dict[Role, Sequence[float]] = {}
    for role in measured(exam):
        found_NF = table(exam, checkpoint, exam.samples[role])
        shares = [shares_above(found_NF[:, f], unseen_MF[:, f]) for f in range(len(NAMES))]
        scores[role] = combine(np.stack(shares, axis=1)).tolist()
    few = len(exam.aux) < FEW
    notes = [f"camia: only {len(exam.aux)} unseen texts, so that percentiles are coarse"] if few else []
    return Finding({"camia": scores}, notes=notes)
