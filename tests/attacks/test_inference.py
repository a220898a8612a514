"""Dataset inference: weights from outside of the evaluation, subjects as units, p-values that hold under the null."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from attack_cases import audited, exam, retrain
from expunge.attacks import inference
from expunge.attacks.registry import get_attack


def test_weights_favour_what_tells_known_members_and_are_never_negative() -> None:
    rng = np.random.default_rng(0)
    unseen, members = rng.normal(size=(200, 4)), rng.normal(size=(150, 4))
    members[:, 1] += 1.5
    members[:, 3] -= 1.0  # against its direction: an accident, not evidence
    weights = inference.learn(unseen, members, ridge=0.1)
    assert weights.weight_F.argmax() == 1 and weights.weight_F[1] > 0.7
    assert (weights.weight_F >= 0).all() and weights.weight_F[3] == 0 and weights.weight_F.sum() == pytest.approx(1)
    assert weights.score(members).mean() > weights.score(unseen).mean() + 1


def test_weights_solve_the_ridge_problem() -> None:
    """Against a search over which weights are free, with the normal equations for each choice."""
    rng = np.random.default_rng(1)
    unseen, members = rng.normal(size=(40, 3)), rng.normal([0.5, -0.2, 0.3], size=(20, 3))
    found = inference.learn(unseen, members, ridge=0.5).weight_F
    standard = (np.concatenate([unseen, members]) - unseen.mean(0)) / unseen.std(0)
    side = np.array([1 / 40] * 40 + [1 / 20] * 20)
    centred = standard - (side @ standard) / side.sum()
    wanted = np.array([-0.5] * 40 + [0.5] * 20)
    best, chosen = math.inf, np.zeros(3)
    for free in itertools.product([False, True], repeat=3):
        columns = np.flatnonzero(free)
        trial = np.zeros(3)
        part = centred[:, columns]
        trial[columns] = np.linalg.solve((part.T * side) @ part + 0.5 * np.eye(len(columns)), (part.T * side) @ wanted)
        cost = side @ (centred @ trial - wanted) ** 2 + 0.5 * trial @ trial
        if (trial >= 0).all() and cost < best:
            best, chosen = cost, trial
    np.testing.assert_allclose(found, chosen / chosen.sum(), atol=1e-8)


def test_few_members_and_missing_features_give_equal_weights() -> None:
    unseen = np.array([[1.0, 5.0, math.nan], [3.0, 5.0, math.nan], [2.0, 5.0, 1.0]])
    weights = inference.learn(unseen, unseen[:2], ridge=0.1)
    assert weights.weight_F.tolist() == [0.5, 0.5, 0.0]
    scores = weights.score(np.array([[2.0, 5.0, 9.0], [math.nan, 6.0, math.nan], [math.nan] * 3]))
    assert scores[0] == 0 and scores[1] == 0.5 and math.isnan(scores[2])
    assert inference.learn(unseen, unseen[:0], ridge=0.1).weight_F.tolist() == [0.5, 0.5, 0.0]


def test_subject_means_leave_out_what_was_not_measured() -> None:
    found = inference.subject_means([1.0, 3.0, math.nan, math.nan], ["b", "b", "b", "a"])
    assert list(found) == ["b", "a"] and found["b"] == 2.0 and math.isnan(found["a"])


def test_a_subject_against_the_others_is_a_prediction_interval() -> None:
    others = [0.1, 0.5, -0.3, 0.9]
    t, p, rank_p = inference.against(1.4, others)
    spread = np.std(others, ddof=1)
    assert t == pytest.approx((1.4 - 0.3) / (spread * math.sqrt(1.25)))
    # A two-sample t-test with one value on one side is the same test.
    assert p == pytest.approx(float(scipy_stats.ttest_ind([1.4], others, alternative="greater").pvalue))
    assert rank_p == pytest.approx(1 / 5) and inference.against(0.2, others)[2] == pytest.approx(3 / 5)
    assert math.isnan(inference.against(1.0, [0.5])[0]) and math.isnan(inference.against(math.nan, others)[1])
    assert math.isfinite(inference.against(1.0, [0.5, 0.5])[0])


def test_p_values_of_subjects_hold_their_level() -> None:
    """Unseen subjects with alike texts: texts as units would find far too many, subjects as units do not."""
    rng, found, trials = np.random.default_rng(0), np.zeros(2), 2000
    for _ in range(trials):
        subjects = rng.normal(size=12)
        _, p, rank_p = inference.against(float(subjects[0]), subjects[1:].tolist())
        found += (p <= 0.05, rank_p <= 0.1)
    low, high = scipy_stats.binom.ppf([0.001, 0.999], trials, 0.05) / trials
    assert low <= found[0] / trials <= high
    assert abs(found[1] / trials - 1 / 12) < 0.02  # the ranks below 0.1 are 1/12


def test_permutation_p_against_all_shuffles() -> None:
    one, two = [2.0, 1.5, 0.7], [0.1, 0.9, 0.4, 1.0]
    pooled = one + two
    sums = [sum(pooled[i] for i in chosen) for chosen in itertools.combinations(range(7), 3)]
    exact = np.mean([s >= sum(one) - 1e-9 for s in sums])
    found = inference.permutation_p(one, two, 20_000, np.random.default_rng(0))
    assert found == pytest.approx(exact, abs=0.006)
    assert inference.permutation_p(one, one, 200, np.random.default_rng(0)) > 0.3
    assert math.isnan(inference.permutation_p([], two, 10, np.random.default_rng(0)))


def test_holm() -> None:
    assert inference.holm_bonferroni_count([0.01, 0.04, 0.03], 0.05) == 1
    assert inference.holm_bonferroni_count([0.01, 0.02, 0.04, math.nan], 0.05) == 3
    assert inference.holm_bonferroni_count([], 0.05) == 0


def test_the_original_is_found_as_a_whole_and_an_exact_retrain_is_not() -> None:
    attack = get_attack("dataset_inference")
    found = attack.run(exam(), exam().audited, attack.options())
    at = audited(retrain())
    nothing = attack.run(at, at.audited, attack.options())
    values = [f.figures["dataset_inference.p_value"].value for f in (found, nothing)]
    assert values[0] < 0.05 and values[1] > 0.2
    assert nothing.figures["dataset_inference.subjects_found"].value == 0
    assert set(found.details) == {s.id for s in exam().forget}
    for sample, score in zip(exam().forget, found.scores["dataset_inference"]["forget"], strict=True):
        detail = found.details[sample.id]
        assert detail["t"] == score and detail["subject_texts"] == 2 and 0 < detail["p"] < 1
    assert any("all scores weigh the same" in note for note in found.notes)
    assert any("4 holdout subjects" in note for note in found.notes)


def test_weights_come_from_texts_outside_of_the_evaluation() -> None:
    """Other labels for evaluated samples leave their scores alone; other unseen texts do not."""
    attack, here = get_attack("dataset_inference"), exam()
    plain = attack.run(here, here.audited, attack.options()).scores["dataset_inference"]
    fewer = replace(here, samples={**here.samples, "forget": here.forget[:2]}, shared={})
    assert (
        attack.run(fewer, here.audited, attack.options()).scores["dataset_inference"]["forget"] == plain["forget"][:2]
    )
    moved = replace(here, aux=here.samples["utility"], shared={})
    assert attack.run(moved, here.audited, attack.options()).scores["dataset_inference"]["forget"] != plain["forget"]
