"""Exact sums: against Python integers, in any order, and at the border of what float64 holds."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from expunge.errors import UserError
from expunge.zones.fixed_point import EXACT, KEY_BITS, Moments, RandomFeatures, exact_product, fixed

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def rows(count: int, seed: int, features: int = 24, columns: int = 7) -> Rows:
    rng = np.random.default_rng(seed)
    z_ND = rng.integers(-511, 512, (count, features)).astype(np.int16)
    t_NV = rng.integers(-(1 << 16), 1 << 16, (count, columns)).astype(np.int32)
    return z_ND, t_NV, rng.integers(0, columns, count)


def unit_keys(count: int, width: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_product_equals_python_integers() -> None:
    z_ND, t_NV, _ = rows(50, 0, features=3, columns=2)
    slow = [[sum(int(z) * int(t) for z, t in zip(a, b, strict=True)) for b in t_NV.T] for a in z_ND.T]
    assert exact_product(z_ND, t_NV).tolist() == slow


def test_product_is_exact_just_below_the_bound_and_refused_at_it() -> None:
    big = np.full((2, 1), 2**26 - 1, dtype=np.int64)
    assert int(exact_product(big, big)[0, 0]) == 2 * (2**26 - 1) ** 2 < EXACT
    with pytest.raises(UserError, match=r"2\^53"):
        exact_product(np.full((2, 1), 2**26, dtype=np.int64), np.full((2, 1), 2**26, dtype=np.int64))


def test_moments_do_not_depend_on_order_or_on_what_came_and_went() -> None:
    records = [rows(1 + i % 5, i) for i in range(20)]
    moments = [Moments.of(*r) for r in records]
    staying = moments[5:]
    fresh = sum(staying, Moments.zero(24, 7))
    at_once = Moments.of(*(np.concatenate([r[k] for r in records[5:]]) for k in range(3)))
    for seed in range(5):
        order = list(range(20))
        random.Random(seed).shuffle(order)
        left = sum((moments[i] for i in order), Moments.zero(24, 7))
        for i in random.Random(seed + 100).sample(range(5), 5):
            left = left - moments[i]
        assert left.digest() == fresh.digest() == at_once.digest()


def test_float32_sums_would_not_pass() -> None:
    """The control: the same deletion on unrounded features leaves other bytes behind."""
    x = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    grams = [np.outer(r, r) for r in x]
    everything = np.sum(grams, axis=0)
    left = everything - np.sum(grams[:50], axis=0)
    assert left.tobytes() != np.sum(grams[50:], axis=0).tobytes()


def test_another_records_removal_changes_the_digest() -> None:
    moments = [Moments.of(*rows(3, i)) for i in range(4)]
    whole = sum(moments, Moments.zero(24, 7))
    assert (whole - moments[0]).digest() != (whole - moments[1]).digest()
    assert whole.digest() != (whole - moments[0]).digest()


def test_rows_that_are_not_there_cannot_be_removed() -> None:
    few, many = Moments.of(*rows(2, 0)), Moments.of(*rows(9, 1))
    with pytest.raises(UserError, match="not all in this block"):
        few - many


def test_a_sum_that_leaves_the_exact_range_is_refused() -> None:
    z, t, tokens = np.array([[2**13]]), np.array([[2**38]]), np.array([0])
    almost = Moments.of(z, t, tokens)
    assert int((almost + almost).cross_DV[0, 0]) == 2**52
    with pytest.raises(UserError, match="2\\^53"):
        almost + almost + almost + almost


def test_features_estimate_the_gaussian_kernel() -> None:
    x = unit_keys(6, 10)
    z = RandomFeatures(10, 40_000, seed=3)
    z_ND = z(fixed(x, KEY_BITS)).astype(float)
    kernel = np.exp(x @ x.T - 1)  # |x| = 1
    # Variance of one feature's product is below 1, so the mean of D of them is off by 5/sqrt(D) with p < 1e-6.
    assert np.abs(z.square * z_ND @ z_ND.T - kernel).max() < 5 / math.sqrt(40_000)


def test_features_equal_the_real_cosine_to_ten_bits() -> None:
    x = unit_keys(20, 6, seed=1)
    z = RandomFeatures(6, 50, seed=7)
    drawn = np.random.RandomState([7, 0]).standard_normal((6, 50))
    phases = np.random.RandomState([7, 1]).randint(0, 4096, 50) * (2 * math.pi / 4096)
    real = 511 * np.cos(x @ drawn + phases)
    assert np.abs(z(fixed(x, KEY_BITS)) - real).max() < 5  # key 2^-11, tick 2π/4096, feature 1/2


def test_features_are_the_same_alone_and_in_a_batch() -> None:
    keys = fixed(unit_keys(17, 12), KEY_BITS)
    z = RandomFeatures(12, 33, seed=1)
    together = z(keys)
    assert np.concatenate([z(k[None]) for k in keys]).tobytes() == together.tobytes()
    assert together.dtype == np.int16 and np.abs(together).max() <= 511


def test_features_are_published_by_their_seed() -> None:
    assert RandomFeatures(8, 16, 1).digest() == RandomFeatures(8, 16, 1).digest() != RandomFeatures(8, 16, 2).digest()
    # Frozen: a zone written today must be readable for ever.
    assert RandomFeatures(8, 16, 1).digest() == "da2c3b33f969a85eb3fc50492c704381888afd2d2b311f7d1d5131943b51978b"


def test_keys_of_another_width_and_values_without_a_fixed_form_are_refused() -> None:
    with pytest.raises(UserError, match="wide"):
        RandomFeatures(8, 16)(np.zeros((1, 9), dtype=np.int32))
    with pytest.raises(UserError, match="no keys"):
        RandomFeatures(8, 16)(np.full((1, 8), 2**40))
    for bad in (math.nan, math.inf, 1e9):
        with pytest.raises(UserError, match="binary places"):
            fixed(np.array([bad]), KEY_BITS)
    with pytest.raises(UserError, match="1 or more"):
        RandomFeatures(0, 16)
