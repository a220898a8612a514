"""The scoring functions against a slow reference on one scale, and the mixed scales that must not come back."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from expunge.completeness import iam, scoring
from expunge.completeness.iam import Ladder
from expunge.completeness.readings import Floats, Form, Readings
from expunge.errors import UserError
from expunge.stats import auc

NAMES = ("gumbel", "gauss", "ecdf", "kde", "beta")


def drawn(form: Form, num: int, shadows: int, seed: int = 0) -> Readings:
    """The first half forgotten, the second half kept."""
    rng = np.random.default_rng(seed)
    hard_N = rng.normal(0, 1, num)
    logit = hard_N + rng.normal(0, 0.7, (shadows + 1, num))
    original_N = hard_N + rng.gamma(6, 0.7, num)
    unlearned_N = np.where(np.arange(num) < num // 2, logit[-1], original_N + rng.normal(0, 0.7, num))
    to_reading = (lambda x: np.logaddexp(0, -x)) if form == "text" else (lambda x: 1 / (1 + np.exp(-x)))
    return Readings(
        form, [str(i) for i in range(num)], to_reading(unlearned_N), to_reading(logit[:-1]), to_reading(original_N)
    )


def slow(steps: Ladder, name: str, knots: int) -> list[float]:
    """The formulas of the table with SciPy's distributions, one sample and knot at a time."""
    num, shadows = len(steps.query_N), len(steps.out_KN)
    sums = [0.0] * num
    for k in range(knots - 1):
        a = k / (knots - 1)
        pairs = [(float(steps.fit_N[i]), float(steps.out_KN[j, i])) for j in range(shadows) for i in range(num)]
        ends = [pair if steps.form == "text" else pair[::-1] for pair in pairs]
        rungs = np.array([s + a * (e - s) for s, e in ends]).reshape(shadows, num)
        d = math.sqrt(float(np.mean((rungs - rungs.mean()) ** 2)))
        for i in range(num):
            s, points = float(steps.query_N[i]), [float(x) for x in rungs[:, i]]
            m = sum(points) / shadows
            if name == "gumbel":
                b = math.sqrt(6) * d / math.pi
                value = math.exp(-math.exp(-(s - m + 0.5772 * b) / b))
            elif name in ("gauss", "taylor"):
                value = float(stats.norm.cdf(s, m, d))
            elif name == "ecdf":
                value = sum(x <= s for x in points) / shadows
            elif name == "kde":
                value = sum(float(stats.norm.cdf((s - x) / (d * shadows**-0.2))) for x in points) / shadows
            else:
                t = m * (1 - m) / min(d * d, 0.95 * m * (1 - m)) - 1
                value = float(stats.beta.cdf(s, m * t, (1 - m) * t))
            sums[i] += (k + 1) / (knots - 1) * value
    reached = [s / math.fsum(k / (knots - 1) for k in range(1, knots)) for s in sums]
    return [1 - r for r in reached] if steps.form == "text" else reached


