"""IAM, Interpolated Approximate Measurement: where the unlearned model stands between "saw it" and "never saw it".

The signals of the original and of models that never saw a sample are joined by a straight line of knots; at each knot
a Gumbel distribution says how far the unlearned model's signal has come. :func:`parity` is the published definition,
oddities and all. :func:`fit` and :func:`score` are our own form: the spread is measured once, on a calibration set,
and frozen, so that the score of one sample does not depend on which others are asked for.

Source: arXiv 2506.06112 (USENIX Security 2025) and its predecessor arXiv 2403.12830.
Shape suffixes: N samples, K shadow models; ``knots`` counts the points of interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.completeness.readings import (
    EPS_CLASSIFIER,
    EPS_TEXT,
    Floats,
    Form,
    Readings,
    classifier_signal,
    text_signal,
)
from expunge.errors import UserError

KNOTS = 32  # AUC is flat from 16 knots on
PUBLISHED_KNOTS: Mapping[Form, int] = {"text": 1000, "classifier": 100}
PUBLISHED_BATCH: Mapping[Form, int | None] = {"text": 64, "classifier": None}
EULER = 0.5772  # as published; the constant itself is 0.57721566
MAD = 1.4826  # standard deviations per median absolute deviation of a normal distribution


@dataclass(frozen=True, eq=False)
class Ladder:
    """Signals of one set of samples on ONE scale, and the line between them.

    The text form climbs from the original to the shadows, on signals that increase with the loss; the classifier form
    from the shadows to the original, on signals that increase with the probability. These are not mirror images:
    weights grow towards the end of the climb.
    """

    form: Form
    query_N: Floats
    fit_N: Floats
    out_KN: Floats

    def __post_init__(self) -> None:
        if self.out_KN.ndim != 2 or not (self.query_N.shape == self.fit_N.shape == self.out_KN.shape[1:]):
            raise UserError("signals of unlearned, original and shadows need shapes (N,), (N,) and (K, N).")

    def rung_KN(self, alpha: float) -> Floats:
        """The line at ``alpha`` of its length."""
        fit_N, out_KN = self.fit_N, self.out_KN
        return fit_N + alpha * (out_KN - fit_N) if self.form == "text" else out_KN + alpha * (fit_N - out_KN)

    def select(self, places: NDArray[np.intp]) -> Ladder:
        return Ladder(self.form, self.query_N[places], self.fit_N[places], self.out_KN[:, places])


def original_of(readings: Readings) -> Floats:
    """The original's readings.

    Raises:
        UserError: there are none; see :func:`offline`.
    """
    if readings.original_N is None:
        raise UserError(
            "no readings of the original: give them, or a typical reading of trained samples as the anchor."
        )
    return readings.original_N


def ladder(readings: Readings, eps: tuple[float, float] | None = None, normalised: bool = True) -> Ladder:
    """The published signals: the bounded Gumbel map, the same for all models. ``normalised`` is for classifiers."""

    def signal(values: Floats) -> Floats:
        if readings.form == "text":
            return text_signal(values, eps or EPS_TEXT)
        return classifier_signal(values, eps or EPS_CLASSIFIER, normalised)

    return Ladder(
        readings.form, signal(readings.unlearned_N), signal(original_of(readings)), signal(readings.shadow_KN)
    )


# -- offline: the original is not asked ----------------------------------------------------------------------------


def typical(values: Floats, form: Form) -> float:
    """The reading whose signal is the mean signal of ``values``: the anchor of IAM-Off.

    ``values`` are readings of the shadows on their own training data.
    """
    if form == "text":
        mean = float(np.mean(text_signal(values)))
        missing = math.exp(EPS_TEXT[0] - math.exp(-mean)) - EPS_TEXT[1]
        return -math.log1p(-min(missing, 1 - 1e-15))
    mean = float(np.mean(classifier_signal(values, normalised=False)))
    return math.exp(EPS_CLASSIFIER[0] - math.exp(-mean)) - EPS_CLASSIFIER[1]


def offline(readings: Readings, anchor: float) -> Readings:
    """The same readings with one constant in the original's place: a typical reading of a sample that was trained on.

    Raises:
        UserError: the anchor is no possible reading.
    """
    if not (0 <= anchor < math.inf and (readings.form == "text" or anchor <= 1)):
        kind = "a loss, 0 or more" if readings.form == "text" else "a probability between 0 and 1"
        raise UserError(f"the anchor {anchor} is not {kind}: give a typical reading of samples that were trained on.")
    return replace(readings, original_N=np.full(len(readings), float(anchor)))


# -- the weighted sum over knots -----------------------------------------------------------------------------------


def alphas(knots: int) -> list[float]:
    """0 to 1 in equal steps.

    Raises:
        UserError: fewer than 2.
    """
    if knots < 2:
        raise UserError(f"{knots} knots: IAM needs at least 2, the two ends.")
    return [k / (knots - 1) for k in range(knots)]


def climb(steps: Ladder, knots: int, cdf: Callable[[int, Floats], Floats]) -> Floats:
    """Membership in [0, 1], (N,): ``cdf(k, rung_KN)`` of the query, weighted along the line.

    As published, the weight of a knot is the position of the next one, and the last knot has no term. The sum runs
    knot by knot, so that a sample's bits do not depend on its neighbours.
    """
    at = alphas(knots)
    total_N = np.zeros(len(steps.query_N))
    for k in range(knots - 1):
        total_N += at[k + 1] * cdf(k, steps.rung_KN(at[k]))
    reached_N = total_N / math.fsum(at[1:])
    return 1 - reached_N if steps.form == "text" else reached_N


def gumbel_cdf(value: Floats, mean: Floats, sigma: Floats | float) -> Floats:
    """Right-skewed Gumbel distribution with this mean and deviation (method of moments) at ``value``."""
    beta = math.sqrt(6) * sigma / math.pi
    with np.errstate(over="ignore"):  # far below the mean the inner exponential is infinite, and the result 0
        return np.asarray(np.exp(-np.exp(-(value - (mean - EULER * beta)) / beta)))


def by_id(readings: Readings) -> NDArray[np.intp]:
    """Places of the complete rows in the order of their ids: sums over samples then never depend on the row order."""
    places = np.flatnonzero(readings.complete())
    return places[np.argsort(np.asarray(readings.ids, dtype=np.str_)[places], kind="stable")]


# -- as published --------------------------------------------------------------------------------------------------


def parity(
    readings: Readings,
    *,
    knots: int | None = None,
    eps: tuple[float, float] | None = None,
    normalised: bool = True,
    batch: int | None = None,
) -> Floats:
    """The published score, (N,); nan for incomplete rows.

    Form "text" gives MEMBERSHIP (1 = still a member), form "classifier" gives the unlearning score U (1 = forgotten).
    One deviation per knot is pooled over shadows and all samples asked for together (``batch`` rows at a time in the
    order given; the published text code takes 64, the classifier code all), so scores depend on the company. With
    ``batch=None`` the order of rows changes no bit. The published text form has one shadow; several are pooled as in
    the classifier form.

    Raises:
        UserError: no original, or samples without any spread.
    """
    knots = knots or PUBLISHED_KNOTS[readings.form]
    scores_N = np.full(len(readings), np.nan)
    given = np.flatnonzero(readings.complete())
    size = batch or max(1, len(given))
    parts = [given[start : start + size] for start in range(0, len(given), size)]
    if not parts:
        return scores_N
    places = np.concatenate([part[by_id(readings.select(part.tolist()))] for part in parts])
    steps = ladder(readings, eps, normalised).select(places)
    tiny = 1e-9 if readings.form == "text" else 0.0  # the published text code adds it

    def cdf(_: int, rung_KN: Floats) -> Floats:
        sigma_N = batch_spread(rung_KN, size) + tiny
        if not sigma_N.all():
            raise UserError(
                "the published classifier form needs rows that differ, and some that are pooled together do not: give "
                "more rows, or leave parity."
            )
        return gumbel_cdf(steps.query_N, rung_KN.mean(axis=0), sigma_N)

    member_N = climb(steps, knots, cdf)
    scores_N[places] = member_N if readings.form == "text" else 1 - member_N
    return scores_N


def batch_spread(rung_KN: Floats, size: int) -> Floats:
    """Population deviation over shadows and the samples of each run of ``size``, repeated for its samples, (N,)."""
    shadows, num = rung_KN.shape
    whole = num - num % size
    blocks = rung_KN[:, :whole].reshape(shadows, -1, size).swapaxes(0, 1).reshape(-1, shadows * size)
    spread_N = np.repeat(blocks.std(axis=1), size)
    if whole == num:
        return spread_N
    return np.concatenate([spread_N, np.full(num - whole, rung_KN[:, whole:].ravel().std())])


# -- our own: a frozen scale ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How far signals spread, measured once.

    ``pooled``: deviation at each knot over the calibration samples. With several shadows per sample, the spread of
    models on ONE sample is known and used in its place: ``variance`` is its typical value and ``dof`` how many
    degrees of freedom that prior is worth against a sample's own variance (infinite: all samples alike).
    """

    form: Form
    pooled: tuple[float, ...]
    variance: float | None
    dof: float
    samples: int
    shadows: int
    robust: bool = False

    @property
    def knots(self) -> int:
        return len(self.pooled)

    def record(self) -> dict[str, Any]:
        """As JSON; an infinite ``dof`` becomes null."""
        return asdict(self) | {"pooled": list(self.pooled), "dof": self.dof if math.isfinite(self.dof) else None}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Scale:
        """What :meth:`record` gave."""
        dof = math.inf if record["dof"] is None else float(record["dof"])
        return cls(**{**record, "pooled": tuple(record["pooled"]), "dof": dof})


