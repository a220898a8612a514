"""IAM against golden vectors, a slow reference, and what a score must not depend on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from expunge.completeness import iam
from expunge.completeness.readings import Floats, Form, Readings, classifier_signal, text_signal
from expunge.errors import UserError
from expunge.stats import auc

TEXT = Readings(
    "text",
    list("abcd"),
    np.array([1.2, 2.6, 0.8, 2.2]),
    np.array([[2.5, 2.7, 2.4, 2.6]]),
    np.array([1.0, 1.1, 0.9, 1.0]),
)
CLASSIFIER = Readings(
    "classifier",
    list("abcd"),
    np.array([0.35, 0.95, 0.90, 0.90]),
    np.array([[0.30, 0.70, 0.90, 0.10], [0.4, 0.6, 0.95, 0.2]]),
    np.array([0.99, 0.98, 0.999, 0.95]),
)


def drawn(form: Form, num: int, shadows: int = 1, seed: int = 0) -> Readings:
    """The first half forgotten (the unlearned model is one more draw of a shadow), the second half kept."""
    rng = np.random.default_rng(seed)
    hard_N = rng.normal(0, 1, num)
    logit = hard_N + rng.normal(0, 0.7, (shadows + 1, num))
    original_N = hard_N + rng.gamma(6, 0.7, num)
    unlearned_N = np.where(np.arange(num) < num // 2, logit[-1], original_N + rng.normal(0, 0.7, num))
    to_reading = (lambda x: np.logaddexp(0, -x)) if form == "text" else (lambda x: 1 / (1 + np.exp(-x)))
    label_N = (np.arange(num) >= num // 2).astype(float)
    ids = [f"s{i:05d}" for i in rng.permutation(num)]
    return Readings(form, ids, to_reading(unlearned_N), to_reading(logit[:-1]), to_reading(original_N), label_N=label_N)


def slow_parity(readings: Readings, knots: int) -> list[float]:
    """The published formulas sample by sample, in plain Python and with SciPy's Gumbel distribution."""
    assert readings.original_N is not None
    text = readings.form == "text"

    def signal(x: float) -> float:
        if text:
            return -math.log(0.1 - math.log(1e-5 + 1 - math.exp(-x)))
        low, high = (-math.log(0.01 - math.log(p + 1e-5)) for p in (0.0, 1.0))
        return (-math.log(0.01 - math.log(x + 1e-5)) - low) / (high - low)

    fit = [signal(x) for x in readings.original_N]
    out = [[signal(x) for x in row] for row in readings.shadow_KN]
    query = [signal(x) for x in readings.unlearned_N]
    num, sums = len(query), [0.0] * len(query)
    for k in range(knots - 1):
        a = k / (knots - 1)
        rungs = [[f + a * (o - f) if text else o + a * (f - o) for f, o in zip(fit, row, strict=True)] for row in out]
        everything = [x for row in rungs for x in row]
        centre = math.fsum(everything) / len(everything)
        sigma = math.sqrt(math.fsum((x - centre) ** 2 for x in everything) / len(everything)) + (1e-9 if text else 0)
        beta = math.sqrt(6) * sigma / math.pi
        for i in range(num):
            mean = math.fsum(row[i] for row in rungs) / len(rungs)
            sums[i] += (k + 1) / (knots - 1) * float(stats.gumbel_r.cdf(query[i], mean - 0.5772 * beta, beta))
    return [1 - s / math.fsum(k / (knots - 1) for k in range(1, knots)) for s in sums]


# -- as published --------------------------------------------------------------------------------------------------


def test_golden_vector_of_the_text_form() -> None:
    np.testing.assert_allclose(iam.parity(TEXT), [0.963836, 0.083133, 0.999997, 0.322784], atol=1e-5)


def test_golden_vectors_of_the_classifier_form() -> None:
    np.testing.assert_allclose(
        classifier_signal(CLASSIFIER.original_N), [0.901261, 0.843131, 0.986463, 0.742726], atol=1e-6
    )
    one = replace(CLASSIFIER, shadow_KN=CLASSIFIER.shadow_KN[:1])
    np.testing.assert_allclose(iam.parity(one), [0.9711, 0.445786, 0.944656, 0.311186], atol=1e-5)
    np.testing.assert_allclose(iam.parity(CLASSIFIER), [0.974471, 0.427943, 0.962179, 0.326559], atol=1e-5)


@pytest.mark.parametrize(("form", "shadows"), [("text", 1), ("text", 3), ("classifier", 1), ("classifier", 4)])
def test_parity_equals_the_formulas_sample_by_sample(form: Form, shadows: int) -> None:
    readings = drawn(form, 40, shadows)
    np.testing.assert_allclose(iam.parity(readings, knots=24), slow_parity(readings, 24), atol=1e-12)


