"""Completeness under attack: the worst view counts, at its price; knowledge that only hides is found."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.completeness.calibration import calibrate
from expunge.completeness.readings import Readings
from expunge.completeness.views import PLAIN, under_attack, view_of
from expunge.errors import UserError

NUM, SHADOWS = 60, 6


def readings(unlearned: np.ndarray, seed: int = 0) -> Readings:
    rng = np.random.default_rng(seed)
    level = rng.uniform(3, 5, NUM)
    shadows = level + 0.2 * rng.standard_normal((SHADOWS, NUM))
    own = level + 0.2 * rng.standard_normal(NUM)
    return Readings(
        "text", [f"s{i}" for i in range(NUM)], np.where(np.isnan(unlearned), own, unlearned), shadows, level * 0 + 0.1
    )


HIDDEN = np.full(NUM, np.nan)  # as served: like a model that never saw them
BACK = np.where(np.arange(NUM) < 20, 0.5, np.nan)  # relearnt: a third comes back


def test_what_only_hides_is_found_by_the_view_that_brings_it_back() -> None:
    found = under_attack({PLAIN: (readings(HIDDEN), None), "relearnt": (readings(BACK, 1), None)})
    under = [v == "under-unlearned" for v in found.answer.verdict_N]
    assert all(under[:20])
    assert sum(under[20:]) <= 2
    assert set(found.view_N[:20]) == {"relearnt"}
    assert found.answer.completeness_N[:20].max() < 0.3 < found.views[PLAIN].completeness_N[:20].min()


def test_one_view_is_the_plain_calibration() -> None:
    plain = readings(BACK)
    found, alone = under_attack({PLAIN: (plain, None)}).answer, calibrate(plain)
    assert np.array_equal(found.p_under_N, alone.p_under_N)
    assert list(found.verdict_N) == list(alone.verdict_N)


def test_every_view_is_paid_for() -> None:
    views = {PLAIN: (readings(HIDDEN), None), "a": (readings(HIDDEN, 1), None), "b": (readings(HIDDEN, 2), None)}
    found = under_attack(views)
    least = np.min([v.p_under_N for v in found.views.values()], axis=0)
    assert np.allclose(found.answer.p_under_N, np.minimum(1, 3 * least))


def test_exact_retrains_stay_within_the_level() -> None:
    called = []
    for seed in range(40):
        views = {n: (readings(HIDDEN, 100 + 3 * seed + i), None) for i, n in enumerate((PLAIN, "a", "b"))}
        called.append(float(np.mean(under_attack(views).answer.p_under_N <= 0.05)))
    assert 0.02 < np.mean(called) < 0.06


def test_a_missing_reading_does_not_count_as_a_view() -> None:
    gap = readings(BACK, 1)
    lost = Readings(
        "text", gap.ids, np.where(np.arange(NUM) == 0, np.nan, gap.unlearned_N), gap.shadow_KN, gap.original_N
    )
    found = under_attack({PLAIN: (readings(HIDDEN), None), "relearnt": (lost, None)})
    assert found.answer.p_under_N[0] == found.views[PLAIN].p_under_N[0]


def test_view_of_scores_reads_log_probabilities_as_losses() -> None:
    like = readings(HIDDEN)
    scores = {"u": -np.arange(NUM), "s": -np.ones(NUM), "o": -np.full(NUM, 2.0)}
    found = view_of({k: v.astype(float) for k, v in scores.items()}, like, ["u", "s", "o"])
    assert np.array_equal(found.unlearned_N, np.arange(NUM))
    assert found.shadow_KN.shape == (1, NUM)
    assert found.original_N is not None
    assert view_of({k: v.astype(float) for k, v in scores.items()}, like, ["u", "s", ""]).original_N is None


def test_bad_input() -> None:
    with pytest.raises(UserError, match="as served"):
        under_attack({"a": (readings(HIDDEN), None)})
    other = readings(HIDDEN).select(np.arange(NUM) < 5)
    with pytest.raises(UserError, match="other samples"):
        under_attack({PLAIN: (readings(HIDDEN), None), "a": (other, None)})
