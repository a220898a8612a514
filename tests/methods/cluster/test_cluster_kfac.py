"""Curvature against exact Fisher matrices, steps in its metric, and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from cluster_cases import ImageAdapter, gpt2s, image_samples, images, llamas, text_samples
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.cluster.influence import layer_gradients, objective
from expunge.methods.cluster.kfac import Factor, Metric, clip_scale, kfac_factors, refresher
from expunge.methods.cluster.layers import linear_layers
from expunge.methods.cluster.lowrank import (
    contrastive_directions,
    low_rank_direction,
    null_space,
    step_within,
    truncated,
)
from expunge.methods.cluster.optimizer import KFACOptimizer
from expunge.models.adapter import Adapter
from expunge.training.optimizers import load_state_tensors, state_tensors
from expunge.training.terms import Teacher, Term, kl_C, training_term

TERM = training_term()


class Net(nn.Module):
    """Pixels → 6 → 5 → 3 classes, linear or with tanh."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.classifier = nn.Linear(12, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.act = act
        for p in self.parameters():
            p.data *= 2.0

    def hidden(self, pixels: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(pixels.flatten(1)))))


def exact_fisher(model: Net, adapter: Adapter, samples: list, weight: nn.Parameter, metric: Metric) -> Tensor:
    """Mean over samples of JᵀHJ for one weight, by one backward pass per sample and class: (P, P)."""
    total = torch.zeros(weight.numel(), weight.numel())
    for sample in samples:
        positions = adapter.positions(model, [sample])
        logits = positions.head(positions.hidden_ND)[0]
        rows = [torch.autograd.grad(z, weight, retain_graph=True)[0].flatten() for z in logits]
        jacobian = torch.stack(rows)
        p = logits.softmax(0).detach()
        hessian = torch.eye(len(p)) if metric == "logits" else torch.diag(p) - torch.outer(p, p)
        total += jacobian.T @ hessian @ jacobian
    return total / len(samples)


def quadratics(factor: Factor, exact: Tensor, shape: tuple[int, int], count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(shape, generator=generator) for _ in range(count)]
    ours = np.array([factor.quadratic(s) for s in steps])
    return ours, np.array([float(s.flatten() @ exact @ s.flatten()) for s in steps])


SMALL = image_samples(16, side=2)


@pytest.mark.parametrize("layer", ["first", "second", "classifier"])
def test_kfac_of_a_deep_linear_net_in_the_logit_metric_is_exact(layer: str) -> None:
    """There the output gradients do not depend on the inputs, and the Kronecker form is the matrix itself."""
    model, adapter = Net(lambda x: x), ImageAdapter()
    layers, _ = linear_layers(model)
    factors = kfac_factors(model, adapter, SMALL, layers, metric="logits", draws=600, damping=0.0)
    exact = exact_fisher(model, adapter, SMALL, layers[layer].weight, "logits")
    ours, true = quadratics(factors[layer], exact, layers[layer].shape)
    np.testing.assert_allclose(ours, true, rtol=0.08)


@pytest.mark.parametrize("metric", ["fisher", "gauss-newton"])
@pytest.mark.parametrize("layer", ["first", "second", "classifier"])
def test_kfac_tracks_the_exact_fisher_of_a_nonlinear_net(metric: Metric, layer: str) -> None:
    model, adapter = Net(torch.tanh), ImageAdapter()
    layers, _ = linear_layers(model)
    factors = kfac_factors(model, adapter, SMALL, layers, metric=metric, draws=300, damping=0.0)
    exact = exact_fisher(model, adapter, SMALL, layers[layer].weight, metric)
    ours, true = quadratics(factors[layer], exact, layers[layer].shape)
    assert np.corrcoef(ours, true)[0, 1] > 0.9
    assert np.mean(ours) == pytest.approx(np.mean(true), rel=0.25)


