"""Exact memorization, extraction strength, PrivLeak, total variation: slow references and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.errors import UserError
from expunge.metrics.divergence import tv
from expunge.metrics.memorization import (
    exact_memorization,
    extraction_strength,
    hit_share,
    matching_suffix,
    privleak,
)
from expunge.signals.record import Signals


def signals(hits: list[bool], subject: str = "s") -> Signals:
    zeros = np.zeros(len(hits), dtype=np.float32)
    return Signals(
        id="x", subject=subject, log_prob_L=zeros, hit_L=np.array(hits, dtype=bool), mean_L=zeros, std_L=zeros,
        rank_L=zeros.astype(np.int32), text_bytes=1, zlib_bytes=9,
    )  # fmt: skip


def slow_strength(hits: list[bool]) -> float:
    """1 - k/L by trying every k, with k = L (nothing matches) allowed."""
    for k in range(len(hits) + 1):
        if all(hits[k:]):
            return 1 - k / len(hits)
    raise AssertionError


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_extraction_strength_equals_trying_every_prefix(hits: list[bool]) -> None:
    array = np.array(hits)
    assert matching_suffix(array) == pytest.approx(slow_strength(hits))
    assert hit_share(array) == pytest.approx(sum(hits) / len(hits))
    assert matching_suffix(array) <= hit_share(array)
    if len(hits) > 1:
        assert matching_suffix(array, drop_last=True) == pytest.approx(slow_strength(hits[:-1]))


def test_nothing_matches_is_zero_and_no_token_is_not_measured() -> None:
    assert matching_suffix(np.array([False])) == 0.0
    assert matching_suffix(np.array([True])) == 1.0
    assert math.isnan(matching_suffix(np.zeros(0, dtype=bool)))
    assert math.isnan(hit_share(np.array([True]), drop_last=True))
    found = extraction_strength([signals([]), signals([True, False, True, True], "t")])
    assert found.n == 1 and found.value == 0.5
    assert extraction_strength([signals([True, False])], drop_last=True).definition == "es-drop_last/1"
    assert exact_memorization([signals([True, False], "a"), signals([True], "b")]).value == 0.75


# -- PrivLeak ------------------------------------------------------------------------------------------------------


def test_privleak_closed_form() -> None:
    """AUC 1 against 0.5 is -100 %; an AUC of 0 against 0.5 is +100 %; equal AUCs are 0."""
    high, low, mixed = [3.0, 4.0], [1.0, 2.0], [1.0, 2.0]
    assert privleak(high, low).value == -100.0
    assert privleak(low, high).value == 100.0
    assert privleak(mixed, mixed, mixed, mixed).value == 0.0
    assert privleak(high, low).definition == "privleak-chance/1"


def test_privleak_with_a_reference_by_hand() -> None:
    rng = np.random.default_rng(0)
    holdout, reference_holdout = rng.normal(size=60), rng.normal(size=60)
    forget, reference_forget = rng.normal(1, 1, 80), rng.normal(0.1, 1, 80)

    def area(pos: np.ndarray, neg: np.ndarray) -> float:
        return float(np.mean(pos[:, None] > neg))

    ours, theirs = area(forget, holdout), area(reference_forget, reference_holdout)
    found = privleak(forget, holdout, reference_forget, reference_holdout)
    assert found.value == pytest.approx(100 * ((1 - ours) - (1 - theirs)) / (1 - theirs))
    assert found.low < found.value < found.high < 0 and found.n == 140 and not found.note


def test_a_reference_that_knows_the_forget_set_is_pointed_out() -> None:
    suspicious = privleak([1.0, 3.0], [2.0, 0.0], [2.0, 4.0, 3.0][:2], [3.0, 1.0])
    assert "is it retrained" in suspicious.note
    perfect = privleak([1.0, 3.0], [2.0, 0.0], [5.0, 6.0], [1.0, 2.0])
    assert math.isnan(perfect.value) and "no retrained model" in perfect.note
    with pytest.raises(UserError, match="both or neither"):
        privleak([1.0], [1.0], [1.0])
    with pytest.raises(UserError, match="different samples"):
        privleak([1.0], [1.0], [1.0, 2.0], [1.0])


# -- total variation -----------------------------------------------------------------------------------------------


def test_tv_averages_tokens_then_samples() -> None:
    values = [np.array([[0.2, 0.4], [0.6, 0.8]]), np.array([[1.0, 1.0]]), np.zeros((0, 2))]
    found = tv(values, ["a", "b", "c"])
    assert found.value == pytest.approx((0.5 + 1.0) / 2) and found.n == 2
    bound = tv(values, ["a", "b", "c"], finite_sample=True)
    assert bound.definition == "tv-hoeffding/1" and bound.high == 1.0 and bound.low == pytest.approx(0.0)
    with pytest.raises(UserError, match="3 samples but 1 subjects"):
        tv(values, ["a"])
