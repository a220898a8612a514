"""Populations of unlearned and retrained models: slow references, closed forms, the controls, published defects."""

from __future__ import annotations

import math

import numpy as np
import pytest

from expunge.errors import UserError
from expunge.metrics import population
from expunge.metrics.population import CAP

Floats = np.ndarray


def crowd(seed: int, models: int = 32, samples: int = 20, shift: float = 0.0, spread: float = 1.0) -> Floats:
    """Each sample has its own level, as hard and easy pictures have."""
    level_N = np.random.default_rng(5).normal(0, 3, samples)
    return level_N + shift + spread * np.random.default_rng(seed).normal(size=(models, samples))


def test_margins_are_those_of_the_logits() -> None:
    rng = np.random.default_rng(0)
    logits_NV = rng.normal(0, 3, (50, 7))
    shifted = logits_NV - np.log(np.exp(logits_NV).sum(axis=1, keepdims=True))
    expected = logits_NV[:, 0] - np.log(np.exp(logits_NV[:, 1:]).sum(axis=1))
    np.testing.assert_allclose(population.margins(shifted[:, 0]), expected, rtol=1e-9)
    ends = population.margins([0.0, -np.inf])
    assert ends[0] == pytest.approx(-math.log(1e-45), rel=1e-3) and ends[1] == -ends[0]


@pytest.mark.parametrize("name", ["klom", "u_lira", "u_mia_population", "neurips_forget"])
def test_tables_that_do_not_fit_are_refused(name: str) -> None:
    measure = getattr(population, name)
    with pytest.raises(UserError, match="over the same samples"):
        measure(crowd(0), crowd(1, samples=3))
    with pytest.raises(UserError, match="too few"):
        measure(crowd(0, models=1), crowd(1))
    with pytest.raises(UserError, match="not a finite number"):
        measure(np.full((8, 2), np.nan), np.zeros((8, 2)))


# -- KLOM ----------------------------------------------------------------------------------------------------------


def slow_kl(p: Floats, q: Floats) -> float:
    low, high = min(*p, *q), max(*p, *q)
    width = (high - low) / 20
    counts = [[0] * 20, [0] * 20]
    for which, side in enumerate((p, q)):
        for value in side:
            counts[which][min(19, int((value - low) / width))] += 1
    total = 0.0
    for a, b in zip(*counts, strict=True):
        if a:
            total += a / len(p) * math.log(a / len(p) / max(b / len(q), 1e-5))
    return total


def test_klom_against_a_count_by_hand() -> None:
    first, second = crowd(0), crowd(1, shift=0.5)
    expected = [slow_kl(first[:, n], second[:, n]) for n in range(20)]
    found = population.klom(first, second)
    np.testing.assert_allclose(found.values_N, expected, rtol=1e-9)
    assert found.estimate.value == pytest.approx(np.mean(expected))
    assert found.estimate.low < found.estimate.value < found.estimate.high


def test_klom_of_one_population_is_zero_and_of_strangers_at_its_bound() -> None:
    assert population.klom(crowd(0), crowd(0)).estimate.value == 0.0
    apart = population.klom(np.zeros((8, 3)), np.ones((8, 3)))
    assert apart.estimate.value == pytest.approx(math.log(1e5))
    assert population.binned_kl(np.ones(4), np.ones(4)) == 0.0


def test_klom_counts_the_largest_margin() -> None:
    """One public version cuts the bins half open, so that the largest value of all belongs to none."""
    p, q = np.array([0.0, 0.0, 0.0, 1.0]), np.array([0.0, 0.0, 0.0, 0.0])
    assert population.binned_kl(p, q) == pytest.approx(0.75 * math.log(0.75) + 0.25 * math.log(0.25 / 1e-5))


def test_klom_sees_a_shift() -> None:
    """One public version gives each population edges of its own: moved as a whole, it looks the same."""
    own = crowd(0)
    assert population.klom(own + 100, own).estimate.value > 5
    edges = [
        np.histogram(side[:, 0], np.linspace(side[:, 0].min(), side[:, 0].max(), 21))[0] for side in (own, own + 8)
    ]
    np.testing.assert_array_equal(*edges)


