"""The bound on a thousand random problems, the figures of the notes, the refusals, and the noise itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax

from expunge.errors import UserError
from expunge.noise import gaussian_noise
from expunge.privacy_accounting import gaussian_mu
from expunge.zones.residual import (
    ResidualCertificate,
    residual_certificate,
    ridge_residual,
    ridge_rounding,
    softmax_residual,
)

PROBLEMS, N, D, V = 1000, 30, 5, 3


def gradients(z: np.ndarray, y: np.ndarray, w: np.ndarray, decay: np.ndarray, logistic: np.ndarray) -> np.ndarray:
    """Gradients of P problems at once, (P, D, V): mean cross-entropy or mean square, with ridge."""
    out = z @ w
    errors = np.where(logistic[:, None, None], softmax(out, axis=-1), out) - y
    return np.swapaxes(z, 1, 2) @ errors / N + decay[:, None, None] * w


def norms(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x**2).sum((1, 2)))


def certificate(**changes: float) -> ResidualCertificate:
    values = {"residual": 1e-9, "reference_residual": 1e-9, "strong_convexity": 0.03, "tolerance": 3.5e-9}
    return residual_certificate(**{**values, "epsilon": 1.0, "delta": 1e-5, **changes})


def test_distance_is_below_the_bound_on_a_thousand_problems() -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((PROBLEMS, N, D)) * rng.uniform(0.1, 3, (PROBLEMS, 1, D))
    y = np.eye(V)[rng.integers(0, V, (PROBLEMS, N))]
    decay, logistic = 10 ** rng.uniform(-4, 0, PROBLEMS), rng.random(PROBLEMS) < 0.5
    # Old weights as the start of one, zero as the start of the other; each stopped somewhere on its way.
    pair = [rng.standard_normal((PROBLEMS, D, V)), np.zeros((PROBLEMS, D, V))]
    rate = 1 / ((z**2).sum((1, 2)) / N + decay)
    stops = rng.integers(0, 150, (2, PROBLEMS))
    shares = []
    for step in range(150):
        for k in range(2):
            go = (stops[k] > step) * rate
            pair[k] = pair[k] - go[:, None, None] * gradients(z, y, pair[k], decay, logistic)
        if step in (0, 20, 149):
            bound = sum(norms(gradients(z, y, w, decay, logistic)) for w in pair) / decay
            shares.append(norms(pair[0] - pair[1]) / bound)
    assert max(s.max() for s in shares) <= 1 + 1e-9
    assert max(s.max() for s in shares) > 0.5  # and the bound is no empty one


def test_bound_is_reached_by_the_quadratic_whose_curvature_is_the_ridge() -> None:
    w, v = np.full((4, 2), 3.0), np.full((4, 2), -1.0)
    gram, cross = np.zeros((4, 4)), np.zeros((4, 2))
    r1, r2 = (ridge_residual(gram, cross, x, 0.5) for x in (w, v))
    assert (r1 + r2) / 0.5 == pytest.approx(np.linalg.norm(w - v), rel=1e-12)


def test_residuals_are_gradients_of_their_objectives() -> None:
    rng = np.random.default_rng(1)
    z, w, t = rng.standard_normal((N, D)), rng.standard_normal((D, V)), rng.standard_normal((N, V))
    tokens, offsets = rng.integers(0, V, N), rng.standard_normal((N, V))

    def ridge(w: np.ndarray) -> float:
        return float(((z @ w - t) ** 2).sum() / 2 + 0.15 * (w**2).sum())

    def cross_entropy(w: np.ndarray) -> float:
        p = softmax(offsets + z @ w, axis=1)
        return float(-np.log(p[np.arange(N), tokens]).mean() + 0.05 * (w**2).sum())

    def slow_norm(objective: object) -> float:
        slopes = []
        for i in range(D * V):
            shift = np.zeros(D * V)
            shift[i] = 1e-5
            shift = shift.reshape(D, V)
            slopes.append((objective(w + shift) - objective(w - shift)) / 2e-5)  # type: ignore[operator]
        return float(np.linalg.norm(slopes))

    assert ridge_residual(z.T @ z, z.T @ t, w, 0.3) == pytest.approx(slow_norm(ridge), rel=1e-6)
    assert softmax_residual(z, tokens, w, 0.1, offsets) == pytest.approx(slow_norm(cross_entropy), rel=1e-6)


def test_rounding_bound_holds_and_is_not_absurd() -> None:
    rng = np.random.default_rng(2)
    z, t = rng.standard_normal((200, 40)).astype(np.float32), rng.standard_normal((200, 6)).astype(np.float32)
    gram, cross = (z.T @ z).astype(float), (z.T @ t).astype(float)
    weights = np.linalg.solve(gram + 0.1 * np.eye(40), cross)
    exact = (gram.astype(np.longdouble) @ weights + np.longdouble(0.1) * weights - cross).astype(np.longdouble)
    error = abs(ridge_residual(gram, cross, weights, 0.1) - float(np.sqrt((exact**2).sum())))
    assert 0 <= error <= ridge_rounding(gram, cross, weights, 0.1) < 1e-8


def test_figures_of_the_ridge_and_the_logistic_zone() -> None:
    ridge = certificate()
    assert ridge.certified and ridge.noise == pytest.approx(8.7e-7, rel=0.01)
    assert ridge.distance_bound == pytest.approx(2e-9 / 0.03)
    assert certificate(tolerance=1.2e-3).logit_noise == pytest.approx(0.3, rel=0.01)
    logistic = certificate(strong_convexity=1e-5, residual=6.8e-4, reference_residual=5.5e-4, tolerance=6.8e-4)
    assert not logistic.certified and logistic.noise > 400 and "noise" in logistic.refusal
    assert certificate(strong_convexity=1e-5, residual=0, reference_residual=0, tolerance=1e-7).noise < 0.08


def test_not_converged_is_refused_by_what_was_measured() -> None:
    assert "unlearned solve has not converged" in certificate(residual=4e-9).refusal
    assert "reference solve has not converged" in certificate(reference_residual=4e-9).refusal
    assert "has not converged" in certificate(residual=math.nan).refusal
    assert "has not converged" in certificate(residual=math.inf).refusal
    assert certificate(residual=3.4e-9).certified


def test_a_logistic_zone_that_was_stopped_early_is_refused_by_its_measured_gradient() -> None:
    """Cross-entropy with a weak ridge has a slow tail: it looks fitted long before its gradient is small."""
    rng = np.random.default_rng(3)
    z, decay = rng.standard_normal((40, 40)) / math.sqrt(40), 1e-5
    tokens = rng.integers(0, 4, 40)
    w = np.zeros((40, 4))
    for _ in range(2000):
        errors = softmax(z @ w, axis=1) - np.eye(4)[tokens]
        w -= 2.0 * (z.T @ errors / 40 + decay * w)
    assert (np.argmax(z @ w, axis=1) == tokens).mean() > 0.95
    measured = softmax_residual(z, tokens, w, decay)
    assert measured > 1e-5
    late = {"strong_convexity": decay, "residual": measured, "reference_residual": measured}
    assert "not converged" in certificate(**late, tolerance=4e-7).refusal
    assert "noise" in certificate(**late, tolerance=2 * measured).refusal


def test_a_tolerance_within_rounding_is_refused() -> None:
    assert "rounding" in certificate(rounding=1e-11).refusal
    assert certificate(rounding=1e-13).certified


def test_noise_follows_from_the_tolerance_not_from_the_data() -> None:
    assert certificate(residual=0.0).noise == certificate(residual=3e-9).noise
    assert certificate(feature_norm=2.0).logit_noise == 2 * certificate().logit_noise
    assert certificate(epsilon=4.377178095681224).noise == pytest.approx(2 * 3.5e-9 / 0.03)  # mu = 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"strong_convexity": 0.0},
        {"strong_convexity": math.nan},
        {"residual": -1.0},
        {"tolerance": 0.0},
        {"tolerance": math.inf},
        {"delta": 0.0},
        {"epsilon": -1.0},
    ],
)
def test_impossible_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be"):
        certificate(**wrong)


def test_noise_is_normal_with_its_deviation_and_never_the_same() -> None:
    x = gaussian_noise((200, 100), 0.25)
    assert x.shape == (200, 100)
    # A true normal fails this once in 10^9 runs.
    assert stats.kstest(x.ravel() / 0.25, "norm").pvalue > 1e-9
    assert abs(x.std() / 0.25 - 1) < 6 / math.sqrt(2 * x.size)
    assert not np.array_equal(x, gaussian_noise((200, 100), 0.25))
    assert np.abs(np.corrcoef(x[:, 0::2].ravel(), x[:, 1::2].ravel())[0, 1]) < 6 / math.sqrt(x.size / 2)


def test_best_test_against_the_noised_weights_reaches_the_promised_tradeoff() -> None:
    """Neyman-Pearson on the line between two points as far apart as the tolerances allow: advantage 2Φ(μ/2) - 1."""
    judged = certificate(tolerance=1e-3)
    shift, draws = (judged.tolerance + judged.reference_tolerance) / judged.strong_convexity, 40_000
    here, there = gaussian_noise((draws,), judged.noise), shift + gaussian_noise((draws,), judged.noise)
    advantage = (there > shift / 2).mean() - (here > shift / 2).mean()
    promised = 2 * stats.norm.cdf(gaussian_mu(1.0, 1e-5) / 2) - 1
    assert advantage == pytest.approx(promised, abs=6 / math.sqrt(draws))
