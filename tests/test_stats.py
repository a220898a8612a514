"""Intervals and tests against slow references, closed forms and published figures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from expunge import stats
from expunge.errors import UserError

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


def slow_auc(pos: list[float], neg: list[float]) -> float:
    return sum((p > n) + 0.5 * (p == n) for p in pos for n in neg) / (len(pos) * len(neg))


def slow_delong_variance(pos: list[float], neg: list[float]) -> float:
    """DeLong, DeLong and Clarke-Pearson (1988), from the placement matrix."""
    kernel = np.array([[(p > n) + 0.5 * (p == n) for n in neg] for p in pos])
    return float(kernel.mean(1).var(ddof=1) / len(pos) + kernel.mean(0).var(ddof=1) / len(neg))


# -- bootstrap -----------------------------------------------------------------------------------------------------


def test_bootstrap_is_deterministic_and_brackets_the_mean() -> None:
    values = np.random.default_rng(1).normal(size=80)
    first, again = stats.bootstrap_mean(values, seed=3), stats.bootstrap_mean(values, seed=3)
    assert first == again
    assert first.low < first.value < first.high and first.n == 80
    assert first.value == pytest.approx(values.mean())
    assert stats.bootstrap_mean(values, seed=4).low != first.low


def test_ungrouped_bootstrap_has_the_standard_error_of_the_mean() -> None:
    values = np.random.default_rng(2).normal(size=400)
    draws = stats.bootstrap_means(values, resamples=20_000)
    assert draws.std() == pytest.approx(values.std() / math.sqrt(400), rel=0.03)


def test_clustered_bootstrap_treats_a_subject_as_one_unit() -> None:
    """20 identical copies of an item carry no more information than one."""
    per_subject = np.random.default_rng(0).normal(size=30)
    copies = np.repeat(per_subject, 20)
    subjects = np.repeat(np.arange(30), 20)
    grouped = stats.bootstrap_means(copies, subjects, resamples=20_000).std()
    assert grouped == pytest.approx(per_subject.std() / math.sqrt(30), rel=0.03)
    assert stats.bootstrap_means(copies, resamples=4000).std() < grouped / 4


def test_weighted_resampling_equals_drawing_groups_by_hand() -> None:
    """The same multinomial weights, applied by listing every drawn item."""
    values, groups = np.arange(7.0), list("aabbbcd")
    fast = stats.bootstrap_means(values, groups, resamples=5, seed=9)
    weights = stats.resampled_weights(4, 5, np.random.default_rng(9))
    members = [[0, 1], [2, 3, 4], [5], [6]]
    for mean, row in zip(fast, weights, strict=True):
        drawn = [values[i] for g, times in enumerate(row) for _ in range(int(times)) for i in members[g]]
        assert mean == pytest.approx(np.mean(drawn))


def test_bootstrap_coverage_is_near_the_level() -> None:
    rng = np.random.default_rng(5)
    inside = 0
    for trial in range(300):
        shifts = np.repeat(rng.normal(size=40), 5)
        found = stats.bootstrap_mean(
            shifts + rng.normal(size=200), np.repeat(np.arange(40), 5), resamples=300, seed=trial
        )
        inside += found.low <= 0 <= found.high
    assert 0.90 <= inside / 300 <= 0.98


def test_bca_agrees_with_scipy_on_skewed_data() -> None:
    values = np.random.default_rng(3).exponential(size=60)
    ours = stats.bootstrap_mean(values, method="bca", resamples=20_000)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0))
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.015)


def test_nothing_measured_and_one_subject() -> None:
    empty = stats.bootstrap_mean([])
    assert math.isnan(empty.value) and empty.n == 0 and empty.record()["value"] is None
    one = stats.bootstrap_mean([1.0, 3.0], ["a", "a"])
    assert one.value == 2.0 and math.isnan(one.low) and one.n == 2
    gaps = stats.bootstrap_mean([1.0, math.nan, 3.0])
    assert gaps.value == 2.0 and gaps.n == 2


def test_all_forgotten_is_not_certainty() -> None:
    found = stats.bootstrap_mean(np.ones(20))
    assert found.high == 1.0 and found.low == pytest.approx(0.025 ** (1 / 20))
    grouped = stats.bootstrap_mean(np.zeros(20), np.repeat(np.arange(5), 4))
    assert grouped.low == 0.0 and grouped.high == pytest.approx(1 - 0.025 ** (1 / 5))


def test_columns_with_gaps_keep_their_own_counts() -> None:
    table = np.array([[1.0, math.nan], [3.0, 5.0], [math.nan, 7.0]])
    means = stats.bootstrap_means(table, resamples=4000, seed=1)
    assert means.shape == (4000, 2)
    assert np.nanmin(means[:, 1]) == 5.0 and np.nanmax(means[:, 1]) == 7.0


def test_user_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="3 values but 2 groups"):
        stats.bootstrap_mean([1.0, 2.0, 3.0], ["a", "b"])
    with pytest.raises(UserError, match=r"between 0 and 1"):
        stats.bootstrap_mean([1.0], level=95)
    with pytest.raises(UserError, match="impossible"):
        stats.wilson(3, 2)


def test_distance_from_a_target_is_two_sided() -> None:
    below = stats.Estimate(-0.3, -0.4, -0.1, 9).distance_from()
    assert (below.value, below.low, below.high) == pytest.approx((0.3, 0.1, 0.4))
    across = stats.Estimate(0.1, -0.2, 0.3, 9).distance_from()
    assert (across.value, across.low, across.high) == pytest.approx((0.1, 0.0, 0.3))


# -- proportions and seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wilson", "exact"])
@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (1, 1), (250, 1000)])
def test_proportion_intervals_equal_scipy(method: str, successes: int, trials: int) -> None:
    ours = (stats.wilson if method == "wilson" else stats.clopper_pearson)(successes, trials)
    theirs = scipy_stats.binomtest(successes, trials).proportion_ci(method=method)
    assert ours.low == pytest.approx(theirs.low, abs=1e-12) and ours.high == pytest.approx(theirs.high, abs=1e-12)


def test_clopper_pearson_never_covers_less() -> None:
    for share in (0.02, 0.3, 0.5):
        covered = 0.0
        for successes in range(31):
            found = stats.clopper_pearson(successes, 30)
            if found.low <= share <= found.high:
                covered += float(scipy_stats.binom.pmf(successes, 30, share))
        assert covered >= 0.95


def test_seed_interval_is_students() -> None:
    found = stats.seed_interval([1.0, 2.0, 3.0])
    assert found.high - found.value == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975, 2) from tables
    assert math.isnan(stats.seed_interval([1.0]).low)


def test_hoeffding_needs_the_published_number_of_items() -> None:
    """18,445 items give +-0.01 at 95 %."""
    found = stats.hoeffding_mean(np.full(18_445, 0.5))
    assert found.high - 0.5 == pytest.approx(0.01, abs=1e-6)
    with pytest.raises(UserError, match="between 0 and 1"):
        stats.hoeffding_mean([2.0])


# -- Kolmogorov-Smirnov --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "slack"), [(400, 0.148), (40, 0.468), (4000, 0.047)])
def test_dkw_slack_closed_form(num: int, slack: float) -> None:
    assert stats.dkw_slack(num, num) == pytest.approx(slack, abs=5e-4)


@given(SCORES, SCORES)
@settings(max_examples=60, deadline=None)
def test_ks_distance_is_the_largest_gap_of_the_two_distribution_functions(a: list[float], b: list[float]) -> None:
    gap = max(abs(sum(x <= t for x in a) / len(a) - sum(x <= t for x in b) / len(b)) for t in a + b)
    found = stats.kolmogorov_smirnov(a, b)
    assert found.distance.value == pytest.approx(gap)
    assert found.distance.low <= gap <= found.distance.high <= 1


def test_exact_ks_p_value_by_enumeration() -> None:
    """All 70 ways to split 8 ranks into two samples of 4."""
    a, b = [1.0, 2.0, 3.0, 6.0], [4.0, 5.0, 7.0, 8.0]

    def distance(first: tuple[int, ...]) -> float:
        second = [r for r in range(8) if r not in first]
        return max(abs(sum(x <= t for x in first) - sum(x <= t for x in second)) / 4 for t in range(8))

    splits = [distance(c) for c in itertools.combinations(range(8), 4)]
    found = stats.kolmogorov_smirnov(a, b)
    assert found.p_value == pytest.approx(np.mean([d >= found.distance.value - 1e-9 for d in splits]))


# -- AUC and TPR ---------------------------------------------------------------------------------------------------


@given(SCORES, SCORES)
@settings(max_examples=80, deadline=None)
def test_auc_counts_pairs_with_ties_as_half(pos: list[float], neg: list[float]) -> None:
    assert stats.auc(pos, neg) == pytest.approx(slow_auc(pos, neg))
    found = stats.auc_estimate(pos, neg)
    assert math.isnan(found.low) or found.low - 1e-9 <= found.value <= found.high + 1e-9


def test_delong_interval_equals_the_placement_matrix() -> None:
    rng = np.random.default_rng(0)
    pos, neg = np.round(rng.normal(0.8, 1, 40), 1).tolist(), np.round(rng.normal(0, 1, 25), 1).tolist()
    value, variance = slow_auc(pos, neg), slow_delong_variance(pos, neg)
    found = stats.auc_estimate(pos, neg)
    half = 1.959963984540054 * math.sqrt(variance) / (value * (1 - value))
    assert math.log(found.high / (1 - found.high)) - math.log(value / (1 - value)) == pytest.approx(half)
    assert stats.auc_estimate(pos, neg, list(range(40)), list(range(25))) == found


def test_clustered_auc_is_wider_and_matches_the_bootstrap() -> None:
    rng = np.random.default_rng(1)
    pos = np.repeat(rng.normal(0.7, 1, 40), 6) + rng.normal(0, 0.1, 240)
    neg = np.repeat(rng.normal(0, 1, 40), 6) + rng.normal(0, 0.1, 240)
    groups = np.repeat(np.arange(40), 6).tolist()
    plain, clustered = stats.auc_estimate(pos, neg), stats.auc_estimate(pos, neg, groups, groups)
    assert clustered.high - clustered.low > 1.8 * (plain.high - plain.low)
    draws = stats.bootstrap_auc([(pos, neg)], groups, groups, resamples=4000)[0]
    assert clustered.high - clustered.low == pytest.approx(2 * 1.96 * draws.std(), rel=0.12)


def test_auc_at_the_edges() -> None:
    perfect = stats.auc_estimate([2.0, 3.0, 4.0], [0.0, 1.0])
    assert perfect.value == 1.0 and perfect.high == 1.0 and perfect.low == pytest.approx(0.025 ** (1 / 2))
    equal = stats.auc_estimate([1.0] * 5, [1.0] * 5)
    assert equal.value == 0.5
    assert math.isnan(stats.auc_estimate([], [1.0]).value)
    assert math.isnan(stats.auc([1.0], []))


def test_bootstrap_auc_equals_resampling_by_hand() -> None:
    rng = np.random.default_rng(4)
    pos, neg = rng.integers(0, 4, 9).astype(float), rng.integers(0, 4, 7).astype(float)  # many ties
    pos_groups, neg_groups = list("aabbbcccc"), list("xxyyyzz")
    fast = stats.bootstrap_auc([(pos, neg)], pos_groups, neg_groups, resamples=6, seed=2)[0]
    again = np.random.default_rng(2)
    weights = stats.resampled_weights(3, 6, again), stats.resampled_weights(3, 6, again)
    for r in range(6):
        sides = []
        for values, groups, side in ((pos, pos_groups, 0), (neg, neg_groups, 1)):
            names = list(dict.fromkeys(groups))
            sides.append(
                [v for v, g in zip(values, groups, strict=True) for _ in range(int(weights[side][r][names.index(g)]))]
            )
        assert fast[r] == pytest.approx(slow_auc(*sides))


@given(SCORES, SCORES, st.sampled_from([0.0, 0.1, 0.34, 0.5, 1.0]))
@settings(max_examples=80, deadline=None)
def test_tpr_is_the_best_over_all_thresholds(pos: list[float], neg: list[float], fpr: float) -> None:
    best = max(
        (
            np.mean([p >= t for p in pos])
            for t in [*pos, *neg, math.inf]
            if np.mean([n >= t for n in neg]) <= fpr + 1e-9
        ),
        default=0.0,
    )
    found = stats.tpr_at_fpr(pos, neg, fpr, resamples=20)
    assert found.value == pytest.approx(best)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("fpr", [0.0, 0.1, 0.3, 1.0])
def test_bootstrap_of_tpr_equals_resampling_by_hand(fpr: float) -> None:
    rng = np.random.default_rng(6)
    pos, neg = np.round(rng.normal(0.5, 1, 11), 1), np.round(rng.normal(size=9), 1)
    codes = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]), np.array([0, 0, 1, 1, 1, 2, 3, 3, 3])
    fast = stats._bootstrap_tpr(pos, neg, *codes, fpr, 40, 7)
    again = np.random.default_rng(7)
    neg_weights, pos_weights = stats.resampled_weights(4, 40, again), stats.resampled_weights(4, 40, again)
    for r in range(40):
        drawn_pos = np.repeat(pos, pos_weights[r][codes[0]].astype(int))
        drawn_neg = np.repeat(neg, neg_weights[r][codes[1]].astype(int))
        assert fast[r] == pytest.approx(stats._tpr(drawn_pos, drawn_neg, fpr))


def test_tpr_says_when_the_rate_is_not_resolved() -> None:
    found = stats.tpr_at_fpr([1.0, 2.0], [0.0] * 50, 0.001, resamples=20)
    assert "50 negatives" in found.note and found.record()["note"] == found.note
    assert stats.tpr_at_fpr([1.0], [0.0] * 1000, 0.001, resamples=20).note == ""
    with pytest.raises(UserError, match="false-positive rate"):
        stats.tpr_at_fpr([1.0], [0.0], 5)
