"""Sophia against a slow loop over the paper's formulas, a quadratic, and the exact Gauss-Newton diagonal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.methods.registry import Context, get_method
from expunge.methods.scope import get_scope
from expunge.models.tiny import init_classifier
from expunge.training.loop import Feed, Trainer, TrainOptions
from expunge.training.optimizers import build
from expunge.training.sophia import Sophia, draw, observe_curvature
from expunge.training.terms import Term, nll_N
from tiny_text import tiny_adapter, tiny_dataset, tiny_model

torch.set_num_threads(1)
DATA = tiny_dataset()
FORGET, RETAIN = DATA["forget"][:4], DATA["retain"][:6]
PICKS = {"forget": [2, 0, 3], "retain": [1, 4, 0, 5]}


# -- the step ----------------------------------------------------------------------------------------------------------


def test_steps_equal_a_slow_loop_over_the_paper() -> None:
    """Algorithm 3 of arXiv:2305.14342, entry by entry in float64, with two looks at the curvature."""
    model = nn.Linear(4, 1, bias=False)
    optimizer = Sophia(model.parameters(), 0.1, betas=(0.9, 0.8), rho=0.5, weight_decay=0.02)
    theta = model.weight.detach().double().numpy()[0].copy()
    momentum, curvature = [0.0] * 4, [0.0] * 4
    rng = np.random.default_rng(0)
    clipped = 0
    for step in range(6):
        if step % 3 == 0:
            look = rng.normal(size=4)
            model.weight.grad = torch.tensor(look[None], dtype=torch.float32)
            optimizer.observe(7.0)
            for i in range(4):
                curvature[i] = 0.8 * curvature[i] + 0.2 * 7.0 * look[i] ** 2
        gradient = rng.normal(size=4) * [0.1, 1.0, 10.0, 0.0]
        model.weight.grad = torch.tensor(gradient[None], dtype=torch.float32)
        optimizer.step()
        for i in range(4):
            momentum[i] = 0.9 * momentum[i] + 0.1 * gradient[i]
            ratio = momentum[i] / max(0.5 * curvature[i], 1e-12)
            clipped += abs(ratio) > 1
            theta[i] = theta[i] * (1 - 0.1 * 0.02) - 0.1 * max(-1.0, min(1.0, ratio))
    np.testing.assert_allclose(model.weight.detach().numpy()[0], theta, rtol=1e-4)
    assert 0 < clipped < 18, "both sides of the clip were met"


def test_a_quadratic_shrinks_at_one_rate_however_badly_it_is_scaled() -> None:
    """f = Σ aᵢxᵢ²/2 with its own curvature: x ← (1 − lr)x in every direction."""
    scales = torch.tensor([1e-3, 1.0, 10.0])
    x = nn.Parameter(torch.tensor([0.5, -0.7, 0.9]))
    optimizer = Sophia([x], 0.3, betas=(0.0, 0.0), rho=1.0)
    start = x.detach().clone()
    for _ in range(10):
        x.grad = scales.sqrt()
        optimizer.observe(1.0)
        x.grad = scales * x.detach()
        optimizer.step()
    torch.testing.assert_close(x.detach(), 0.7**10 * start)


def test_without_curvature_a_step_is_the_sign_and_no_gradient_no_step() -> None:
    x = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    x.grad = torch.tensor([1e-6, -5.0, 0.0])
    Sophia([x], 0.01).step()
    torch.testing.assert_close(x.detach(), torch.tensor([0.99, 1.01, 1.0]))


# -- the curvature -----------------------------------------------------------------------------------------------------


def trainer_of(model: nn.Module, micro_tokens: int = 100_000, **options: float) -> Trainer:
    sophia = Sophia([p for p in model.parameters() if p.requires_grad], 1e-2, betas=(0.9, 0.0), **options)
    sophia.every = 1
    feeds = {"forget": Feed(FORGET), "retain": Feed(RETAIN)}
    terms = [Term("forget", "forget", "token", nll_N, -1.0), Term("retain", "retain", "token", nll_N)]
    settings = TrainOptions(micro_tokens=micro_tokens)
    return Trainer(model, tiny_adapter(), feeds, terms, settings, [sophia], 1, Accelerator(cpu=True))


def curvature_of(trainer: Trainer, p: nn.Parameter) -> Tensor:
    return trainer.optimizers[0].state[p]["curvature"]


def test_looks_average_to_the_diagonal_of_the_gauss_newton_matrix() -> None:
    """For the output head it is known: H[v, d] = mean over targets of p_v (1 − p_v) h_d²; true tokens play no part."""
    model = tiny_model(tied=False)
    trainer = trainer_of(model)
    head = model.lm_head.weight
    total, looks = torch.zeros_like(head), 300
    for step in range(looks):
        trainer.step = step
        observe_curvature(trainer, PICKS, seed=5)
        total += curvature_of(trainer, head)
    exact, count = torch.zeros_like(head), 0
    with torch.no_grad():
        for sample in [*(FORGET[i] for i in PICKS["forget"]), *(RETAIN[i] for i in PICKS["retain"])]:
            positions = trainer.adapter.positions(model, [sample])
            for hidden_D in positions.hidden_ND:
                p_V = torch.softmax(head @ hidden_D, 0)
                exact += (p_V * (1 - p_V))[:, None] * hidden_D.square()[None, :]
                count += 1
    mean, exact = total / looks, exact / count
    assert float(mean.sum() / exact.sum()) == pytest.approx(1.0, abs=0.03)
    by_token, wanted = mean.sum(1), exact.sum(1)
    assert float(((by_token - wanted) / wanted).abs().mean()) < 0.15
    assert float(torch.corrcoef(torch.stack([mean.flatten(), exact.flatten()]))[0, 1]) > 0.9


def test_the_look_does_not_depend_on_micro_batches_and_leaves_no_gradient() -> None:
    found = []
    for micro_tokens in (1, 40, 100_000):
        model = tiny_model()
        trainer = trainer_of(model, micro_tokens)
        observe_curvature(trainer, PICKS, seed=1)
        assert all(p.grad is None for p in model.parameters())
        found.append(torch.cat([curvature_of(trainer, p).flatten() for p in model.parameters()]))
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], rtol=1e-3, atol=1e-7)
    assert float(found[2].max()) > 0


def test_labels_are_drawn_from_the_model() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), -50.0]])
    uniform = torch.linspace(0.0005, 0.9995, 1000)
    drawn = draw(logits.expand(1000, 3), torch.zeros(0), uniform)
    assert torch.bincount(drawn, minlength=3).tolist() == [250, 750, 0]
    assert draw(logits, torch.zeros(0), torch.tensor([1.0])).item() in (1, 2)


def test_batch_statistics_see_no_sample_twice() -> None:
    loaded = init_classifier(3, image_size=8)
    rng = np.random.default_rng(0)
    samples = [
        Sample(id=str(i), subject="", target=i % 3, image=rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        for i in range(4)
    ]
    model = loaded.model.train()
    sophia = Sophia(model.parameters(), 1e-2)
    trainer = Trainer(
        model, loaded.adapter, {"forget": Feed(samples)}, [], TrainOptions(), [sophia], 1, Accelerator(cpu=True)
    )
    before = {n: b.clone() for n, b in model.named_buffers()}
    observe_curvature(trainer, {"forget": [0, 1, 2, 3]}, seed=0)
    assert before and all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert model.training and any(bool(sophia.state[p]["curvature"].any()) for p in model.parameters())


# -- through a method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["graddiff", "npo"])
def test_any_method_runs_with_it_within_a_scope(name: str) -> None:
    model = tiny_model()
    method = get_method(name)
    options = method.configure({"optimizer": "sophia", "epochs": 6, "batch_size": 2, "learning_rate": 2e-3})
    scope = get_scope("layers", {"names": "*.mlp.*"})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    outcome = method(Context(model, tiny_adapter(), FORGET, RETAIN, scope=scope), options)
    assert torch.equal(torch.get_rng_state(), state)
    for n, p in outcome.model.named_parameters():
        assert torch.equal(p, before[n]) != (".mlp." in n), n
    log = outcome.record["log"]
    assert log[-1]["forget_nll"] > log[0]["forget_nll"] and all(math.isfinite(v) for s in log for v in s.values())


def test_it_is_built_by_name() -> None:
    (optimizer,) = build(tiny_model(), "sophia", 1e-3, weight_decay=0.1)
    assert isinstance(optimizer, Sophia) and optimizer.every == 10
    assert {k: optimizer.param_groups[0][k] for k in ("lr", "betas", "rho", "weight_decay")} == {
        "lr": 1e-3, "betas": (0.9, 0.95), "rho": 0.04, "weight_decay": 0.1,
    }  # fmt: skip
