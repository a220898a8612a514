"""Schedules in closed form; what each optimizer trains; steps against slow implementations of the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.models.lora import LoraOptions, apply_lora
from expunge.models.tiny import init_classifier, init_llava
from expunge.training.optimizers import (
    build,
    factor,
    hidden_matrices,
    load_state_tensors,
    sized_rate,
    state_tensors,
)
from tiny_text import tiny_dataset, tiny_model

SAMPLES = tiny_dataset()["retain"]


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(40, 0.1), (7, 0.5), (10, 0.0), (1, 0.0)])
def test_schedules(schedule: str, steps: int, warmup: float) -> None:
    got = [factor(schedule, step, steps, warmup) for step in range(steps)]  # type: ignore[arg-type]
    warm = math.ceil(warmup * steps)
    for step in range(warm):
        assert got[step] == pytest.approx((step + 1) / (warm + 1))
    for step in range(warm, steps):
        done = (step - warm) / (steps - warm)
        closed = {"cosine": math.cos(math.pi * done / 2) ** 2, "linear": 1 - done, "constant": 1.0}[schedule]
        assert got[step] == pytest.approx(closed)
    assert all(0 < f <= 1 for f in got) and max(got) == pytest.approx(1.0)


def test_the_rate_by_size() -> None:
    model = nn.Linear(1000, 1000, bias=False)  # a million parameters
    assert sized_rate(model, 1e-5) == pytest.approx(1e-5 * 1000**0.6)
    big = nn.Linear(10, 10, device="meta")
    big.weight = nn.Parameter(torch.empty(50_000, 50_000, device="meta"))
    assert sized_rate(big, 1e-5) == 1e-5


# -- wiring ------------------------------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    return init_classifier(3, image_size=16).model


def vit() -> nn.Module:
    return init_classifier(3, image_size=16, arch="vit").model


def llava() -> nn.Module:
    return init_llava(SAMPLES, image_size=16).model


def lora() -> nn.Module:
    return apply_lora(tiny_model(tied=False), LoraOptions(r=2))


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model(tied=False), resnet, vit, llava, lora])
def test_muon_takes_hidden_matrices_and_adamw_everything_else_once(make: object) -> None:
    model: nn.Module = make()  # type: ignore[operator]
    outside = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    heads = [m for n, m in model.named_modules() if n.split(".")[-1] == "lm_head" or "classifier" in n]
    outside += [p for head in heads for p in head.parameters()]
    assert outside or make is vit
    chosen = build(model, "muon", 1e-2)
    inside = {id(p) for o in chosen if isinstance(o, torch.optim.Muon) for g in o.param_groups for p in g["params"]}
    rest = [p for o in chosen if isinstance(o, torch.optim.AdamW) for g in o.param_groups for p in g["params"]]
    assert not inside & {id(p) for p in outside}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert inside | {id(p) for p in rest} == {id(p) for p in trainable}
    assert not inside & {id(p) for p in rest}
    assert inside == {id(p) for p in hidden_matrices(model).values()}
    assert all(p.ndim == 2 for p in trainable if id(p) in inside)
    assert {g["lr"] for o in chosen if isinstance(o, torch.optim.AdamW) for g in o.param_groups} <= {1e-3}


def test_muon_finds_the_layers_of_a_transformer() -> None:
    names = list(hidden_matrices(tiny_model()))
    assert len(names) == 2 * 7 and all("layers." in n for n in names)
    assert "lm_head.weight" not in hidden_matrices(tiny_model(tied=False))


def test_only_some_parameters_and_what_is_refused() -> None:
    model = tiny_model()
    one = model.model.layers[0].mlp.up_proj.weight
    chosen = build(model, "muon", 1e-2, only=[one], other_learning_rate=5e-4)
    assert [p is one for o in chosen for g in o.param_groups for p in g["params"]] == [True]
    with pytest.raises(UserError, match=r"unknown optimizer 'mon'.*did you mean 'muon'"):
        build(model, "mon", 1e-2)
    with pytest.raises(UserError, match="every parameter is frozen"):
        build(model.requires_grad_(False), "adamw", 1e-2)


# -- steps -------------------------------------------------------------------------------------------------------------


def slow_newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five quintic steps (Jordan et al. 2024) in float64, in terms of the singular values alone."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


def well_conditioned(rows: int, cols: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(rng.normal(size=(rows, cols)), full_matrices=False)
    return (left * np.linspace(1.0, 2.0, min(rows, cols))) @ right


@pytest.mark.parametrize("shape", [(12, 6), (6, 12), (8, 8)])
def test_muon_steps_equal_a_slow_newton_schulz(shape: tuple[int, int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(shape[1], shape[0], bias=False)

    model = Net()
    (muon,) = build(model, "muon", 0.1, weight_decay=0.01)
    weight = model.inner.weight.detach().numpy().astype(np.float64).copy()
    momentum = np.zeros(shape)
    for step in range(3):
        grad = well_conditioned(*shape, seed=step)
        model.inner.weight.grad = torch.from_numpy(grad).float()
        muon.step()
        momentum = 0.9 * momentum + grad
        nesterov = grad + 0.9 * momentum
        weight *= 1 - 0.1 * 0.01
        weight -= 0.1 * math.sqrt(max(1.0, shape[0] / shape[1])) * slow_newton_schulz(nesterov)
        gap = np.abs(model.inner.weight.detach().numpy() - weight).max()
        assert gap < 0.1 * 0.05 * (step + 1), "bfloat16 inside torch's Muon allows a few hundredths of a step"


def test_adamw_and_sgd_steps() -> None:
    grads = [torch.tensor([0.5, -2.0, 0.0]), torch.tensor([1.0, 1.0, -3.0])]

    def run(name: str) -> Tensor:
        model = nn.Linear(3, 1, bias=False)
        model.weight.data = torch.tensor([[1.0, 2.0, 3.0]])
        (optimizer,) = build(model, name, 0.1, weight_decay=0.1)
        for grad in grads:
            model.weight.grad = grad[None].clone()
            optimizer.step()
        return model.weight.detach()[0]

    weight, first, second = np.array([1.0, 2.0, 3.0]), np.zeros(3), np.zeros(3)
    for t, grad in enumerate((g.numpy().astype(float) for g in grads), start=1):
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        weight = weight * (1 - 0.1 * 0.1)
        weight = weight - 0.1 * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(run("adamw").numpy(), weight, rtol=1e-5)

    weight, buffer = np.array([1.0, 2.0, 3.0]), np.zeros(3)
    for grad in (g.numpy().astype(float) for g in grads):
        buffer = 0.9 * buffer + grad + 0.1 * weight
        weight = weight - 0.1 * buffer
    np.testing.assert_allclose(run("sgd").numpy(), weight, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "sophia"])
def test_state_goes_through_plain_tensors_with_the_same_bits(name: str) -> None:
    def steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], numbers: range) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()

    whole = tiny_model()
    steps(whole, build(whole, name, 1e-2), range(6))
    half = tiny_model()
    before = build(half, name, 1e-2)
    steps(half, before, range(3))
    flat = state_tensors(before)
    assert flat and all(isinstance(t, Tensor) for t in flat.values())
    after = build(half, name, 1e-2)
    load_state_tensors(after, flat)
    steps(half, after, range(3, 6))
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)
