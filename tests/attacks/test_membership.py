"""Membership scores against slow references; what members and strangers must score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.attacks import membership
from expunge.errors import UserError
from expunge.signals.record import Signals
from expunge.stats import auc

TOKENS = st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=30)


def signals(
    log_probs: list[float], subject: str = "s", mean: float = -2.0, std: float = 0.5, zlib: int = 20
) -> Signals:
    values = np.array(log_probs, dtype=np.float32)
    return Signals(
        id=subject, subject=subject, log_prob_L=values, hit_L=values > -0.1,
        mean_L=np.full(len(values), mean, dtype=np.float32), std_L=np.full(len(values), std, dtype=np.float32),
        rank_L=np.zeros(len(values), dtype=np.int32), text_bytes=10, zlib_bytes=20,
    )  # fmt: skip


def crowd(level: float, num: int, seed: int, length: int = 12) -> list[Signals]:
    rng = np.random.default_rng(seed)
    return [
        signals((level - rng.exponential(1.0, length) + rng.normal(0, 0.3)).tolist(), f"{seed}-{i}") for i in range(num)
    ]


@given(TOKENS, st.sampled_from([1.0, 10.0, 20.0, 40.0, 100.0]))
def test_scores_equal_the_formulas(tokens: list[float], percent: float) -> None:
    one = signals(tokens)
    lowest = sorted(tokens)[: max(1, math.floor(len(tokens) * percent / 100 + 1e-9))]
    assert membership.loss_score(one) == pytest.approx(sum(tokens) / len(tokens), abs=1e-4)
    assert membership.zlib_score(one) == pytest.approx(sum(tokens) / len(tokens) / 20, abs=1e-5)
    assert membership.min_k_score(one, percent) == pytest.approx(sum(lowest) / len(lowest), abs=1e-4)
    standard = [(t + 2.0) / 0.5 for t in lowest]
    assert membership.min_k_plus_plus_score(one, percent) == pytest.approx(sum(standard) / len(standard), abs=1e-3)


def test_min_k_takes_the_floor_of_the_share() -> None:
    """20 % of 9 tokens is one token, 20 % of 10 two, and 30 % of 10 three although 0.3 * 10 rounds below 3."""
    tokens = [-float(i) for i in range(10)]
    assert membership.min_k_score(signals(tokens[:9]), 20) == -8.0
    assert membership.min_k_score(signals(tokens), 20) == -8.5
    assert membership.min_k_score(signals(tokens), 30) == -8.0


def test_min_k_of_a_short_text_takes_one_token() -> None:
    """floor(0.2 * 3) = 0: others get nan here."""
    assert membership.min_k_score(signals([-1.0, -5.0, -2.0])) == -5.0
    assert membership.min_k_score(signals([-1.0])) == -1.0


def test_min_k_plus_plus_of_a_certain_token_is_finite() -> None:
    assert membership.min_k_plus_plus_score(signals([-1e-6], mean=-1e-6, std=0.0)) == pytest.approx(0.0, abs=1e-6)


def test_samples_without_tokens_are_left_out() -> None:
    forget = [*crowd(0.0, 5, 1), signals([], "empty")]
    found = membership.membership(forget, crowd(0.0, 5, 2))
    assert found["mia.loss.auc"].n == 10
    assert found["mia.loss.gap"].n == 10
    assert membership.per_sample(forget)[-1] == {"loss": None, "zlib": None, "min_k": None, "min_k_plus_plus": None}
    assert membership.membership([], crowd(0.0, 3, 1))["mia.zlib.gap"].n == 3


def test_members_are_found_and_strangers_are_not() -> None:
    members, strangers, others = crowd(1.0, 60, 1), crowd(0.0, 60, 2), crowd(0.0, 60, 3)
    found = membership.membership(members, strangers)
    assert set(found) == {
        f"mia.{n}.{k}"
        for n in ("loss", "zlib", "min_k", "min_k++")
        for k in ("auc", "gap", "tpr@0.001", "tpr@0.01", "tpr@0.1")
    }
    for name in membership.SCORES:
        area = found[f"mia.{name}.auc"]
        assert area.low > 0.6
        assert area.value == auc(membership.scores(members, name), membership.scores(strangers, name))
        assert found[f"mia.{name}.gap"].value == pytest.approx(area.value - 0.5)
        assert found[f"mia.{name}.tpr@0.1"].value >= found[f"mia.{name}.tpr@0.001"].value
    nothing = membership.membership(others, strangers)["mia.loss.auc"]
    assert nothing.low < 0.5 < nothing.high
    assert found["mia.min_k.auc"].definition == "mia-min_k-20-auc/1"


def test_the_gap_is_two_sided_and_paired() -> None:
    """Over-forgotten samples are as far from the reference as remembered ones; an equal model has no gap."""
    strangers = crowd(0.0, 80, 2)
    reference = (crowd(0.0, 80, 3), strangers)
    same = membership.membership(*reference, reference)["mia.loss.gap"]
    assert same.value == 0.0 and same.low == 0.0 and same.high == 0.0
    for level in (1.0, -1.0):
        gap = membership.membership(crowd(level, 80, 3), strangers, reference)["mia.loss.gap"]
        assert gap.value > 0.2 and gap.low > 0.1
        assert gap.definition == "mia-loss-gap/1"
    unanchored = membership.membership(reference[0], strangers)["mia.loss.gap"]
    assert unanchored.definition == "mia-loss-gap-chance/1" and unanchored.low == 0.0


def test_one_subject_has_no_interval() -> None:
    one = [signals([-1.0 - i], "only") for i in range(6)]
    gap = membership.membership(one, crowd(0.0, 6, 2))["mia.loss.gap"]
    assert math.isnan(gap.low) and math.isnan(gap.high) and gap.record()["low"] is None


def test_user_mistakes() -> None:
    with pytest.raises(UserError, match="did you mean 'zlib'"):
        membership.scores([], "zip")
    with pytest.raises(UserError, match="percent"):
        membership.min_k_score(signals([-1.0]), 0)
    with pytest.raises(UserError, match="different samples"):
        membership.membership(crowd(0, 3, 1), crowd(0, 3, 2), (crowd(0, 2, 1), crowd(0, 3, 2)))