def test_the_floor_is_what_chance_gives() -> None:
    oracles = crowd(0, models=64)
    floor = population.klom_floor(oracles)
    fresh = population.klom(crowd(1), crowd(2))
    assert floor.estimate.value == pytest.approx(fresh.estimate.value, rel=0.3)
    assert floor.estimate.value > 0.5  # 32 models in 20 bins: not 0
    assert population.klom(crowd(1, models=8), crowd(2, models=8)).estimate.value > 2
    with pytest.raises(UserError, match="4 or more retrained"):
        population.klom_floor(oracles[:3])


# -- U-LiRA and U-MIA ----------------------------------------------------------------------------------------------


def test_retrained_models_cannot_be_told_from_retrained_models() -> None:
    for measure in (population.u_lira, population.u_mia_population):
        found = measure(crowd(0, models=64, samples=80), crowd(1, models=64, samples=80)).estimate
        assert abs(found.value - 0.5) < 0.03 and found.low < 0.5 + 0.02


@pytest.mark.parametrize("shift", [8.0, -8.0])
def test_no_forgetting_and_too_much_are_both_seen(shift: float) -> None:
    found = population.u_lira(crowd(0, shift=shift), crowd(1))
    assert found.estimate.value > 0.99 and found.values_N.shape == (20,)


def test_u_lira_reaches_the_accuracy_of_the_best_test() -> None:
    """N(1, 1) against N(-1, 1): no test of one number does better than Phi(1) = 0.841."""
    found = population.u_lira(crowd(0, 200, 40, shift=1.0), crowd(1, 200, 40, shift=-1.0)).estimate
    assert found.value == pytest.approx(0.841, abs=0.02)


def test_few_models_share_a_deviation_and_do_not_flatter() -> None:
    """Four of each kind at a distance of 5: a deviation from two models each would give .88 instead of .99."""
    near = [population.u_lira(crowd(s, 4, 50, shift=5.0), crowd(s + 50, 4, 50)).estimate for s in range(5)]
    assert np.mean([f.value for f in near]) > 0.97 and near[0].definition == "u_lira-2fold-pooled/1"
    assert population.u_lira(crowd(0), crowd(1)).estimate.definition == "u_lira-2fold/1"


def test_u_lira_sees_another_spread_about_the_same_middle() -> None:
    """Over-smooth unlearning: the same mean margin, a tenth of the spread."""
    found = population.u_lira(crowd(0, 200, spread=0.1), crowd(1, 200)).estimate
    assert found.value > 0.8


def test_one_rule_for_all_samples_misses_what_single_samples_show() -> None:
    """Levels of samples differ by 3, the trace is 2: pooled it drowns, per sample it does not."""
    first, second = crowd(0, 64, 200, shift=2.0), crowd(1, 64, 200)
    alone, pooled = (m(first, second).estimate.value for m in (population.u_lira, population.u_mia_population))
    assert alone > pooled + 0.1 and pooled > 0.52


def test_the_judge_was_not_fitted_on_the_judged() -> None:
    """A tree of 256 leaves on 64 numbers knows each of its own; on new ones it is at chance."""
    found = population.u_mia_population(crowd(0, 8, 8), crowd(1, 8, 8)).estimate
    assert found.value < 0.75


# -- the challenge -------------------------------------------------------------------------------------------------


def test_epsilon_of_rates_by_hand() -> None:
    """FPR .1, FNR .2: ln(.9/.2) and ln(.8/.1); the larger counts."""
    found = population.epsilon_of_rates(np.array([0.1]), np.array([0.2]), delta=0.0)
    assert found == pytest.approx(math.log(0.8 / 0.1))
    assert population.epsilon_of_rates(np.array([0.0, 0.5]), np.array([0.0, 0.5])) == math.inf
    assert math.isnan(population.epsilon_of_rates(np.array([0.0, 0.3]), np.array([0.4, 0.0])))
    assert population.epsilon_of_rates(np.array([0.5]), np.array([0.5])) == 0.0  # 1 - delta - .5 < .5
    assert population.epsilon_of_rates(np.array([1.0]), np.array([0.5])) == 0.0


