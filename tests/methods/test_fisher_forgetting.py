"""Noise in sample space against the dense matrix's inverse fourth root."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world
from tests.methods.softmax_world import Regression, RegressionAdapter, hessian, points, weight_of

from expunge.errors import UserError
from expunge.methods.registry import Context, get_method

FORGETTING = get_method("fisher-forgetting")
FORGET, RETAIN = points(2, seed=1), points(5, seed=2)
START = weight_of(Regression())


def moved(seed: int, **values: object) -> np.ndarray:
    settings = {"noise": 0.01, "labels": "every", "damping": 0.2, **values}
    context = Context(Regression(), RegressionAdapter(), FORGET, RETAIN, seed=seed)
    return np.asarray((weight_of(FORGETTING(context, FORGETTING.configure(settings)).model) - START).reshape(-1))


def dense() -> np.ndarray:
    """F + λ with λ a fifth of the mean eigenvalue over 15 rows."""
    fisher = hessian(START, RETAIN) / len(RETAIN)
    return np.asarray(fisher + 0.2 * np.trace(fisher) / 15 * np.eye(12))


def root(matrix: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors @ np.diag(values**power) @ vectors.T)


def test_one_draw_is_the_fourth_root_times_the_noise() -> None:
    drawn = torch.randn(12, generator=torch.Generator().manual_seed(7)).double().numpy()
    assert np.allclose(moved(7), 0.01 * root(dense(), -0.25) @ drawn, atol=1e-5)


def test_over_seeds_the_covariance_is_the_inverse_square_root() -> None:
    draws = np.stack([moved(s) for s in range(250)]) / 0.01
    white = draws @ root(dense(), 0.25)
    assert np.abs(white.mean(0)).max() < 0.2
    assert np.abs(white.T @ white / len(white) - np.eye(12)).max() < 0.3


def test_the_largest_noise_within_the_budget() -> None:
    here = world("text")
    before = here.loss(here.original, here.retain)
    outcome = FORGETTING(here.context(), FORGETTING.configure({"budget": 0.4}))
    rise = here.loss(outcome.model, here.retain) - before
    assert 0.2 < rise <= 0.4 + 1e-6
    more = FORGETTING(here.context(), FORGETTING.configure({"noise": 1.2 * outcome.record["noise"]}))
    assert here.loss(more.model, here.retain) - before > 0.4


def test_noise_hurts_less_than_as_much_noise_without_the_metric() -> None:
    here = world("text")
    outcome = FORGETTING(here.context(), FORGETTING.configure({"budget": 0.4}))
    start, other = list(here.original.parameters()), here.context().model
    length = (
        sum((p - q).detach().square().sum().item() for p, q in zip(outcome.model.parameters(), start, strict=True))
        ** 0.5
    )
    count = sum(p.numel() for p in start)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * length / count**0.5)
    assert here.loss(other, here.retain) > here.loss(outcome.model, here.retain)


@pytest.mark.parametrize("values", [{"noise": 0.0}, {"budget": 0.0}, {"damping": -1.0}, {"samples": 0}, {"draws": 0}])
def test_numbers_outside_their_domain(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be"):
        FORGETTING.configure(values)