def test_synthetic_behaviour_of_the_published_score() -> None:
    """U of 20,000 fully fitted samples and uniform shadows: monotone in the interpolation fraction, but not linear."""
    rng = np.random.default_rng(0)
    original_N, shadow_N, other_N = rng.beta(100, 1, 20000), rng.random(20000), rng.random(20000)
    halfway = (classifier_signal(original_N) + classifier_signal(shadow_N)) / 2
    low, high = (-math.log(0.01 - math.log(p + 1e-5)) for p in (0.0, 1.0))
    middle_N = np.exp(0.01 - np.exp(-(halfway * (high - low) + low))) - 1e-5
    ids = list(map(str, range(20000)))
    expected = {"same": (0.953, 0.082), "other": (0.893, 0.188), "original": (0.082, 0.076), "middle": (0.728, 0.050)}
    served = {"same": shadow_N, "other": other_N, "original": original_N, "middle": middle_N}
    for name, (mean, deviation) in expected.items():
        scores = iam.parity(Readings("classifier", ids, served[name], shadow_N[None], original_N))
        assert scores.mean() == pytest.approx(mean, abs=0.025), name
        assert scores.std() == pytest.approx(deviation, abs=0.02), name


@pytest.mark.parametrize("form", ["text", "classifier"])
def test_row_order_changes_no_bit(form: Form) -> None:
    readings = drawn(form, 501, 2)
    places = np.random.default_rng(3).permutation(len(readings))
    assert np.array_equal(iam.parity(readings)[places], iam.parity(readings.select(places)))
    scale, shuffled = iam.fit(readings), iam.fit(readings.select(places))
    assert scale == shuffled
    assert np.array_equal(iam.score(readings, scale)[places], iam.score(readings.select(places), scale))


def test_batches_are_pooled_by_themselves_in_the_order_given() -> None:
    readings = drawn("text", 150)
    batched = iam.parity(readings, batch=64)
    for start, end in ((0, 64), (64, 128), (128, 150)):
        part = readings.select(np.arange(start, end))
        assert np.array_equal(batched[start:end], iam.parity(part))
    assert np.abs(batched - iam.parity(readings)).max() > 1e-3, "the published score depends on the company"


def test_incomplete_rows_have_no_score_and_change_no_other() -> None:
    readings = drawn("text", 60)
    hole = replace(readings, unlearned_N=np.where(np.arange(60) == 7, np.nan, readings.unlearned_N))
    without = readings.select(np.arange(60) != 7)
    assert np.isnan(iam.parity(hole)[7]) and np.isnan(iam.score(hole, iam.fit(hole))[7])
    assert np.array_equal(np.delete(iam.parity(hole), 7), iam.parity(without))


def test_few_knots_are_enough() -> None:
    readings = drawn("classifier", 4000)
    members = readings.label_N == 1
    few, many = (-iam.parity(readings, knots=n) for n in (iam.KNOTS, 256))
    assert abs(auc(few[members], few[~members]) - auc(many[members], many[~members])) < 0.002


# -- offline -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # SciPy's Gumbel far below its mean
@pytest.mark.parametrize("form", ["text", "classifier"])
def test_the_offline_anchor_is_the_mean_signal(form: Form) -> None:
    values = np.random.default_rng(0).gamma(2, 0.3, 50) if form == "text" else np.random.default_rng(0).beta(9, 1, 50)
    signal = text_signal if form == "text" else classifier_signal
    assert signal(np.array(iam.typical(values, form))) == pytest.approx(signal(values).mean(), abs=1e-9)
    readings = drawn(form, 30)
    away = iam.offline(replace(readings, original_N=None), iam.typical(values, form))
    assert iam.parity(away, knots=12) == pytest.approx(slow_parity(away, 12), abs=1e-12)


def test_offline_needs_an_anchor_that_can_be() -> None:
    readings = replace(drawn("classifier", 5), original_N=None)
    with pytest.raises(UserError, match="no readings of the original"):
        iam.parity(readings)
    with pytest.raises(UserError, match="not a probability"):
        iam.offline(readings, 1.2)
    with pytest.raises(UserError, match="not a loss"):
        iam.offline(replace(drawn("text", 5), original_N=None), -0.1)


def test_samples_without_spread_are_refused_in_words() -> None:
    with pytest.raises(UserError, match="give more rows"):
        iam.parity(replace(CLASSIFIER, shadow_KN=CLASSIFIER.shadow_KN[:1]).select([0]))
    with pytest.raises(UserError, match="at least 2"):
        iam.fit(TEXT.select([1]))
    with pytest.raises(UserError, match="no spread"):
        iam.fit(TEXT.select([1, 1]))


# -- our own -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "shadows"), [("text", 1), ("classifier", 1), ("text", 4), ("classifier", 4)])
def test_a_score_does_not_depend_on_the_company(form: Form, shadows: int) -> None:
    readings = drawn(form, 200, shadows)
    scale = iam.fit(readings)
    together = iam.score(readings, scale)
    for i in (0, 99, 150, 199):
        assert iam.score(readings.select([i]), scale)[0] == together[i]


