"""Noise of each weight by the diagonal of the retain Fisher matrix, against the dense one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world
from tests.methods.softmax_world import Regression, RegressionAdapter, hessian, points, weight_of

from expunge.errors import UserError
from expunge.methods.registry import Context, get_method

NOISE = get_method("fisher-noise")
FORGET, RETAIN = points(2, seed=1), points(9, seed=2)
START = weight_of(Regression())


def moved(seed: int, **values: object) -> np.ndarray:
    settings = {"alpha": 1e-3, "labels": "every", "bound": 1e6, **values}
    context = Context(Regression(), RegressionAdapter(), FORGET, RETAIN, seed=seed)
    return np.asarray((weight_of(NOISE(context, NOISE.configure(settings)).model) - START).reshape(-1))


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_one_draw_weight_by_weight(exponent: float) -> None:
    diagonal = np.diag(hessian(START, RETAIN)) / len(RETAIN)
    drawn = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).double().numpy().reshape(-1)
    wanted = [(1e-3 * f**-exponent) ** 0.5 * z for f, z in zip(diagonal, drawn, strict=True)]
    assert np.allclose(moved(5, exponent=exponent), wanted, rtol=1e-3, atol=1e-6)


def test_no_variance_passes_the_bound() -> None:
    most = 0.25 * float((START**2).mean())
    spread = np.stack([moved(s, alpha=1e6, bound=0.25) for s in range(150)]).std(0)
    assert np.allclose(spread, most**0.5, rtol=0.25)
    drawn = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).double().numpy().reshape(-1)
    assert np.allclose(moved(5, alpha=1e6, bound=0.25), most**0.5 * drawn, rtol=1e-4)


def test_a_weight_that_no_sample_reaches_gets_the_bound_and_no_more() -> None:
    blind = tuple(replace(s, image=np.array([0.0, *s.image[1:]], dtype=np.float32)) for s in RETAIN)  # type: ignore[index]
    context = Context(Regression(), RegressionAdapter(), FORGET, blind, seed=5)
    new = weight_of(NOISE(context, NOISE.configure({"alpha": 1e-9, "bound": 0.5, "labels": "every"})).model)
    drawn = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).double().numpy()
    most = 0.5 * float((START**2).mean())
    assert np.allclose((new - START)[:, 0], most**0.5 * drawn[:, 0], rtol=1e-4)
    assert np.abs((new - START)[:, 1:]).max() < 1e-3


def test_the_largest_noise_within_the_budget() -> None:
    here = world("text")
    before = here.loss(here.original, here.retain)
    outcome = NOISE(here.context(), NOISE.configure({"budget": 0.4}))
    assert 0.2 < here.loss(outcome.model, here.retain) - before <= 0.4 + 1e-6
    more = NOISE(here.context(), NOISE.configure({"alpha": 1.5 * outcome.record["alpha"]}))
    assert here.loss(more.model, here.retain) - before > 0.4


@pytest.mark.parametrize("values", [{"alpha": 0.0}, {"budget": 0.0}, {"bound": -1.0}, {"exponent": 0.0}, {"draws": 0}])
def test_numbers_outside_their_domain(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be"):
        NOISE.configure(values)
