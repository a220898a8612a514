"""L-CODEC: who is chosen, what is moved, and the Newton step against dense matrices and convex optima."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world
from tests.methods.softmax_world import (
    RegressionAdapter,
    gradient,
    hessian,
    model_at,
    optimum,
    points,
    weight_of,
)
from torch import nn

from expunge.errors import UserError
from expunge.methods.cluster.tokens import forward
from expunge.methods.l_codec import Unit, choose_units, disturbed, entries, layers_of, mean_outputs
from expunge.methods.registry import Context, get_method

CODEC = get_method("l-codec")
RIDGE = 2.0


def rows(monkeypatch: pytest.MonkeyPatch, *chosen: int) -> None:
    """Let these classes' rows be chosen."""

    def fixed(context: Context, *_: object) -> list[Unit]:
        return [Unit(layers_of(context.model)["linear"], row) for row in chosen]

    monkeypatch.setattr("expunge.methods.l_codec.choose_units", fixed)


@pytest.mark.parametrize("chosen", [(1,), (0, 2), (0, 1, 2)])
def test_newton_on_the_chosen_rows_alone(monkeypatch: pytest.MonkeyPatch, chosen: tuple[int, ...]) -> None:
    rows(monkeypatch, *chosen)
    samples = points(60, seed=4)
    forget, retain = samples[:6], samples[6:]
    start = optimum(samples, RIDGE)
    keep = np.isin(np.arange(12) // 4, chosen)
    block = hessian(start, retain)[np.ix_(keep, keep)]
    damping = RIDGE / len(retain) / (np.trace(block) / len(retain) / (3 * len(retain)))
    settings = {"labels": "every", "damping": damping, "samples": 999, "budget": 9.0}
    outcome = CODEC(Context(model_at(start), RegressionAdapter(), forget, retain), CODEC.configure(settings))
    wanted = start.reshape(-1).copy()
    wanted[keep] += np.linalg.solve(block + RIDGE * np.eye(keep.sum()), gradient(start, forget)[keep])
    found = weight_of(outcome.model).reshape(-1)
    assert np.allclose(found, wanted, atol=5e-5) and np.allclose(found[~keep], start.reshape(-1)[~keep], atol=1e-6)
    if len(chosen) == 3:
        retrained = optimum(retain, RIDGE)
        left = np.linalg.norm(weight_of(outcome.model) - retrained) / np.linalg.norm(start - retrained)
        assert left < 0.15, "all rows: Newton's step to the retrained optimum"


def test_all_forget_samples_are_removed_batch_after_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The removal in two batches is near that in one, and not near that of the first batch alone."""
    rows(monkeypatch, 0, 1, 2)
    samples = points(120, seed=4)
    forget, retain = samples[:12], samples[12:]
    start = optimum(samples, RIDGE)

    def moved(gone: tuple, size: int) -> np.ndarray:  # type: ignore[type-arg]
        settings = {"labels": "every", "damping": 10.0, "samples": 999, "budget": 9.0, "batch_size": size}
        context = Context(model_at(start), RegressionAdapter(), gone, retain)
        return np.asarray(weight_of(CODEC(context, CODEC.configure(settings)).model) - start)

    whole, halves, first = moved(forget, 12), moved(forget, 6), moved(forget[:6], 6)
    assert np.linalg.norm(halves - whole) < 0.2 * np.linalg.norm(whole) < np.linalg.norm(first - whole)


def test_units_that_carry_the_loss_are_chosen() -> None:
    """Features of which one class's row sees nothing: its output is constant and its unit never chosen."""
    weight = np.array([[3.0, 0, 0, 0], [0, 0, 0, 0], [-3.0, 0, 0, 0]])
    options = CODEC.configure({"sigma": 0.5, "perturbations": 100})
    context = Context(model_at(weight), RegressionAdapter(), points(5, seed=2), points(9, seed=3))
    chosen = choose_units(context, context.forget, options, 0)
    assert chosen and all(u.row != 1 for u in chosen)
    assert [u.row for u in choose_units(context, context.forget, options, 0)] == [u.row for u in chosen]


def test_entries_are_weights_and_biases_of_the_units() -> None:
    here = world("vit")
    layers = layers_of(here.original)
    name = next(n for n, layer in layers.items() if layer.module.bias is not None)
    place = entries(here.original, [Unit(layers[name], 2)])
    marked = [torch.zeros_like(p) for p in here.original.parameters()]
    with torch.no_grad():
        at = 0
        for m in marked:
            inside = place[(place >= at) & (place < at + m.numel())] - at
            m.view(-1)[inside] = 1
            at += m.numel()
    found = dict(zip((n for n, _ in here.original.named_parameters()), marked, strict=True))
    assert found[f"{name}.weight"][2].all() and found[f"{name}.bias"][2] == 1
    assert sum(float(m.sum()) for m in marked) == layers[name].shape[1] + 1


def test_outputs_are_means_over_real_tokens() -> None:
    here = world("text")
    pair = [min(here.forget, key=here.adapter.num_tokens), max(here.retain, key=here.adapter.num_tokens)]
    layers = layers_of(here.original)
    means, counts = [], []
    for samples in ([pair[0]], [pair[1]], pair):
        batch = here.adapter.collate(samples)
        with torch.no_grad(), mean_outputs(here.original, layers, batch) as seen:
            forward(here.original, here.adapter, batch)
        means.append(torch.cat([seen[name] for name in layers]))
        counts.append(int(batch.inputs["attention_mask"].sum()))
    alone = (counts[0] * means[0] + counts[1] * means[1]) / counts[2]
    assert counts[0] != counts[1] and torch.allclose(means[2], alone, atol=1e-4)


@pytest.mark.parametrize("where", ["text", "resnet", "llava"])
def test_disturbance_moves_the_loss_and_leaves_nothing(where: str) -> None:
    here = world(where)
    batch = here.adapter.collate(here.forget)
    before = {n: len(m._forward_hooks) for n, m in here.original.named_modules()}

    def loss(sigma: float) -> float:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), disturbed(here.original, batch, sigma, generator) as other:
            return float(-forward(here.original, here.adapter, other).log_prob_N().mean())

    assert loss(0.0) == pytest.approx(here_loss(here.original, here), rel=1e-4, abs=1e-6)
    assert loss(2.0) > loss(0.0) + 0.05
    assert {n: len(m._forward_hooks) for n, m in here.original.named_modules()} == before


