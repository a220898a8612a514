"""Other scoring functions over IAM's line between original and shadows, and differences without any line.

A scoring function is a map of readings to signals and a distribution at each knot. The map is the same for unlearned,
original and shadow models: distributions over numbers of two scales say nothing. Every score is higher the more likely
the sample is still a member.

Text and classifier forms share the maps: the text form applies them to 1 - p, where p is the geometric mean of the
token probabilities, and climbs from the original to the shadows. Shape suffixes: N samples, K shadows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from expunge.completeness import iam
from expunge.completeness.iam import KNOTS, Ladder, climb, gumbel_cdf, spreads
from expunge.completeness.lira import confidence
from expunge.completeness.readings import Floats, Readings
from expunge.completeness.simple import gap_ratio, probability_ratio
from expunge.errors import UserError, unknown

Cdf = Callable[[Floats, Floats, float], Floats]  # query (N,), one knot's signals (K, N), deviation there -> (N,)
TINY = 1e-12


@dataclass(frozen=True)
class Scoring:
    """One row of the table. ``unit``: signals are probabilities, so a signal outside [0, 1] is of another scale."""

    name: str
    cdf: Cdf
    formula: str
    unit: bool = False


def _gumbel(query_N: Floats, rung_KN: Floats, sigma: float) -> Floats:
    return gumbel_cdf(query_N, rung_KN.mean(axis=0), sigma)


def _normal(query_N: Floats, rung_KN: Floats, sigma: float) -> Floats:
    return np.asarray(special.ndtr((query_N - rung_KN.mean(axis=0)) / sigma))


def _steps(query_N: Floats, rung_KN: Floats, _: float) -> Floats:
    return np.asarray((rung_KN <= query_N).mean(axis=0))


def _kernel(query_N: Floats, rung_KN: Floats, sigma: float) -> Floats:
    width = sigma * len(rung_KN) ** -0.2  # Scott's rule for the K points that are averaged
    return np.asarray(special.ndtr((query_N - rung_KN) / width).mean(axis=0))


def _beta(query_N: Floats, rung_KN: Floats, sigma: float) -> Floats:
    mean_N = np.clip(rung_KN.mean(axis=0), 1e-6, 1 - 1e-6)
    room_N = mean_N * (1 - mean_N)  # no distribution on [0, 1] has a larger variance than this
    total_N = room_N / np.minimum(sigma**2, 0.95 * room_N) - 1
    return np.asarray(special.betainc(mean_N * total_N, (1 - mean_N) * total_N, np.clip(query_N, 0, 1)))


SCORINGS: dict[str, Scoring] = {
    row.name: row
    for row in (
        Scoring("gumbel", _gumbel, "exp(-exp(-(s - m + 0.5772 b) / b)), b = sqrt(6) d / pi, on the bounded Gumbel map"),
        Scoring("gauss", _normal, "Phi((s - m) / d) on the logit-scaled confidence ln p - ln(1 - p)"),
        Scoring("taylor", _normal, "Phi((s - m) / d) on the soft-margin Taylor softmax of the logits", unit=True),
        Scoring("ecdf", _steps, "share of shadows whose knot is at or below s, on probabilities", unit=True),
        Scoring("kde", _kernel, "mean over shadows of Phi((s - I_j) / h), h = d K^(-1/5), on probabilities", unit=True),
        Scoring("beta", _beta, "Beta distribution with mean m and deviation d, on probabilities", unit=True),
    )
}


def get_scoring(name: str) -> Scoring:
    """By name.

    Raises:
        UserError: no such scoring function; the nearest name is suggested.
    """
    if name not in SCORINGS:
        raise unknown("scoring function", name, SCORINGS)
    return SCORINGS[name]


def ladder(readings: Readings, name: str) -> Ladder:
    """The signals that a scoring function works on, all by one map.

    Raises:
        UserError: unknown name, no original, or "taylor", which needs the logits of all classes.
    """
    get_scoring(name)
    if name == "gumbel":
        return iam.ladder(readings)
    if name == "taylor":
        raise UserError(
            "scoring 'taylor' needs the logits of all classes, and readings hold one number per sample: build "
            "Ladder('classifier', ...) from taylor_softmax of each model."
        )

    def signal(values: Floats) -> Floats:
        unit = -np.expm1(-values) if readings.form == "text" else values
        return confidence(unit) if name == "gauss" else unit

    original_N = iam.original_of(readings)
    return Ladder(readings.form, signal(readings.unlearned_N), signal(original_N), signal(readings.shadow_KN))


def score(
    steps: Ladder, name: str = "gumbel", *, knots: int = KNOTS, sigmas: Floats | None = None, order: bool = True
) -> Floats:
    """Membership in [0, 1], (N,), of complete signals.

    ``sigmas``: deviation at each knot from :func:`expunge.completeness.iam.spreads` of a calibration set; measured on
    the samples themselves when None, as in the published code (then ``order`` sorts them by value before pooling, so
    that their order changes no bit).

    Raises:
        UserError: unknown name, signals that are no probabilities where the function needs them, or no spread.
    """
    scoring = get_scoring(name)
    sides = {"unlearned": steps.query_N, "original": steps.fit_N, "shadow": steps.out_KN}
    for side, values in sides.items():
        if scoring.unit and values.size and not (values.min() >= 0 and values.max() <= 1):
            raise UserError(
                f"scoring '{name}' works on probabilities, and the signals of '{side}' are outside [0, 1]: put "
                f"unlearned, original and shadows on one scale."
            )
    if sigmas is None:
        places = np.lexsort((*steps.out_KN, steps.fit_N)) if order else np.arange(len(steps.query_N))
        sigmas = spreads(steps.select(places), knots)
    if not np.all(sigmas[: knots - 1] > 0):
        raise UserError("the samples all have the same signals: they show no spread to measure by; give sigmas.")
    deviations = [float(sigma) for sigma in sigmas]
    return climb(steps, knots, lambda k, rung: scoring.cdf(steps.query_N, rung, deviations[k]))


def taylor_softmax(
    logits_NC: Floats, labels_N: NDArray[np.intp], *, margin: float = 0.6, order: int = 4, temperature: float = 2.0
) -> Floats:
    """Probability of the true class with the exponential cut to its Taylor polynomial and a margin against it, (N,).

    Source: soft-margin Taylor softmax, RMIA, arXiv 2312.03262, appendix; margin and temperature as in IAM's code.

    Raises:
        UserError: an odd order, for which terms can be negative and the result is no probability.
    """
    if order < 2 or order % 2:
        raise UserError(
            f"order {order} of the Taylor softmax: give an even one from 2 on, where every term is positive."
        )
    scaled_NC = np.asarray(logits_NC, dtype=np.float64) / temperature
    rows = np.arange(len(scaled_NC))

    def grown(values: Floats) -> Floats:
        return np.asarray(sum(values**i / math.factorial(i) for i in range(order + 1)))

    terms_NC = grown(scaled_NC)
    own_N = grown(scaled_NC[rows, labels_N] - margin)
    return np.asarray(own_N / (own_N + terms_NC.sum(axis=1) - terms_NC[rows, labels_N]))


def simple_scores(readings: Readings) -> dict[str, Floats]:
    """Differences that need no distribution, (N,) each, higher = more likely still a member.

    ``prob``, ``loss`` (negated) of the unlearned model alone; ``prob-difference`` p_u - p_o; ``loss-difference``
    l_o - l_u; ``gap-ratio`` (l_out - l_u) / (l_out - l_o); ``prob-ratio`` p_u / mean(p_o, p_out). Without an original
    only the first two.
    """
    text = readings.form == "text"

    def loss(values: Floats) -> Floats:
        return values if text else -np.log(np.maximum(values, TINY))

    def prob(values: Floats) -> Floats:
        return np.asarray(np.exp(-values)) if text else values

    loss_N, prob_N = loss(readings.unlearned_N), prob(readings.unlearned_N)
    scores = {"prob": prob_N, "loss": -loss_N}
    if readings.original_N is not None:
        original_N, out_KN = readings.original_N, readings.shadow_KN
        scores["prob-difference"] = prob_N - prob(original_N)
        scores["loss-difference"] = loss(original_N) - loss_N
        scores["gap-ratio"] = gap_ratio(loss_N, loss(original_N), loss(out_KN))
        scores["prob-ratio"] = probability_ratio(prob_N, prob(original_N), prob(out_KN))
    return scores
