"""Boundary expanding against a model whose head really is one row wider; the row is gone afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.matrix.worlds import world
from torch import nn

from expunge.errors import UserError
from expunge.methods.boundary import shadow_logit_N, widened
from expunge.methods.registry import get_method
from expunge.models.adapter import Head
from expunge.models.classifier import last_linear

PLAIN = {
    "batch_size": 99, "optimizer": "sgd", "learning_rate": 0.02, "clip": 0.0, "epochs": 3, "schedule": "constant",
    "warmup": 0.0,
}  # fmt: skip
METHOD = get_method("boundary")


def slow_vit(steps: int) -> nn.Module:
    """Replace the classifier by a wider one, train it on the class that is new, cut the row off."""
    here = world("vit")
    model: Any = copy.deepcopy(here.original)
    old: Any = last_linear(model)
    with widened(nn.Linear(2, 2), old.in_features, 7) as (row, bias):
        wide = nn.Linear(old.in_features, old.out_features + 1)
        with torch.no_grad():
            wide.weight.copy_(torch.cat([old.weight, row[None]]))
            wide.bias.copy_(torch.cat([old.bias, bias[None]]))
    model.classifier = wide
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    batch = here.adapter.collate(here.forget)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(**batch.inputs).logits
        torch.nn.functional.cross_entropy(logits, torch.full((len(here.forget),), old.out_features)).backward()
        optimizer.step()
    narrow = nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        narrow.weight.copy_(wide.weight[:-1])
        narrow.bias.copy_(wide.bias[:-1])
    model.classifier = narrow
    return model


def test_it_is_a_wider_head_that_is_cut_again() -> None:
    got = METHOD(world("vit").context(seed=7), METHOD.configure(PLAIN)).model
    wanted, original = dict(slow_vit(3).named_parameters()), dict(world("vit").original.named_parameters())
    for name, p in got.named_parameters():
        assert torch.allclose(p, wanted[name], atol=2e-5), name
    assert max(float((wanted[n] - p).detach().abs().max()) for n, p in original.items()) > 1e-3


def test_on_text_every_target_goes_to_a_token_that_is_not_there() -> None:
    here = world("text")
    first = METHOD(here.context(seed=7), METHOD.configure(PLAIN | {"epochs": 1})).record["log"][0]["forget"]
    model: Any = here.original
    total, count = 0.0, 0
    with widened(nn.Linear(2, 2), model.config.hidden_size, 7) as (row, bias), torch.no_grad():
        for sample in here.forget:
            batch = here.adapter.collate([sample])
            states = model.model(**batch.inputs).last_hidden_state[0][batch.cols_N]
            wide = torch.cat([model.lm_head(states), (states @ row + bias)[:, None]], dim=1)
            total -= float(wide.log_softmax(1)[:, -1].sum())
            count += len(batch.targets_N)
    assert first == pytest.approx(total / count, rel=1e-5)


def test_the_row_is_scaled_and_capped_like_the_head() -> None:
    hidden, row = torch.randn(5, 4), torch.randn(4)
    head = Head(nn.Linear(4, 3), softcap=2.0, scale=0.5)
    wanted = 2.0 * torch.tanh((hidden @ row + 0.3) * 0.5 / 2.0)
    assert torch.allclose(shadow_logit_N(hidden, head, row, torch.tensor(0.3)), wanted)  # type: ignore[arg-type]


def test_the_extra_parameters_go_also_when_it_fails() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ZeroDivisionError), widened(model, 3, 0) as (row, _):
        assert row.shape == (3,) and float(row.detach().abs().max()) <= 3**-0.5 and len(list(model.parameters())) == 4
        raise ZeroDivisionError
    assert len(list(model.parameters())) == 2


def test_a_model_without_a_linear_head_is_refused() -> None:
    here = world("text")
    context = here.context()
    context.adapter = copy.copy(here.adapter)
    context.adapter.whole_logits = True  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="widens the output head, and this model has no linear one"):
        METHOD(context)
