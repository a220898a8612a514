"""Curvature against dense matrices, per-sample loops and known optima."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world
from tests.methods.softmax_world import (
    RegressionAdapter,
    gradient,
    hessian,
    model_at,
    points,
    weight_of,
)
from torch import nn

from expunge.errors import UserError
from expunge.methods.curvature import (
    DualFisher,
    Line,
    diagonal_fisher,
    farthest,
    flat,
    free_entries,
    mean_gradient,
    score_gradients,
    some,
    trainable,
    unflat,
)
from expunge.methods.scope import held

WEIGHT = np.random.default_rng(5).normal(size=(3, 4))
SAMPLES = points(9, seed=1)
ADAPTER = RegressionAdapter()


def model() -> nn.Module:
    return model_at(WEIGHT)


def test_true_labels_give_each_samples_own_gradient() -> None:
    rows = [flat(r).numpy() for r in score_gradients(model(), ADAPTER, SAMPLES)]
    wanted = [-gradient(WEIGHT, [s]) for s in SAMPLES]
    assert np.allclose(rows, wanted, atol=1e-5)
    assert np.allclose(flat(mean_gradient(model(), ADAPTER, SAMPLES, max_tokens=4)), -np.mean(wanted, 0), atol=1e-6)


def test_every_label_gives_the_hessian_of_softmax_regression() -> None:
    rows = torch.stack([flat(r) for r in score_gradients(model(), ADAPTER, SAMPLES, labels="every")])
    assert np.allclose((rows.T @ rows).numpy(), hessian(WEIGHT, SAMPLES), atol=1e-4)
    diagonal = flat(diagonal_fisher(model(), ADAPTER, SAMPLES, labels="every"))
    assert np.allclose(diagonal, np.diag(hessian(WEIGHT, SAMPLES)) / len(SAMPLES), atol=1e-5)


def test_sampled_labels_tend_to_every_label_and_follow_the_seed() -> None:
    drawn = flat(diagonal_fisher(model(), ADAPTER, SAMPLES, labels="model", draws=600, seed=2))
    exact = flat(diagonal_fisher(model(), ADAPTER, SAMPLES, labels="every"))
    empirical = flat(diagonal_fisher(model(), ADAPTER, SAMPLES))
    assert float((drawn - exact).norm() / exact.norm()) < 0.08 < float((empirical - exact).norm() / exact.norm())
    first, again, other = (flat(diagonal_fisher(model(), ADAPTER, SAMPLES, labels="model", seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("where", ["text", "resnet", "llava"])
def test_through_the_seam_a_batch_is_the_sum_of_its_samples(where: str) -> None:
    here = world(where)
    few = here.forget[:3]
    state = torch.get_rng_state()
    rows = [flat(r) for r in score_gradients(here.original, here.adapter, few)]
    whole = flat(mean_gradient(here.original, here.adapter, few))
    units = sum(here.adapter.num_targets(s) for s in few)
    assert torch.allclose(-sum(rows) / units, whole, atol=1e-4 * float(whole.abs().max()))  # type: ignore[operator]
    squares = flat(diagonal_fisher(here.original, here.adapter, few))
    assert torch.allclose(sum(r**2 for r in rows) / units, squares)  # type: ignore[arg-type]
    assert all(p.grad is None for p in here.original.parameters()) and not here.original.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("exponent", [-1.0, -0.5, -0.25, 0.5])
@pytest.mark.parametrize("count", [3, 40])
def test_powers_in_sample_space_are_those_of_the_dense_matrix(exponent: float, count: int) -> None:
    """Fewer rows than weights, and more."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, 12, generator=generator)
    v = torch.randn(12, generator=generator)
    dual = DualFisher(rows, units=7.0, damping=0.3)
    dense = (rows.T @ rows / 7.0 + 0.3 * torch.eye(12)).double().numpy()
    values, vectors = np.linalg.eigh(dense)
    wanted = vectors @ (values**exponent * (vectors.T @ v.double().numpy()))
    assert np.allclose(dual.power(v, exponent), wanted, atol=1e-4)
    assert dual.quadratic(v) == pytest.approx(
        float(v.double().numpy() @ (dense - 0.3 * np.eye(12)) @ v.double().numpy())
    )