def spreads(steps: Ladder, knots: int, robust: bool = False) -> Floats:
    """Deviation at each knot, pooled over shadows and samples, (knots,); ``robust``: from median deviations."""
    out = np.zeros(knots)
    for k, alpha in enumerate(alphas(knots)):
        rung = steps.rung_KN(alpha)
        out[k] = MAD * float(np.median(np.abs(rung - np.median(rung)))) if robust else float(rung.std())
    return out


def fit(readings: Readings, *, knots: int = KNOTS, robust: bool = False) -> Scale:
    """Measure the spread on a calibration set. With one shadow it is pooled over samples, as published.

    With K >= 2 shadows each sample shows its own spread, on K - 1 degrees of freedom. Typical value and worth of it
    as a prior follow from the distribution of log-variances (Smyth 2004, section 6.2); ``robust`` takes quartiles
    there in the place of moments, so that a few samples cannot stretch the scale of the others.

    Raises:
        UserError: no original, fewer than 2 complete rows, or no spread at all.
    """
    order = by_id(readings)
    if len(order) < 2:
        raise UserError(f"{len(order)} complete row(s) show no spread: calibrate on at least 2, better on 100.")
    steps = ladder(readings).select(order)
    pooled = spreads(steps, knots, robust)
    if not pooled[:-1].all():
        raise UserError("the calibration samples all have the same readings: they show no spread to measure by.")
    variance, dof = None, math.inf
    if readings.num_shadows > 1:
        own_N = steps.out_KN.var(axis=0, ddof=1)
        if not own_N.any():
            raise UserError("the shadows give the same readings everywhere: give models that were trained apart.")
        variance, dof = _prior(own_N, readings.num_shadows - 1, robust)
    return Scale(readings.form, tuple(map(float, pooled)), variance, dof, len(order), readings.num_shadows, robust)


