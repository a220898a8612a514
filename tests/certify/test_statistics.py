"""TOST, bounded divergences and audits: published figures, closed forms, and coverage in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from expunge.certify.audits import (
    ceiling,
    loss_from_rates,
    mu_from_rates,
    one_run_loss,
    one_run_p_value,
    one_run_unlearning_loss,
)
from expunge.certify.divergence import bounded_mean, empirical_bernstein, group_means, groups_needed
from expunge.certify.equivalence import equivalence, power, runs_needed
from expunge.errors import UserError
from expunge.stats import dkw_slack, hoeffding_mean, kolmogorov_smirnov

# -- equivalence -----------------------------------------------------------------------------------------------


def test_power_table() -> None:
    """The table of 90 % power by the normal approximation; the exact t test needs one run more everywhere."""
    assert [runs_needed(m, exact=False) for m in (0.5, 1, 1.5, 2)] == [87, 22, 10, 6]
    assert [runs_needed(m) for m in (0.5, 1, 1.5, 2)] == [88, 23, 11, 7]


def test_power_is_that_of_simulated_runs() -> None:
    rng = np.random.default_rng(0)
    for runs, margin, difference in ((7, 2.0, 0.0), (23, 1.0, 0.3), (11, 1.5, 0.5)):
        a, b = rng.normal(difference, 1, (20_000, runs)), rng.normal(0, 1, (20_000, runs))
        error = np.sqrt((a.var(1, ddof=1) + b.var(1, ddof=1)) / runs)
        half = scipy_stats.t.ppf(0.95, 2 * runs - 2) * error
        gap = a.mean(1) - b.mean(1)
        called = float(np.mean((gap - half > -margin) & (gap + half < margin)))
        assert power(runs, margin, difference=difference) == pytest.approx(called, abs=0.012)


def test_equivalence_agrees_with_statsmodels_formula_by_hand() -> None:
    a, b = np.array([1.0, 1.2, 0.9, 1.1]), np.array([1.05, 0.95, 1.3, 1.0, 1.1])
    found = equivalence(a, b, 0.3)
    low = scipy_stats.ttest_ind(a, b - 0.3, equal_var=False, alternative="greater").pvalue
    high = scipy_stats.ttest_ind(a, b + 0.3, equal_var=False, alternative="less").pvalue
    assert found.p_value == pytest.approx(max(low, high), rel=1e-10)
    assert found.equivalent == (found.p_value < 0.05)
    assert found.runs == (4, 5)


def test_error_of_equivalence_at_the_margin_is_at_most_alpha() -> None:
    rng = np.random.default_rng(1)
    wrong = sum(equivalence(rng.normal(1.0, 1, 12), rng.normal(0, 2, 9), 1.0).equivalent for _ in range(3000))
    assert wrong / 3000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 3000)


def test_few_runs_decide_nothing_and_far_runs_differ() -> None:
    few = equivalence([0.0, 1.0], [0.1, 0.9], 0.5)
    assert not few.equivalent and not few.different
    assert equivalence([5.0, 5.1, 4.9], [0.0, 0.1, -0.1], 0.5).different
    same = equivalence([0.2, 0.2], [0.2, 0.2], 0.5)
    assert same.equivalent and same.p_value == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: equivalence([1.0], [1.0, 2.0], 1.0), "at least 2"),
        (lambda: equivalence([1.0, math.nan], [1.0, 2.0], 1.0), "not finite"),
        (lambda: equivalence([1.0, 2.0], [1.0, 2.0], 0.0), "margin"),
        (lambda: equivalence([1.0, 2.0], [1.0, 2.0], 1.0, alpha=0.7), "alpha"),
        (lambda: runs_needed(1.0, difference=1.0), "no number of runs"),
        (lambda: runs_needed(0.001), "widen the margin"),
        (lambda: runs_needed(1.0, wanted=1.5), "power"),
        (lambda: bounded_mean([0.5, 1.5]), "between 0 and 1"),
        (lambda: groups_needed(2.0), "half-width"),
        (lambda: loss_from_rates(1, 0, 0, 4), "at least one run"),
        (lambda: loss_from_rates(1, 4, 0, 4, delta=2), "delta"),
        (lambda: one_run_loss(10, 12, 5), "impossible"),
    ],
)
def test_bad_input(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(UserError, match=words):
        call()


# -- bounded divergences ------------------------------------------------------------------------------------------


def test_published_sizes_of_distribution_free_statements() -> None:
    assert groups_needed(0.01) == 18_445
    # One-sample DKW √(ln(2/α)/2n) on each side gives the published slacks ÷ its two-sample form at α/2 each.
    slack = [2 * math.sqrt(math.log(4 / 0.05) / (2 * n)) for n in (40, 400, 4000)]
    assert [round(s, 3) for s in slack] == [0.468, 0.148, 0.047]
    assert [dkw_slack(n, n) for n in (40, 400, 4000)] == pytest.approx(slack)


def test_empirical_bernstein_closed_form() -> None:
    values = np.tile([0.2, 0.4], 200)
    found = empirical_bernstein(values)
    log = math.log(80)
    half = math.sqrt(2 * float(values.var(ddof=1)) * log / 400) + 7 * log / (3 * 399)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half))
    assert found.high - found.low < hoeffding_mean(values).high - hoeffding_mean(values).low


def test_groups_are_the_unit() -> None:
    """A thousand values of one subject are one observation."""
    subjects = ["a"] * 1000 + ["b", "c"]
    values = [0.0] * 1000 + [0.9, 0.6]
    assert group_means(values, subjects).tolist() == pytest.approx([0.0, 0.9, 0.6])
    assert bounded_mean(values, subjects).n == 3
    assert bounded_mean([math.nan, 0.5, 0.7], ["a", "a", "b"]).value == pytest.approx(0.6)
    assert empirical_bernstein([0.5], ["a"]).high == 1.0
    assert math.isnan(bounded_mean([math.nan]).value)


@pytest.mark.parametrize("num", [4, 40, 400])
def test_bounds_cover(num: int) -> None:
    """Skewed values in clusters, the hardest case: the mean of a rare 1."""
    rng = np.random.default_rng(num)
    missed = dict.fromkeys(("bernstein", "bounded", "hoeffding"), 0)
    trials, truth = 400, 0.1
    for _ in range(trials):
        groups = np.repeat(np.arange(num), 3)
        values = np.repeat((rng.random(num) < truth).astype(float), 3)
        for name, found in (
            ("bernstein", empirical_bernstein(values, groups)),
            ("bounded", bounded_mean(values, groups)),
            ("hoeffding", hoeffding_mean(values, groups)),
        ):
            missed[name] += not found.low <= truth <= found.high
    assert max(missed.values()) <= trials * 0.05


def test_dkw_covers() -> None:
    rng, missed, truth = np.random.default_rng(5), 0, 0.2
    for _ in range(300):
        found = kolmogorov_smirnov(rng.random(60), rng.random(60) + truth).distance
        missed += not found.low <= truth <= found.high
    assert missed <= 15


# -- audits ---------------------------------------------------------------------------------------------------------


def test_published_ceilings() -> None:
    assert [round(ceiling(n), 2) for n in (10, 20, 50, 100, 1000)] == [0.81, 1.60, 2.57, 3.28, 5.60]


def test_published_one_run_figures() -> None:
    found = {m: [round(one_run_loss(m, m, int(m * s)).low, 2) for s in (1, 0.75, 0.6)] for m in (100, 1000)}
    assert found == {100: [3.49, 0.70, 0.05], 1000: [5.78, 0.98, 0.30]}
    assert one_run_loss(100, 100, 60).ceiling == pytest.approx(3.49, abs=0.005)


def test_one_run_p_value_against_a_loop() -> None:
    for canaries, guesses, right, loss, delta in (
        (20, 15, 12, 0.5, 1e-3),
        (50, 50, 40, 1.0, 1e-2),
        (5, 5, 0, 0.1, 0.0),
    ):
        p = math.exp(loss) / (1 + math.exp(loss))

        def f(v: int, guesses: int = guesses, p: float = p) -> float:
            return sum(math.comb(guesses, k) * p**k * (1 - p) ** (guesses - k) for k in range(max(v, 0), guesses + 1))

        worst = max([(f(right - i) - f(right)) / i for i in range(1, right + 1)], default=0.0)
        slow = min(1.0, f(right) + 2 * canaries * delta * worst)
        assert one_run_p_value(canaries, guesses, right, loss, delta) == pytest.approx(slow, rel=1e-9)


def test_unlearning_halves_what_canaries_show() -> None:
    for right in (60, 75, 100):
        whole, half = one_run_loss(100, 100, right, delta=0), one_run_unlearning_loss(100, 100, right, delta=0)
        assert half.low == pytest.approx(whole.low / 2, abs=1e-8)
    assert one_run_unlearning_loss(1000, 1000, 1000).low < one_run_loss(1000, 1000, 1000).low / 2  # δ grows too
    assert one_run_loss(100, 100, 50).low == 0


def test_one_run_covers_randomised_response() -> None:
    """Every canary's bit told right with probability e^ε/(1+e^ε): exactly ε-private, and the tightest case."""
    rng, loss, canaries = np.random.default_rng(0), 1.0, 200
    counts = rng.binomial(canaries, 1 / (1 + math.exp(-loss)), 2000)
    bounds = {int(v): one_run_loss(canaries, canaries, int(v), delta=0).low for v in np.unique(counts)}
    missed = float(np.mean([bounds[int(v)] > loss + 1e-9 for v in counts]))
    assert 0.01 < missed <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_rates_cover_a_gaussian_mechanism_with_a_picked_threshold() -> None:
    """μ-Gaussian outputs, the best of 9 thresholds: both bounds stay below the truth in 95 % of the audits."""
    from expunge.privacy_accounting import gaussian_epsilon

    rng, mu, num, delta, trials = np.random.default_rng(3), 1.0, 200, 1e-2, 150
    truth, missed = gaussian_epsilon(mu, delta), {"loss": 0, "mu": 0}
    cuts = np.linspace(-1.0, 2.0, 9)
    for _ in range(trials):
        seen, unseen = rng.normal(mu, 1, num), rng.normal(0, 1, num)
        counts = [(int((seen > c).sum()), num, int((unseen > c).sum()), num) for c in cuts]
        missed["loss"] += max(loss_from_rates(*c, delta=delta, thresholds=9).low for c in counts) > truth
        missed["mu"] += max(mu_from_rates(*c, thresholds=9).low for c in counts) > mu
    assert max(missed.values()) <= trials * 0.05


def test_bound_never_exceeds_its_ceiling_and_sees_both_directions() -> None:
    found = loss_from_rates(40, 50, 5, 50)
    assert 0 < found.low < found.ceiling == pytest.approx(2.57, abs=0.005)
    # An attack that is sure only of non-members: TNR and FNR decide.
    assert loss_from_rates(50, 50, 25, 50).low == pytest.approx(loss_from_rates(25, 50, 0, 50).low)
    assert loss_from_rates(25, 50, 25, 50).low == 0
    assert loss_from_rates(40, 50, 5, 50, thresholds=10).low < found.low
    assert mu_from_rates(100, 100, 0, 100).low == mu_from_rates(1, 100, 0, 100).ceiling
