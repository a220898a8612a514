"""The Gaussian curve against its formula in 60 digits, against dp-accounting, and against its own inverse."""

from __future__ import annotations

import math

import dp_accounting
import mpmath
import pytest

from expunge.errors import UserError
from expunge.privacy_accounting import gaussian_delta, gaussian_epsilon, gaussian_mu

MUS = [1e-8, 1e-4, 0.01, 0.1, 0.26, 0.49, 0.5, 0.51, 1.0, 2.0, 5.0, 20.0]
EPSILONS = [0.0, 1e-6, 0.01, 0.1, 1.0, 4.0, 12.0, 50.0]
DELTAS = [1e-15, 1e-10, 1e-5, 1e-3, 0.1, 0.5]


def exact_delta(epsilon: float, mu: float) -> float:
    with mpmath.workdps(80):
        e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
        return float(mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m))


@pytest.mark.parametrize("mu", MUS)
def test_delta_has_twelve_digits_wherever_it_is_a_number(mu: float) -> None:
    for epsilon in EPSILONS:
        exact = exact_delta(epsilon, mu)
        if exact > 1e-300:
            assert gaussian_delta(epsilon, mu) == pytest.approx(exact, rel=1e-12)
        else:
            assert gaussian_delta(epsilon, mu) <= 1e-299


def test_published_figures() -> None:
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377, abs=5e-4)
    assert gaussian_delta(4.3771780957, 1.0) == pytest.approx(1e-5, rel=1e-8)


def test_equal_to_dp_accounting_over_a_grid() -> None:
    for delta in DELTAS[1:]:
        for mu in MUS[2:]:
            theirs = dp_accounting.get_epsilon_gaussian(1 / mu, delta)
            assert gaussian_epsilon(mu, delta) == pytest.approx(theirs, abs=1e-9)
        for epsilon in EPSILONS:
            theirs = 1 / dp_accounting.get_sigma_gaussian(epsilon, delta)
            assert gaussian_mu(epsilon, delta) == pytest.approx(theirs, abs=1e-9)


def test_inverse_of_each_other() -> None:
    for delta in DELTAS:
        for mu in MUS:
            epsilon = gaussian_epsilon(mu, delta)
            if epsilon == 0:
                assert gaussian_delta(0.0, mu) <= delta * (1 + 1e-12)
            else:
                assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=1e-11)
                assert gaussian_delta(epsilon, mu) == pytest.approx(delta, rel=1e-9)


def test_grows_with_mu_and_falls_with_delta() -> None:
    by_mu = [gaussian_epsilon(mu, 1e-5) for mu in [1e-8, 1e-6, *MUS[1:]]]
    assert by_mu == sorted(by_mu) and by_mu[0] == 0.0
    by_delta = [gaussian_epsilon(1.0, delta) for delta in DELTAS]
    assert by_delta == sorted(by_delta, reverse=True) and len(set(by_delta)) == len(by_delta)


def test_edges() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf
    assert (gaussian_delta(1.0, 0.0), gaussian_delta(1.0, math.inf), gaussian_delta(math.inf, 1.0)) == (0.0, 1.0, 0.0)
    assert exact_delta(gaussian_epsilon(1e4, 1e-5), 1e4) == pytest.approx(1e-5, rel=1e-6)
    assert gaussian_mu(1e6, 1e-5) < math.sqrt(2e6)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        gaussian_epsilon(1.0, delta)
    with pytest.raises(UserError, match="between 0 and 1"):
        gaussian_mu(1.0, delta)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_negative_or_missing_numbers_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="mu"):
        gaussian_epsilon(bad, 1e-5)
    with pytest.raises(UserError, match="epsilon"):
        gaussian_mu(bad, 1e-5)
    with pytest.raises(UserError, match="epsilon"):
        gaussian_delta(bad, 1.0)


def test_infinite_epsilon_has_no_mu() -> None:
    with pytest.raises(UserError, match="finite"):
        gaussian_mu(math.inf, 1e-5)
