from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from expunge.data.chance import hashed, pick, share, shuffled
from expunge.errors import UserError


def test_draws_are_fixed_for_ever() -> None:
    # printf '0\037p\0377' | sha256sum; digests of generated datasets depend on these numbers staying as they are.
    assert hashed(0, "p", 7) == 0x0AD45EC2ACEE3F70


def test_key_parts_are_kept_apart() -> None:
    assert hashed(1, 23) != hashed(12, 3)


def test_draws_are_uniform() -> None:
    counts = [0] * 7
    for i in range(7000):
        counts[pick(7, "uniform", i)] += 1
    assert chisquare(counts).pvalue > 1e-4


@given(st.sets(st.integers(0, 10_000), max_size=40), st.sets(st.integers(0, 10_000), max_size=40), st.integers(0, 99))
def test_order_of_two_items_does_not_depend_on_others(some: set[int], more: set[int], seed: int) -> None:
    longer = shuffled(some | more, seed)
    assert [item for item in longer if item in some] == shuffled(some, seed)


@pytest.mark.parametrize(
    ("amount", "total", "expected"), [(0, 5, 0), (0.1, 40, 4), (0.01, 20, 1), (1, 5, 1), (1.0, 5, 1), (5, 5, 5)]
)
def test_share(amount: float, total: int, expected: int) -> None:
    assert share(amount, total, "x") == expected


@pytest.mark.parametrize("amount", [-1, 1.5, 6, float("nan")])
def test_share_refuses(amount: float) -> None:
    with pytest.raises(UserError):
        share(amount, 5, "x")
