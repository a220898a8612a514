"""Metrics of classifiers: values worked out by hand, controls (identical, retrained, random), published defects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from sklearn.svm import SVC

from expunge.errors import UserError
from expunge.metrics import vision
from expunge.signals.record import Signals


def signal(log_prob: float, hit: bool, entropy: float) -> Signals:
    return Signals(
        id="x",
        subject="s",
        log_prob_L=np.array([log_prob], dtype=np.float32),
        hit_L=np.array([hit]),
        mean_L=np.array([-entropy], dtype=np.float32),
        std_L=np.zeros(1, dtype=np.float32),
        rank_L=np.zeros(1, dtype=np.int32),
        text_bytes=1,
        zlib_bytes=1,
    )


# -- features ------------------------------------------------------------------------------------------------------


def test_features_of_a_sample() -> None:
    signals = [signal(math.log(0.25), False, 1.5), signal(0.0, True, 0.0)]
    np.testing.assert_allclose(vision.feature(signals), [0.25, 1.0], rtol=1e-6)
    np.testing.assert_allclose(vision.feature(signals, "correctness"), [0, 1])
    np.testing.assert_allclose(vision.feature(signals, "entropy"), [1.5, 0])
    with pytest.raises(UserError, match="did you mean 'entropy'"):
        vision.feature(signals, "entropie")  # type: ignore[arg-type]


def test_modified_entropy_by_hand_and_not_the_defective_form() -> None:
    """Common code takes log p for log(1 - p); the right form is 0 for sure and right, large for sure and wrong."""
    probs, labels = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), [0, 0, 0]
    found = vision.modified_entropy(probs, labels)
    by_hand = -(0.3 * math.log(0.7) + 0.2 * math.log(0.8) + 0.1 * math.log(0.9))
    assert found[0] == pytest.approx(by_hand)
    assert found[1] == pytest.approx(0.0, abs=1e-12) and found[2] > 50
    defective = -(0.3 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert abs(found[0] - defective) > 0.3


# -- beside the reference ------------------------------------------------------------------------------------------


def hits(right: int, total: int) -> list[float]:
    return [1.0] * right + [0.0] * (total - right)


OWN = {"forget": hits(6, 10), "retain": hits(9, 10), "holdout": hits(8, 10)}
GOLD = {"forget": hits(8, 10), "retain": hits(10, 10), "holdout": hits(8, 10)}
NONE: dict[str, None] = dict.fromkeys(OWN)


def test_tug_of_war_by_hand() -> None:
    found = vision.tug_of_war(OWN, GOLD, NONE)
    assert found.value == pytest.approx((1 - 0.2) * (1 - 0.1) * (1 - 0.0))
    assert found.low <= found.value <= found.high and found.n == 30
    assert vision.average_gap(OWN, GOLD, NONE).value == pytest.approx((0.2 + 0.1) / 3)


def test_tug_of_war_of_the_retrained_model_is_one_and_two_sided() -> None:
    same = vision.tug_of_war(GOLD, GOLD, NONE)
    assert same.value == same.low == same.high == 1.0
    assert vision.average_gap(GOLD, GOLD, NONE).value == 0.0
    under, over = ({**GOLD, "forget": hits(k, 10)} for k in (10, 6))
    scores = [vision.tug_of_war(side, GOLD, NONE).value for side in (under, over)]
    assert scores[0] == pytest.approx(scores[1]) and scores[0] == pytest.approx(0.8)
    broken = {role: hits(0, 10) for role in GOLD}
    assert vision.tug_of_war(broken, GOLD, NONE).value == pytest.approx(0.2 * 0.0 * 0.2)


def test_one_subject_and_unlike_sides() -> None:
    groups = {"forget": ["cat"] * 10, "retain": None, "holdout": None}
    found = vision.tug_of_war(OWN, GOLD, groups)
    assert math.isnan(found.low) and found.value == pytest.approx(0.72)
    with pytest.raises(UserError, match="10 samples of the model and 9"):
        vision.tug_of_war(OWN, {**GOLD, "forget": hits(3, 9)}, NONE)
    with pytest.raises(UserError, match="the same roles for both"):
        vision.tug_of_war({"forget": hits(1, 2)}, GOLD, NONE)


def test_gap_to_the_reference_is_paired_and_without_sign() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(size=200)
    found = vision.gap_to_reference(base - 0.1, base, definition="x/1")
    assert found.value == pytest.approx(0.1) and found.high - found.low < 1e-9
    assert vision.gap_to_reference(base, base, definition="x/1").value == 0


def test_gaps_of_shares_are_as_uncertain_on_either_side() -> None:
    """20 samples that all differ by 1 bound the gap below by 0.832, whichever of the two models is right."""
    ones, zeros = np.ones(20), np.zeros(20)
    ahead = vision.gap_to_reference(ones, zeros, definition="x/1")
    behind = vision.gap_to_reference(zeros, ones, definition="x/1")
    expected = scipy.stats.beta.ppf(0.025, 20, 1)
    assert (ahead.value, ahead.high, behind.value, behind.high) == (1, 1, 1, 1)
    assert ahead.low == pytest.approx(expected) and behind.low == pytest.approx(expected)
    none = vision.gap_to_reference(ones, ones, definition="x/1")
    assert (none.value, none.low) == (0, 0) and none.high == pytest.approx(1 - expected)


def test_rounding_is_no_gap() -> None:
    """Means over three references are thirds, whose sum with the own hits is 1e-17 and not 0."""
    own_N = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    theirs_N = np.mean([own_N[::-1], np.roll(own_N, 1), np.roll(own_N, 2)], axis=0)
    assert abs((own_N - theirs_N).mean()) < 1e-12
    assert vision.gap_to_reference(own_N, theirs_N, definition="x/1").value == 0


# -- membership ----------------------------------------------------------------------------------------------------


def sides(gap: float, seed: int = 0, num: int = 150) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(0.5 + gap, 0.1, num), 0, 1), np.clip(rng.normal(0.5, 0.1, num), 0, 1)


@pytest.mark.parametrize("learner", ["svc", "logistic"])
def test_members_that_look_like_others_are_at_chance(learner: vision.Learner) -> None:
    """Over twenty draws: the mean at one half, and the interval over it as often as it promises."""
    found = [vision.membership_accuracy(*sides(0.0, seed), learner=learner, resamples=300) for seed in range(20)]
    assert abs(np.mean([f.value for f in found]) - 0.5) < 0.02
    assert sum(f.low <= 0.5 <= f.high for f in found) >= 17
    assert found[0].definition == f"u_mia-{learner}/1"


@pytest.mark.parametrize("gap", [0.4, -0.4])
def test_confidence_too_high_or_too_low_both_show(gap: float) -> None:
    found = vision.membership_accuracy(*sides(gap))
    assert found.low > 0.9


def test_chance_is_one_half_whatever_the_sizes() -> None:
    """Plain accuracy would reward calling everything a member: 150 against 15 gives 0.91 for nothing."""
    inside, outside = sides(0.0)
    found = vision.membership_accuracy(inside, outside[:15])
    assert abs(found.value - 0.5) < 0.2
    constant = vision.membership_accuracy(np.ones(100), np.ones(10))
    assert constant.value == pytest.approx(0.5)


def test_the_answers_are_out_of_fold() -> None:
    """Ten features of noise: a machine that is judged on what it was fitted on seems nearly perfect."""
    rng = np.random.default_rng(1)
    inside, outside = rng.normal(size=(60, 10)) * 3, rng.normal(size=(60, 10)) * 3
    both, labels = np.concatenate([inside, outside]), np.repeat([1, 0], 60)
    assert SVC(C=3.0, gamma="auto").fit(both, labels).score(both, labels) > 0.9
    assert abs(vision.membership_accuracy(inside, outside).value - 0.5) < 0.15


def test_subjects_stay_together() -> None:
    """Each subject has its own value: knowing one of its samples gives the others away, so folds must not split it."""
    rng = np.random.default_rng(2)
    inside, outside = (np.repeat(rng.uniform(-30, 30, 12), 10) for _ in range(2))
    names = [[f"{side}{i // 10}" for i in range(120)] for side in "mo"]
    split = vision.membership_accuracy(inside, outside).value
    together = vision.membership_accuracy(inside, outside, *names).value
    assert split > 0.9 and together < 0.75


def test_little_or_broken_input() -> None:
    assert vision.membership_accuracy([0.5], [0.1, 0.2]).note == "too few samples on one side"
    with pytest.raises(UserError, match="give at least 2"):
        vision.membership_accuracy(*sides(0.1), folds=1)
    with pytest.raises(UserError, match="membership learner"):
        vision.membership_accuracy(*sides(0.1), learner="forest")  # type: ignore[arg-type]
    holes = np.where(np.arange(150) < 10, np.nan, sides(0.4)[0])
    assert vision.membership_accuracy(holes, sides(0.4)[1]).n == 290


def test_efficacy_of_forgotten_remembered_and_undecided_samples() -> None:
    retain, holdout = sides(0.4)
    like_members, like_others = sides(0.4, seed=1)
    assert vision.mia_efficacy(like_members, retain, holdout).efficacy.value < 0.1
    forgotten = vision.mia_efficacy(like_others, retain, holdout)
    assert forgotten.efficacy.value > 0.9 and forgotten.attack.low > 0.9
    assert set(forgotten.outside_N.tolist()) <= {0.0, 1.0}
    assert forgotten.efficacy.value == pytest.approx(forgotten.outside_N.mean())


def test_efficacy_is_the_decision_of_the_published_machine() -> None:
    retain, holdout = sides(0.15)
    asked = np.linspace(0, 1, 41)
    machine = SVC(C=3, kernel="rbf", gamma="auto")
    machine.fit(np.concatenate([retain, holdout])[:, None], np.repeat([1, 0], 150))
    expected = machine.predict(asked[:, None]) == 0
    np.testing.assert_array_equal(vision.mia_efficacy(asked, retain, holdout).outside_N, expected)


def test_a_blind_attacker_says_nothing() -> None:
    """A model that is certain of everything: efficacy 0 or 1 would be the toss of a coin."""
    found = vision.mia_efficacy(np.ones(20), np.ones(50), np.ones(50))
    assert math.isnan(found.efficacy.value) and found.attack.value == pytest.approx(0.5)
    assert "cannot be told apart" in found.efficacy.note


# -- zero retrain forgetting ---------------------------------------------------------------------------------------


def test_divergence_by_hand_and_at_its_ends() -> None:
    p, q = np.array([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    third = 0.5 * (math.log2(1 / 0.75)) + 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    np.testing.assert_allclose(vision.jensen_shannon(p, q), [1.0, 0.0, third], atol=1e-12)
    with pytest.raises(UserError, match="tables of one shape"):
        vision.jensen_shannon(p, q[:2])


def test_zero_retrain_forgetting_of_teacher_and_opposite() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.dirichlet(np.ones(10), size=50)
    assert vision.zero_retrain_forgetting(teacher, teacher).value == 1.0
    sure = np.eye(10)[rng.integers(5, size=50)]
    away = np.eye(10)[rng.integers(5, 10, size=50)]
    assert vision.zero_retrain_forgetting(sure, away).value == 0.0


def test_a_mean_over_classes_would_forgive_everything() -> None:
    """The published code averages over samples and classes: with 100 classes even opposites score above 0.99."""
    sure, away = np.eye(100)[[0, 1]], np.eye(100)[[2, 3]]
    middle = (sure + away) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(side > 0, side * np.log(side / middle), 0) for side in (sure, away)]
    assert 1 - (terms[0] + terms[1]).mean() / 2 > 0.99
    assert vision.zero_retrain_forgetting(sure, away).value == 0.0