@pytest.mark.parametrize("metric", ["fisher", "gauss-newton"])
def test_both_metrics_estimate_the_softmax_hessian(metric: Metric) -> None:
    """At the last layer S = E[diag(p) - ppᵀ], whatever the random vectors."""
    model, adapter = Net(torch.tanh), ImageAdapter()
    layers, _ = linear_layers(model)
    found = kfac_factors(model, adapter, SMALL, layers, metric=metric, draws=1500)["classifier"]
    positions = adapter.positions(model, SMALL)
    p = positions.head(positions.hidden_ND).softmax(1).detach()
    expected = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    torch.testing.assert_close(found.output_OO, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(
        found.input_II, positions.hidden_ND.T @ positions.hidden_ND / 16, atol=1e-5, rtol=1e-4, check_stride=False
    )


@pytest.mark.parametrize("make", [llamas, gpt2s])
def test_predicted_kl_is_of_the_size_of_the_true_kl(make: Callable) -> None:
    case = make()
    layers, _ = linear_layers(case.model)
    factors = kfac_factors(case.model, case.adapter, case.samples, layers, draws=30)
    teacher = Teacher.of(case.model, case.adapter, case.samples)
    term = Term("kl", "forget", "token", lambda view: teacher.compare(view, kl_C))
    name = next(n for n in layers if "mlp" in n)
    ratios = []
    for seed in range(4):
        step = 0.02 * torch.randn(layers[name].shape, generator=torch.Generator().manual_seed(seed))
        layers[name].weight.data += layers[name].unmatrix(step)
        true = objective(case.model, case.adapter, case.samples, term)
        layers[name].weight.data -= layers[name].unmatrix(step)
        ratios.append(0.5 * factors[name].quadratic(step) / true)
    assert 0.5 < np.mean(ratios) < 2.0


def test_factors_do_not_depend_on_padding_batching_or_earlier_gradients() -> None:
    case = llamas()
    layers, _ = linear_layers(case.model)
    small, large = (kfac_factors(case.model, case.adapter, case.samples, layers, max_tokens=size) for size in (1, 4096))
    for name in layers:  # labels are drawn per batch, inputs are the same
        torch.testing.assert_close(small[name].input_II, large[name].input_II, rtol=1e-3, atol=1e-4)
    again = kfac_factors(case.model, case.adapter, case.samples, layers, max_tokens=4096)
    assert all(torch.equal(again[n].output_OO, large[n].output_OO) for n in layers)
    assert all(p.grad is None for p in case.model.parameters())


def test_chunked_logits_give_the_same_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks the pass is computed twice, and both times must see the same random vectors."""
    case = llamas()
    layers, _ = linear_layers(case.model)
    whole = kfac_factors(case.model, case.adapter, case.samples, layers, metric="fisher")
    monkeypatch.setattr("expunge.models.adapter.CHUNK_ELEMENTS", 150)
    parts = kfac_factors(case.model, case.adapter, case.samples, layers, metric="fisher")
    for name in layers:
        torch.testing.assert_close(parts[name].output_OO, whole[name].output_OO, rtol=1e-3, atol=1e-5)
    newton = kfac_factors(case.model, case.adapter, case.samples, layers, metric="gauss-newton", draws=20)
    mean = {
        n: f.output_OO.trace()
        for n, f in kfac_factors(case.model, case.adapter, case.samples, layers, metric="fisher", draws=20).items()
    }
    for name in layers:
        assert float(newton[name].output_OO.trace()) == pytest.approx(float(mean[name]), rel=0.5)


def random_factor(inputs: int = 7, outputs: int = 5, damping: float = 1e-2) -> Factor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, inputs, generator=generator) * torch.logspace(0, 1, inputs)
    d = torch.randn(40, outputs, generator=generator) * torch.logspace(0, 1, outputs)
    return Factor(x.T @ x / 40, d.T @ d / 40, damping)


def damped(factor: Factor) -> tuple[Tensor, Tensor]:
    a, s = factor.input_II, factor.output_OO
    return (
        a + factor.damping * a.trace() / len(a) * torch.eye(len(a)),
        s + factor.damping * s.trace() / len(s) * torch.eye(len(s)),
    )


def test_preconditioning_is_the_dense_kronecker_solve() -> None:
    factor = random_factor()
    a, s = damped(factor)
    grad = torch.randn(5, 7)
    dense = torch.linalg.solve(torch.kron(s, a).double(), grad.flatten().double()).reshape(5, 7).float()
    torch.testing.assert_close(factor.precondition(grad), dense, rtol=1e-3, atol=1e-5)
    white = factor.whiten(grad)
    torch.testing.assert_close(factor.unwhiten(white), dense, rtol=1e-3, atol=1e-5)
    assert float((white**2).sum()) == pytest.approx(float((grad * dense).sum()), rel=1e-3)
    undamped = torch.kron(factor.output_OO, factor.input_II)
    assert factor.quadratic(grad) == pytest.approx(float(grad.flatten() @ undamped @ grad.flatten()), rel=1e-4)


def test_a_singular_curvature_is_refused_and_a_dead_layer_is_not() -> None:
    with pytest.raises(UserError, match="raise the damping"):
        Factor(torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2), 0.0).precondition(torch.ones(2, 2))
    dead = Factor(torch.eye(2), torch.zeros(2, 2), 1e-2)
    assert torch.isfinite(dead.precondition(torch.ones(2, 2))).all()
    case = images()
    layers, _ = linear_layers(case.model)
    with pytest.raises(UserError, match="'gauss-newton'"):
        kfac_factors(case.model, case.adapter, case.samples, layers, metric="gauss_newton")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="retain samples"):
        kfac_factors(case.model, case.adapter, [], layers)


def test_clip_keeps_the_predicted_kl() -> None:
    factor = random_factor()
    step = factor.precondition(torch.randn(5, 7))
    scale, kl = clip_scale({"a": step, "b": step}, {"a": factor, "b": factor}, 1e-3)
    assert kl == pytest.approx(1e-3) and scale < 1
    a, s = damped(factor)
    exact = float(((s @ step @ a) * step).sum()) * scale**2
    assert exact == pytest.approx(1e-3, rel=1e-3)  # two layers of equal share
    assert factor.quadratic(scale * step) < exact
    assert clip_scale({"a": 1e-6 * step}, {"a": factor}, 1e-3)[0] == 1.0


# -- low rank ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
def test_truncation_is_that_of_the_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(truncated(matrix, 2), (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)
    assert torch.equal(truncated(matrix, 9), matrix)


def test_low_rank_in_the_metric_beats_a_plain_svd_of_the_step() -> None:
    factor = random_factor()
    a, s = damped(factor)
    grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))

    def gain(step: Tensor) -> float:
        return float((grad * step).sum() - 0.5 * ((s @ step @ a) * step).sum())

    best = low_rank_direction(grad, factor, 2)
    assert int(torch.linalg.matrix_rank(best, rtol=1e-4)) == 2
    plain = truncated(factor.precondition(grad), 2)
    assert gain(best) > gain(plain)
    assert gain(best) < gain(low_rank_direction(grad, factor, None))
    for seed in range(20):  # no neighbour of rank 2 is better
        noise = 0.05 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * best.abs().mean()
        assert gain(truncated(best + noise, 2)) <= gain(best) + 1e-5


def test_contrastive_directions_are_the_generalised_eigenvectors() -> None:
    retain, forget = random_factor(), random_factor()
    c_forget = torch.randn(7, 7, generator=torch.Generator().manual_seed(2))
    c_forget = c_forget @ c_forget.T
    a, s = damped(retain)
    values = scipy.linalg.eigh(c_forget.double().numpy(), a.double().numpy(), eigvals_only=True)[::-1]
    found = contrastive_directions(c_forget, retain.input_II, 3)
    np.testing.assert_allclose(found.ratios_R.numpy(), values[:3], rtol=1e-3)
    torch.testing.assert_close(found.vectors_IR.T @ a @ found.vectors_IR, torch.eye(3), rtol=1e-3, atol=1e-3)

    grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    outputs = contrastive_directions(forget.output_OO + torch.eye(5), retain.output_OO, 5)
    every = contrastive_directions(c_forget, retain.input_II, 7)
    torch.testing.assert_close(step_within(grad, every, outputs), retain.precondition(grad), rtol=1e-2, atol=1e-4)
    # Among steps U_d M U_xᵀ it solves the surgery problem: the gradient in M vanishes.
    step = step_within(grad, found, outputs)
    left = outputs.vectors_IR.T @ (grad - s @ step @ a) @ found.vectors_IR
    assert float(left.abs().max()) < 1e-3 * float(grad.abs().max())
    with pytest.raises(UserError, match="give 1 to 7"):
        contrastive_directions(c_forget, retain.input_II, 8)


def test_null_space_leaves_the_held_inputs_alone() -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    energies = torch.tensor([50.0, 30.0, 15.0, 3.0, 1.0, 0.5, 0.4, 0.1])
    retain = (basis * energies) @ basis.T
    projector = null_space(retain, 0.94)
    assert round(float(projector.trace())) == 5
    assert float((projector @ basis[:, :3]).abs().max()) < 1e-5
    torch.testing.assert_close(projector @ projector, projector, rtol=1e-4, atol=1e-5)
    assert round(float(null_space(retain, 1.0).trace())) == 0
    with pytest.raises(UserError, match="energy"):
        null_space(retain, 0.0)


# -- steps -------------------------------------------------------------------------------------------------------


def uniform_target(adapter: Adapter) -> Term:
    """KL(uniform ‖ model): a bounded-below target that forgets everything."""

    def value(logits_CV: Tensor, _: Tensor) -> Tensor:
        return -logits_CV.log_softmax(1).mean(1) - float(np.log(logits_CV.shape[1]))

    return Term("uniform", "forget", "token", lambda view: view.positions.per_token(value))


@pytest.mark.parametrize("make", [llamas, gpt2s, images])
@pytest.mark.parametrize("rank", [None, 2])
def test_sign_a_step_lowers_the_target_loss(make: Callable, rank: int | None) -> None:
    case = make()
    if case.adapter.modality == "classifier":  # fresh weights are all but uniform already
        case.model.classifier.weight.data *= 10.0
    layers, _ = linear_layers(case.model)
    retain = text_samples(12, 7) if case.adapter.modality == "text" else case.samples
    term = uniform_target(case.adapter)
    optimizer = KFACOptimizer(
        layers, refresher(case.model, case.adapter, retain, layers), kl_clip=1e-4, rank=rank, refresh_every=2
    )
    losses = [objective(case.model, case.adapter, case.samples, term)]
    for _ in range(6):
        before = {n: layer.weight.detach().clone() for n, layer in layers.items()}
        for n, grad in layer_gradients(case.model, case.adapter, case.samples, layers, term).items():
            layers[n].weight.grad = layers[n].unmatrix(grad)
        optimizer.step()
        assert optimizer.predicted_kl <= 1e-4 * (1 + 1e-4)
        if rank is not None:
            moved = {n: layers[n].matrix(layers[n].weight.detach() - before[n]) for n in layers}
            values = [torch.linalg.svdvals(m) for m in moved.values()]
            assert all(float(v[rank]) < 1e-3 * float(v[0]) + 1e-6 for v in values)
            assert max(float(v[0]) for v in values) > 1e-3
        losses.append(objective(case.model, case.adapter, case.samples, term))
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_steps_stay_small_beside_dead_units() -> None:
    """Four of five ReLU units are dead: next to no curvature, and without a bound the weights would blow up."""
    case = images()
    case.model.act, case.model.classifier.weight.data = torch.relu, 10.0 * case.model.classifier.weight.data
    layers, _ = linear_layers(case.model)
    term = uniform_target(case.adapter)
    start = objective(case.model, case.adapter, case.samples, term)
    for bound, good in ((0.1, True), (1e9, False)):
        optimizer = KFACOptimizer(
            layers, refresher(case.model, case.adapter, case.samples, layers), kl_clip=1e-4, max_change=bound
        )
        for _ in range(3):
            before = {n: layer.weight.detach().clone() for n, layer in layers.items()}
            for n, grad in layer_gradients(case.model, case.adapter, case.samples, layers, term).items():
                layers[n].weight.grad = layers[n].unmatrix(grad)
            optimizer.step()
            shares = [float((layers[n].weight - old).detach().norm() / old.norm()) for n, old in before.items()]
            assert not good or max(shares) <= 0.1 * 1.001
        assert (objective(case.model, case.adapter, case.samples, term) < start) == good


def test_one_step_is_the_formula() -> None:
    case = images()
    layers, _ = linear_layers(case.model)
    factors = kfac_factors(case.model, case.adapter, case.samples, layers)
    optimizer = KFACOptimizer(layers, lambda _: factors, lr=0.1, kl_clip=1e9, max_change=1e9, momentum=0.5)
    total = {n: torch.zeros(layer.shape) for n, layer in layers.items()}
    for _ in range(2):
        before = {n: layer.weight.detach().clone() for n, layer in layers.items()}
        for n, layer in layers.items():
            layer.weight.grad = torch.randn_like(layer.weight)
            total[n] = 0.5 * total[n] + layer.matrix(layer.weight.grad)
        optimizer.step()
        for n, layer in layers.items():
            expected = before[n] - 0.1 * layer.unmatrix(factors[n].precondition(total[n]))
            torch.testing.assert_close(layer.weight.detach(), expected)


def test_other_parameters_take_adamw_steps() -> None:
    case = images()
    layers, _ = linear_layers(case.model)
    one, two = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    ours = KFACOptimizer(
        layers,
        lambda _: kfac_factors(case.model, case.adapter, case.samples, layers),
        others=[one, layers["middle"].weight],
        other_lr=0.01,
        weight_decay=0.1,
    )
    assert [len(g["params"]) for g in ours.param_groups] == [len(layers), 1]
    theirs = torch.optim.AdamW([two], lr=0.01, weight_decay=0.1)
    for _ in range(5):
        one.grad = torch.randn(4, 3)
        two.grad = one.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("stop", [2, 3])  # at a refresh, between two
def test_resume_through_plain_tensors_is_exact(stop: int) -> None:
    def made() -> tuple:
        case = llamas()
        layers, _ = linear_layers(case.model)
        own = {id(layer.weight) for layer in layers.values()}
        optimizer = KFACOptimizer(
            layers,
            refresher(case.model, case.adapter, text_samples(12, 7), layers, batch=6),
            momentum=0.9,
            rank=3,
            refresh_every=2,
            others=[p for p in case.model.parameters() if id(p) not in own],
        )
        return case, optimizer

    def run(case: object, optimizer: KFACOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            case.adapter.positions(case.model, case.samples[step:]).log_prob_N().mean().backward()  # type: ignore[attr-defined]
            optimizer.step()

    case, optimizer = made()
    run(case, optimizer, range(5))
    first, first_optimizer = made()
    run(first, first_optimizer, range(stop))
    kept = state_tensors([first_optimizer])
    second, second_optimizer = made()
    second.model.load_state_dict(first.model.state_dict())
    load_state_tensors([second_optimizer], kept)
    run(second, second_optimizer, range(stop, 5))
    for a, b in zip(case.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_keeps_its_precision_beside_half_precision_weights() -> None:
    case = images()
    case.model.bfloat16()
    layers, _ = linear_layers(case.model)
    factors = {n: Factor(torch.eye(v.shape[1]), torch.eye(v.shape[0])) for n, v in layers.items()}
    optimizers = [KFACOptimizer(layers, lambda _: factors, momentum=0.9) for _ in range(2)]
    for layer in layers.values():
        layer.weight.grad = torch.randn_like(layer.weight)
    optimizers[0].step()
    load_state_tensors([optimizers[1]], state_tensors([optimizers[0]]))
    for layer in layers.values():
        state = optimizers[1].state[layer.weight]
        assert state["momentum"].dtype == state["input"].dtype == torch.float32
        assert torch.equal(state["momentum"], optimizers[0].state[layer.weight]["momentum"])
    with pytest.raises(UserError, match="momentum"):
        KFACOptimizer(layers, lambda _: factors, momentum=1.0)