@pytest.mark.parametrize("form", ["text", "classifier"])
@pytest.mark.parametrize("shadows", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_formulas_sample_by_sample(name: str, shadows: int, form: Form) -> None:
    steps = scoring.ladder(drawn(form, 30, shadows), name)
    np.testing.assert_allclose(scoring.score(steps, name, knots=9), slow(steps, name, 9), atol=1e-9)


@pytest.mark.parametrize("form", ["text", "classifier"])
@pytest.mark.parametrize("name", NAMES)
def test_every_scoring_tells_members_from_the_forgotten(name: str, form: Form) -> None:
    readings = drawn(form, 1500, 4)
    scores = scoring.score(scoring.ladder(readings, name), name)
    assert np.all((scores >= 0) & (scores <= 1)) and auc(scores[750:], scores[:750]) > 0.9


def mixed(readings: Readings) -> Ladder:
    """The published bug: probabilities for unlearned and original, logit-scaled confidence for the shadows."""
    right = scoring.ladder(readings, "kde")
    return replace(right, out_KN=np.log(right.out_KN) - np.log1p(-right.out_KN))


@pytest.mark.parametrize("name", ["ecdf", "kde", "beta"])
def test_mixed_scales_are_refused_and_would_be_worse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = drawn("classifier", 1500, 4)
    right = scoring.score(scoring.ladder(readings, name), name)
    with pytest.raises(UserError, match="signals of 'shadow' are outside"):
        scoring.score(mixed(readings), name)
    monkeypatch.setitem(scoring.SCORINGS, name, replace(scoring.SCORINGS[name], unit=False))
    wrong = scoring.score(mixed(readings), name)
    assert auc(right[750:], right[:750]) > auc(wrong[750:], wrong[:750]) + 0.03


def test_gumbel_is_iam() -> None:
    readings = drawn("text", 80, 1)
    np.testing.assert_allclose(
        scoring.score(scoring.ladder(readings, "gumbel")), iam.score(readings, iam.fit(readings)), atol=1e-12
    )


def test_a_frozen_spread_makes_scores_independent_of_the_company() -> None:
    readings = drawn("classifier", 100, 2)
    for name in NAMES:
        steps = scoring.ladder(readings, name)
        sigmas = iam.spreads(steps, iam.KNOTS)
        alone = [scoring.score(steps.select(np.array([i])), name, sigmas=sigmas)[0] for i in (0, 60)]
        np.testing.assert_allclose(alone, scoring.score(steps, name, sigmas=sigmas)[[0, 60]], rtol=1e-12)
    with pytest.raises(UserError, match="no spread"):
        scoring.score(scoring.ladder(drawn("text", 1, 1), "gauss"), "gauss")


@pytest.mark.parametrize("name", NAMES)
def test_row_order_changes_no_bit(name: str) -> None:
    readings = drawn("classifier", 300, 3)
    places = np.random.default_rng(1).permutation(300)
    scores = scoring.score(scoring.ladder(readings, name), name)
    assert np.array_equal(scores[places], scoring.score(scoring.ladder(readings.select(places), name), name))


# -- Taylor softmax ------------------------------------------------------------------------------------------------


def test_taylor_softmax_by_hand() -> None:
    logits = np.array([[2.0, 0.0, -4.0], [1.0, 3.0, 0.5]])
    expected = []
    for row, label in zip(logits / 2.0, (0, 1), strict=True):
        grown = [1 + x + x**2 / 2 + x**3 / 6 + x**4 / 24 for x in row]
        x = row[label] - 0.6
        own = 1 + x + x**2 / 2 + x**3 / 6 + x**4 / 24
        expected.append(own / (own + sum(grown) - grown[label]))
    np.testing.assert_allclose(scoring.taylor_softmax(logits, np.array([0, 1])), expected, rtol=1e-12)


def test_taylor_softmax_nears_softmax_and_refuses_odd_orders() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (50, 5)), rng.integers(0, 5, 50)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = scoring.taylor_softmax(logits, labels, margin=0, order=40, temperature=1)
    np.testing.assert_allclose(found, softmax[np.arange(50), labels], atol=1e-9)
    with pytest.raises(UserError, match="even"):
        scoring.taylor_softmax(logits, labels, order=3)


def test_taylor_scoring_takes_precomputed_signals() -> None:
    rng = np.random.default_rng(0)
    num, labels = 600, np.zeros(600, dtype=np.intp)

    def signal(lift: Floats) -> Floats:
        logits = rng.normal(0, 1, (num, 4))
        logits[:, 0] += lift
        return scoring.taylor_softmax(logits, labels)

    member = np.arange(num) >= 300
    steps = Ladder(
        "classifier", signal(4.0 * member), signal(np.full(num, 4.0)), np.stack([signal(np.zeros(num)) for _ in "ab"])
    )
    scores = scoring.score(steps, "taylor", knots=9)
    np.testing.assert_allclose(scores[::50], np.array(slow(steps, "taylor", 9))[::50], atol=1e-9)
    assert auc(scores[member], scores[~member]) > 0.9
    with pytest.raises(UserError, match="logits of all classes"):
        scoring.ladder(drawn("classifier", 5, 1), "taylor")


def test_an_unknown_scoring_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'gauss'"):
        scoring.get_scoring("gaus")


# -- simple differences --------------------------------------------------------------------------------------------


def test_simple_scores_by_hand() -> None:
    text = Readings("text", ["a"], np.array([1.5]), np.array([[2.0], [3.0]]), np.array([0.5]))
    p_u, p_o, p_out = math.exp(-1.5), math.exp(-0.5), (math.exp(-2) + math.exp(-3)) / 2
    expected = {
        "prob": p_u,
        "loss": -1.5,
        "prob-difference": p_u - p_o,
        "loss-difference": -1.0,
        "gap-ratio": (2.5 - 1.5) / (2.5 - 0.5),
        "prob-ratio": p_u / ((p_o + p_out) / 2),
    }
    found = scoring.simple_scores(text)
    assert {name: pytest.approx(value) for name, value in expected.items()} == {k: v[0] for k, v in found.items()}
    unit = replace(
        text,
        form="classifier",
        unlearned_N=np.exp(-text.unlearned_N),
        shadow_KN=np.exp(-text.shadow_KN),
        original_N=np.array([p_o]),
    )
    assert {k: v[0] for k, v in scoring.simple_scores(unit).items()} == pytest.approx(
        {name: float(v) for name, v in expected.items()}
    )
    assert set(scoring.simple_scores(replace(text, original_N=None))) == {"prob", "loss"}