def score(readings: Readings, scale: Scale) -> Floats:
    """Membership in [0, 1], (N,): 1 = like the original, for both forms; nan for incomplete rows.

    The deviation at a knot is that of a mixture of two independent models, (1 - a) of the one and a of the other,
    sqrt(v ((1 - a)^2 + a^2)), where v is the sample's variance over shadows shrunk to the calibrated one: one
    original does not show its own spread, so it is given a shadow's.

    Raises:
        UserError: readings of another form than the scale's.
    """
    if readings.form != scale.form:
        raise UserError(f"a scale of form '{scale.form}' cannot measure readings of form '{readings.form}'.")
    at, places = alphas(scale.knots), np.flatnonzero(readings.complete())
    steps = ladder(readings).select(places)

    def deviation(k: int) -> Floats | float:
        if scale.variance is None:
            return scale.pooled[k]
        return np.asarray(np.sqrt(shrunk_N * ((1 - at[k]) ** 2 + at[k] ** 2)))

    shrunk_N = shrunk_variance(steps.out_KN, scale)
    scores_N = np.full(len(readings), np.nan)
    scores_N[places] = climb(
        steps, scale.knots, lambda k, rung: gumbel_cdf(steps.query_N, rung.mean(axis=0), deviation(k))
    )
    return scores_N


def shrunk_variance(out_KN: Floats, scale: Scale) -> Floats:
    """Each sample's variance over its shadows, drawn to the scale's typical one by ``dof``, (N,)."""
    own_dof = len(out_KN) - 1
    typical_N = np.full(out_KN.shape[1], scale.variance or 0.0)
    if own_dof == 0 or not math.isfinite(scale.dof):
        return typical_N
    return np.asarray((scale.dof * typical_N + own_dof * out_KN.var(axis=0, ddof=1)) / (scale.dof + own_dof))


def _prior(own_N: Floats, dof: int, robust: bool) -> tuple[float, float]:
    """Typical variance and its worth in degrees of freedom, when own / typical follows F(dof, worth)."""
    from scipy import special

    floor = 1e-8 * float(np.median(own_N[own_N > 0]))  # a sample that is exactly alike everywhere has no logarithm
    logs_N = np.log(np.maximum(own_N, floor))
    within = float(special.polygamma(1, dof / 2))
    if robust:
        first, middle, third = np.log(2 * special.gammaincinv(dof / 2, [0.25, 0.5, 0.75]) / dof)
        low, centre, high = np.quantile(logs_N, [0.25, 0.5, 0.75])
        level, total = float(centre - middle), within * float((high - low) / (third - first)) ** 2
    else:
        level = float(logs_N.mean() - special.digamma(dof / 2) + math.log(dof / 2))
        total = float(logs_N.var(ddof=1))
    if total <= within:
        return math.exp(level), math.inf
    worth = 2 * _inverse_trigamma(total - within)
    shift = 0.0 if robust else float(special.digamma(worth / 2)) - math.log(worth / 2)
    return math.exp(level + shift), worth


def _inverse_trigamma(value: float) -> float:
    """x > 0 with trigamma(x) = value, by bisection on a logarithmic scale: trigamma falls from infinity to 0."""
    from scipy import special

    low, high = 1e-8, 1e12
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if special.polygamma(1, middle) > value else (low, middle)
    return math.sqrt(low * high)
