"""CAMIA features against slow definitions, and their combination against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from attack_cases import exam
from expunge.attacks import features
from expunge.attacks.registry import get_attack
from expunge.signals.record import Signals

VALUES = st.lists(st.floats(-12, 0, width=32), min_size=2, max_size=40)


def signals(log_probs: list[float], ids: list[int] | None = None) -> Signals:
    values = np.array(log_probs, dtype=np.float32)
    return Signals(
        id="a", subject="s", log_prob_L=values, hit_L=values > -0.7, mean_L=values, std_L=np.ones_like(values),
        rank_L=np.zeros(len(values), dtype=np.int32), text_bytes=20, zlib_bytes=28,
        ids_L=np.array(ids if ids is not None else range(len(values)), dtype=np.int32),
    )  # fmt: skip


def slow_phrases(symbols: list[int]) -> int:
    """Lempel-Ziv 1978 with whole words in a set."""
    seen: set[tuple[int, ...]] = set()
    word: tuple[int, ...] = ()
    for symbol in symbols:
        word = (*word, symbol)
        if word not in seen:
            seen.add(word)
            word = ()
    return len(seen) + bool(word)


def slow_entropy(values: list[float], length: int, radius: float) -> float:
    """Approximate entropy as Pincus writes it, one pair of runs at a time."""
    phi = []
    for m in (length, length + 1):
        runs = [values[i : i + m] for i in range(len(values) - m + 1)]
        near = [
            sum(max(abs(a - b) for a, b in zip(one, other, strict=True)) <= radius for other in runs) / len(runs)
            for one in runs
        ]
        phi.append(sum(map(math.log, near)) / len(near))
    return phi[0] - phi[1]


@given(st.lists(st.integers(0, 3), max_size=60))
def test_phrases_equal_a_set_of_words(symbols: list[int]) -> None:
    assert features.phrases(symbols) == slow_phrases(symbols)


@given(VALUES, st.sampled_from([1, 2, 3, 8]), st.sampled_from([0.1, 0.8, 3.0]))
def test_approximate_entropy_equals_the_definition(values: list[float], length: int, radius: float) -> None:
    found = features.approximate_entropy(np.array(values), length, radius)
    if len(values) <= length:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(slow_entropy(values, length, radius), abs=1e-9)


@given(VALUES)
def test_features_equal_their_definitions(values: list[float]) -> None:
    values = [float(np.float32(v)) for v in values]
    ids = [i % 3 for i in range(len(values))]
    found = features.features(signals(values, ids))
    assert tuple(found) == features.NAMES
    mean, num = sum(values) / len(values), len(values)
    assert found["loss"] == pytest.approx(mean)
    assert found["diversity"] == pytest.approx(mean / (len(set(ids)) / num))
    for level in (-1, -2, -3):
        assert found[f"above{level}"] == pytest.approx(sum(v > level for v in values) / num)
    running = [values[t] > sum(values[:t]) / t for t in range(1, num)]
    if not any(abs(values[t] - sum(values[:t]) / t) < 1e-9 for t in range(1, num)):
        assert found["above_so_far"] == pytest.approx(sum(running) / len(running))
    assert found["slope"] == pytest.approx(np.polyfit(np.arange(num), values, 1)[0], abs=1e-8)
    edges = np.linspace(min(values), max(values), 5)
    if len(set(values)) > 1 and not np.isin(values, edges[1:-1]).any():
        symbols = (np.searchsorted(edges[1:-1], values, side="right")).tolist()
        assert found["phrases4"] == pytest.approx(-slow_phrases(symbols) / num)


def test_cuts_and_short_texts() -> None:
    long = signals([-1.0] * 200 + [-3.0] * 100)
    found = features.features(long)
    assert found["loss@200"] == -1.0 and math.isnan(found["loss@300"])
    assert found["regularity"] == pytest.approx(0.0, abs=0.1) and found["slope"] < 0
    one = features.features(signals([-2.0]))
    assert math.isnan(one["slope"]) and math.isnan(one["above_so_far"]) and one["loss"] == -2.0
    assert all(math.isnan(v) for v in features.features(signals([])).values())


@given(st.lists(st.integers(-3, 3), max_size=12), st.lists(st.integers(-4, 4), min_size=1, max_size=8))
def test_shares_above_count(others: list[int], values: list[int]) -> None:
    found = features.shares_above(values, others)
    for value, share in zip(values, found, strict=True):
        if others:
            assert share == pytest.approx((1 + sum(o >= value for o in others)) / (1 + len(others)))
        else:
            assert math.isnan(share)


def test_missing_features_are_left_out() -> None:
    nan = math.nan
    assert np.isnan(features.shares_above([nan, 1.0], [0.0])).tolist() == [True, False]
    assert np.isnan(features.shares_above([1.0], [nan])).all()
    p_values = np.array([[0.1, 0.4, nan], [nan, nan, nan]])
    closed = -math.log(scipy_stats.combine_pvalues([0.1, 0.4], method="fisher").pvalue)
    assert features.fisher(p_values)[0] == pytest.approx(closed) and math.isnan(features.fisher(p_values)[1])
    assert features.mean_share(p_values)[0] == pytest.approx(0.75) and math.isnan(features.mean_share(p_values)[1])


def test_percentiles_are_those_of_the_unseen_texts() -> None:
    """Every number of the attack again, feature by feature, from the definitions."""
    attack, here = get_attack("camia"), exam()
    for how in ("fisher", "mean"):
        finding = attack.run(here, here.audited, attack.configure({"combine": how}))
        unseen = [features.features(s) for s in here.audited.signals(here.aux)]
        for sample, score in zip(here.forget, finding.scores["camia"]["forget"], strict=True):
            own = features.features(here.audited.signals([sample])[0])
            shares = [
                (1 + sum(u[n] >= own[n] for u in known)) / (1 + len(known))
                for n in features.NAMES
                if not math.isnan(own[n]) and (known := [u for u in unseen if not math.isnan(u[n])])
            ]
            if how == "fisher":
                expected = -math.log(scipy_stats.combine_pvalues(shares, method="fisher").pvalue)
            else:
                expected = 1 - sum(shares) / len(shares)
            assert score == pytest.approx(expected)
    assert "only 4 unseen texts" in finding.notes[0]