def slow_epsilon(unlearned: Floats, retrained: Floats) -> float:
    """The rules one after another, as they are described."""
    pos, neg = (retrained, unlearned) if np.median(retrained) > np.median(unlearned) else (unlearned, retrained)
    rates = []
    both = np.concatenate([pos, neg])
    for cut in np.linspace(both.min(), both.max(), math.ceil((both.max() - both.min()) * 100)):
        rates.append(((neg >= cut).mean(), (pos < cut).mean()))
    narrow, wide = (pos, neg) if np.ptp(pos) < np.ptp(neg) else (neg, pos)
    low, high = narrow.max() - 2, narrow.max() + 2
    for right in np.linspace(low, high, 400):
        for left in np.linspace(right - np.ptp(narrow) - 2, right - np.ptp(narrow) + 2, 400):
            rates.append((((left <= wide) & (wide <= right)).mean(), 1 - ((left <= narrow) & (narrow <= right)).mean()))
    best = 0.0
    for fpr, fnr in rates:
        if fpr == 0 and fnr == 0:
            return CAP
        if fpr and fnr:
            for a, b in ((fpr, fnr), (fnr, fpr)):
                best = max(best, math.log((1 - 1e-5 - a) / b) if 1 - 1e-5 - a > 0 else 0.0)
    return min(best, CAP)


@pytest.mark.parametrize("shift, spread", [(0.0, 1.0), (1.0, 1.0), (0.0, 0.3)])
def test_epsilon_of_a_sample_against_the_slow_rules(shift: float, spread: float) -> None:
    rng = np.random.default_rng(7)
    first, second = shift + spread * rng.normal(size=24), rng.normal(size=24)
    assert population.sample_epsilon(first, second) == pytest.approx(slow_epsilon(first, second), rel=1e-9)


def test_separated_and_degenerate_populations() -> None:
    rng = np.random.default_rng(0)
    assert population.sample_epsilon(rng.normal(size=16), 20 + rng.normal(size=16)) == CAP
    assert population.sample_epsilon(np.full(16, 0.3), rng.normal(size=16)) == CAP  # every model alike: a trace
    assert population.sample_epsilon(np.ones(4), np.ones(4)) == 0.0
    assert population.sample_epsilon(np.ones(4), np.zeros(4)) == CAP


def test_points_by_bucket_up_to_what_the_models_can_resolve() -> None:
    """512 models: ceil(ln 511) = 7, so 14 buckets of a half."""
    found = population.points(np.array([0.0, 0.49, 0.5, 1.2, 6.99, 7.0, 50.0, np.nan]), 512)
    np.testing.assert_allclose(found[:7], [1, 1, 0.5, 0.25, 0.5**13, 0, 0])
    assert math.isnan(found[7])
    assert population.points(np.array([2.9, 3.0]), 16).tolist() == [0.5**5, 0.0]


def test_challenge_score_of_retrained_and_untouched_models() -> None:
    """Several samples at once, which the published assertion did not survive."""
    gold = crowd(0, models=64, samples=6)
    same = population.neurips_forget(crowd(1, models=64, samples=6), gold)
    none = population.neurips_forget(crowd(1, models=64, samples=6, shift=30.0), gold)
    assert same.values_N.shape == (6,) and none.estimate.value == 0.0
    assert same.estimate.value > 0.1
    assert population.neurips_forget(gold, gold).estimate.value > same.estimate.value


def test_the_final_score_by_hand() -> None:
    forget = population.neurips_forget(crowd(0, 32, 4), crowd(1, 32, 4)).estimate
    found = population.neurips_score(forget, 0.9, 1.0, 0.8, 0.9)
    assert found.value == pytest.approx(forget.value * 0.9 * 0.8 / 0.9)
    assert found.low <= found.value <= found.high and found.definition == "neurips-2023/1"
    assert population.neurips_score(forget, 0.7, 0.7, 0.6, 0.6).value == pytest.approx(forget.value)
    with pytest.raises(UserError, match="accuracy of 0"):
        population.neurips_score(forget, 0.9, 0.0, 0.8, 0.9)