def test_the_recursion_of_the_empirical_fisher_gives_the_same_inverse() -> None:
    """Sherman-Morrison, one gradient at a time (Singh and Alistarh 2020, eq. 5)."""
    rows = [flat(r).double() for r in score_gradients(model(), ADAPTER, SAMPLES)]
    inverse = torch.eye(12, dtype=torch.float64) / 0.1
    for g in rows:
        u = inverse @ g
        inverse = inverse - torch.outer(u, u) / (len(rows) + g @ u)
    v = torch.arange(12.0)
    dual = DualFisher.of(model(), ADAPTER, SAMPLES, damping=0.1, relative=False)
    assert np.allclose(dual.power(v, -1.0), inverse @ v.double(), rtol=1e-4, atol=1e-4)


def test_relative_damping_does_not_feel_the_scale_and_none_is_refused() -> None:
    dual = DualFisher.of(model(), ADAPTER, SAMPLES, damping=0.5)
    mean = float(dual.rows_SP.square().sum()) / len(SAMPLES) / len(SAMPLES)
    assert dual.damping == pytest.approx(0.5 * mean)
    with pytest.raises(UserError, match="damping 0"):
        DualFisher.of(model(), ADAPTER, SAMPLES, damping=0.0)
    with pytest.raises(UserError, match="unknown choice of labels 'tru': did you mean 'true'"):
        next(score_gradients(model(), ADAPTER, SAMPLES, labels="tru"))


def test_gradients_that_do_not_fit_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.methods.curvature.available_memory", lambda _: 100)
    with pytest.raises(UserError, match=r"9 gradients of 12 weights need .* give fewer samples"):
        DualFisher.of(model(), ADAPTER, SAMPLES, damping=0.1)


def test_a_line_goes_back_and_respects_a_scope() -> None:
    net = model()
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    with held(net, {"linear.weight": mask}):
        assert torch.equal(free_entries(net)["linear.weight"], mask.float())
        line = Line(net, {"linear.weight": torch.ones(3, 4)})
        line.at(2.0)
        moved = torch.tensor(weight_of(net) - WEIGHT)
        assert (
            torch.allclose(moved[mask], torch.tensor(2.0, dtype=torch.float64))
            and not moved[~mask].abs().gt(1e-6).any()
        )
    line.at(0.0)
    assert np.allclose(weight_of(net), WEIGHT)
    whole = {n: p.detach() for n, p in trainable(net).items()}
    assert torch.equal(unflat(flat(whole), whole)["linear.weight"], whole["linear.weight"])


@pytest.mark.parametrize("first", [1e-6, 1.0, 1e6])
def test_the_farthest_step_is_found_from_anywhere(first: float) -> None:
    """Loss (distance)² on a line: the limit 4 is reached at distance 2."""
    net = model()
    direction = torch.zeros(3, 4)
    direction[0, 0] = 1.0

    def loss() -> float:
        away = float(weight_of(net)[0, 0] - WEIGHT[0, 0])
        return math.inf if away > 1e5 else away**2

    step = farthest(Line(net, {"linear.weight": direction}).at, loss, 4.0, first)
    assert 2 * 15 / 16 <= step <= 2.0 + 1e-5
    assert weight_of(net)[0, 0] - WEIGHT[0, 0] == pytest.approx(step, abs=1e-4)
    net = model()
    assert farthest(Line(net, {"linear.weight": direction}).at, lambda: 5.0, 4.0, first) == 0.0
    assert np.allclose(weight_of(net), WEIGHT)


def test_some_samples_are_drawn_by_the_seed() -> None:
    assert some(SAMPLES, 20, 0) == list(SAMPLES)
    drawn = some(SAMPLES, 4, 0)
    assert len(drawn) == len({s.id for s in drawn}) == 4 and drawn == some(SAMPLES, 4, 0) != some(SAMPLES, 4, 1)