def here_loss(model: nn.Module, here: object) -> float:
    adapter, forget = here.adapter, here.forget  # type: ignore[attr-defined]
    with torch.no_grad():
        return float(-adapter.positions(model, forget).log_prob_N().mean())


def test_the_budget_shortens_the_step() -> None:
    here = world("resnet")
    before = here.loss(here.original, here.retain)
    settings = {"perturbations": 40, "damping": 1e-4, "budget": 0.05}
    outcome = CODEC(here.context(), CODEC.configure(settings))
    assert outcome.record["log"][0]["step"] < 1.0
    assert here.loss(outcome.model, here.retain) <= before + 0.05 + 1e-5


def test_noise_moves_the_chosen_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows(monkeypatch, 1)
    samples = points(40, seed=4)
    results = []
    for noise in (0.0, 0.1):
        context = Context(model_at(np.ones((3, 4))), RegressionAdapter(), samples[:4], samples[4:])
        results.append(weight_of(CODEC(context, CODEC.configure({"noise": noise, "budget": 9.0})).model))
    drawn = torch.randn(4, generator=torch.Generator().manual_seed(0)).numpy()
    assert np.allclose(results[1][1] - results[0][1], 0.1 * drawn, atol=1e-5)
    assert np.array_equal(results[1][[0, 2]], results[0][[0, 2]])


@pytest.mark.parametrize(
    "values", [{"batch_size": 0}, {"perturbations": 2}, {"sigma": 0.0}, {"damping": -1.0}, {"noise": -0.1}]
)
def test_numbers_outside_their_domain(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be"):
        CODEC.configure(values)
