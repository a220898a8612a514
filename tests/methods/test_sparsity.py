"""ℓ1-sparse fine-tuning against SGD on the definition, one sample at a time; its schedules; without the pull."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.matrix.worlds import world
from torch import nn

from expunge.errors import UserError
from expunge.methods.registry import get_method
from expunge.methods.sparsity import SparsityOptions, pull

PLAIN = {"batch_size": 99, "learning_rate": 0.05, "clip": 0.0, "epochs": 4, "schedule": "constant", "warmup": 0.0}
METHOD = get_method("sparsity")


def slow(where: str, gamma: float, steps: int) -> nn.Module:
    """Mean NLL over all retain targets + γ_t Σ|θ| with γ_t = γ (1 − t/steps), by autograd; momentum 0.9."""
    here = world(where)
    model: Any = copy.deepcopy(here.original)
    model.train()  # batch statistics are those of the whole batch, so a classifier's batch is one pass
    parameters = list(model.parameters())
    momentum = [torch.zeros_like(p) for p in parameters]
    for step in range(steps):
        loss, count = torch.zeros(()), 0
        for sample in here.retain:
            batch = here.adapter.collate([sample])
            logits = model(**batch.inputs).logits[0][batch.cols_N]
            loss = loss + torch.nn.functional.cross_entropy(logits, batch.targets_N, reduction="sum")
            count += len(batch.targets_N)
        size = torch.stack([p.abs().sum() for p in parameters]).sum()
        gradients = torch.autograd.grad(loss / count + gamma * (1 - step / steps) * size, parameters)
        with torch.no_grad():
            for p, g, m in zip(parameters, gradients, momentum, strict=True):
                m.mul_(0.9).add_(g)
                p.sub_(0.05 * m)
    return model


def test_it_is_sgd_on_the_definition() -> None:
    here = world("text")
    got = METHOD(here.context(), METHOD.configure(PLAIN | {"gamma": 5e-3})).model
    wanted = slow("text", 5e-3, 4)
    pairs = list(zip(got.parameters(), wanted.parameters(), here.original.parameters(), strict=True))
    assert max(float((p - q).detach().abs().max()) for p, q, _ in pairs) < 2e-5
    assert max(float((o - q).detach().abs().max()) for _, q, o in pairs) > 1e-3


def test_the_pull_fades_stays_or_grows() -> None:
    def found(decay: str) -> list[float]:
        return [pull(SparsityOptions(gamma=1.0, decay=decay), step, 4) for step in range(4)]

    assert found("linear") == [1.0, 0.75, 0.5, 0.25]
    assert found("constant") == [1.0] * 4
    assert found("growing") == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("where", ["text", "resnet"])
def test_without_the_pull_it_is_fine_tuning(where: str) -> None:
    here = world(where)
    finetune = get_method("finetune")
    settings = {**PLAIN, "batch_size": 5, "epochs": 1, "optimizer": "sgd"}
    a = METHOD(here.context(), METHOD.configure({**settings, "gamma": 0.0})).model
    b = finetune(here.context(), finetune.configure(settings)).model
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_it_makes_weights_small_and_says_what_the_pull_was() -> None:
    here = world("text")
    outcome = METHOD(here.context(), METHOD.configure(PLAIN | {"gamma": 5e-3, "epochs": 20}))
    size = sum(float(p.detach().abs().sum()) for p in here.original.parameters())
    assert outcome.record["log"][0]["l1"] == pytest.approx(5e-3 * size, rel=1e-5)
    assert sum(float(p.detach().abs().sum()) for p in outcome.model.parameters()) < 0.97 * size


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match=r"gamma = -0\.1 cannot be: give 0 or more"):
        METHOD.configure({"gamma": -0.1})
    with pytest.raises(UserError, match="allowed are linear, constant, growing"):
        METHOD.configure({"decay": "cosine"})
    with pytest.raises(UserError, match="needs retain data"):
        METHOD(world("text").context(retain=()))