@pytest.mark.parametrize(("form", "shadows"), [("text", 1), ("classifier", 1), ("text", 4), ("classifier", 4)])
@pytest.mark.parametrize("robust", [False, True])
def test_members_score_higher_and_ends_are_ends(form: Form, shadows: int, robust: bool) -> None:
    readings = drawn(form, 2000, shadows)
    assert readings.original_N is not None
    scale = iam.fit(readings, robust=robust)
    scores, members = iam.score(readings, scale), readings.label_N == 1
    assert np.all((scores >= 0) & (scores <= 1)) and auc(scores[members], scores[~members]) > 0.93
    kept = iam.score(replace(readings, unlearned_N=readings.original_N), scale)
    gone = iam.score(replace(readings, unlearned_N=readings.shadow_KN[0]), scale)
    assert np.median(kept) > 0.75 and np.median(gone) < 0.2


def test_with_one_shadow_on_its_own_samples_it_is_the_published_score() -> None:
    readings = drawn("classifier", 50)
    assert iam.score(readings, iam.fit(readings)) == pytest.approx(1 - iam.parity(readings, knots=iam.KNOTS), abs=1e-12)
    readings = drawn("text", 50)
    assert iam.score(readings, iam.fit(readings)) == pytest.approx(iam.parity(readings, knots=iam.KNOTS), abs=1e-6)


def shadow_variances(dof: int, prior_dof: float, typical: float, num: int) -> Floats:
    """Sample variances whose true variances vary as scaled inverse chi-square."""
    rng = np.random.default_rng(1)
    true_N = typical * prior_dof / rng.chisquare(prior_dof, num)
    return np.asarray(true_N * rng.chisquare(dof, num) / dof)


@pytest.mark.parametrize("dof", [1, 3, 9])
@pytest.mark.parametrize("robust", [False, True])
def test_the_prior_of_variances_is_recovered(dof: int, robust: bool) -> None:
    variance, worth = iam._prior(shadow_variances(dof, 6.0, 0.25, 40000), dof, robust)
    assert variance == pytest.approx(0.25, rel=0.25 if robust else 0.05)
    assert worth == pytest.approx(6.0, rel=0.35 if robust else 0.25)


def test_equal_variances_are_pooled_whole() -> None:
    own = np.full(1000, 0.3)
    variance, worth = iam._prior(own, 3, False)
    assert worth == math.inf and variance > 0
    rng = np.random.default_rng(0)
    out = rng.normal(0, 1, (2, 5))
    scale = iam.Scale("text", (1.0, 1.0), 0.3, math.inf, 5, 2)
    assert np.array_equal(iam.shrunk_variance(out, scale), np.full(5, 0.3))
    half = replace(scale, dof=1.0)
    expected = (0.3 + out.var(axis=0, ddof=1)) / 2
    np.testing.assert_allclose(iam.shrunk_variance(out, half), expected)


def test_own_spread_beats_the_pooled_one_where_samples_differ() -> None:
    """Samples whose shadows agree and samples whose shadows do not: the same step means different things."""
    rng = np.random.default_rng(0)
    num, shadows = 4000, 6
    noise_N = np.where(np.arange(num) % 2 == 0, 0.05, 0.6)
    centre_N = rng.normal(1.5, 0.1, num)
    out = centre_N + noise_N * rng.normal(0, 1, (shadows, num))
    member = np.arange(num) % 4 < 2
    original_N = centre_N - 0.5
    unlearned_N = np.where(member, centre_N - 0.3, centre_N) + noise_N * rng.normal(0, 0.5, num)
    readings = Readings(
        "text", [str(i) for i in range(num)], np.maximum(unlearned_N, 0.01), np.maximum(out, 0.01), original_N
    )
    own = iam.fit(readings)
    pooled = replace(own, variance=None)
    scores, plain = iam.score(readings, own), iam.score(readings, pooled)
    assert auc(scores[member], scores[~member]) > auc(plain[member], plain[~member]) + 0.005


def test_robust_scale_ignores_a_few_wild_samples() -> None:
    readings = drawn("text", 400)
    wild = replace(readings, shadow_KN=np.where(np.arange(400) < 12, 60.0, readings.shadow_KN))
    moved = [
        np.mean(iam.fit(wild, robust=r).pooled) / np.mean(iam.fit(readings, robust=r).pooled) for r in (True, False)
    ]
    assert abs(moved[0] - 1) < abs(moved[1] - 1) and abs(moved[0] - 1) < 0.06


def test_a_scale_goes_through_json() -> None:
    for shadows in (1, 3):
        scale = iam.fit(drawn("text", 50, shadows))
        assert iam.Scale.of(json.loads(json.dumps(scale.record()))) == scale
    with pytest.raises(UserError, match="form 'text' cannot measure"):
        iam.score(drawn("classifier", 5), scale)
