"""Selective synaptic dampening entry by entry, from gradients of full logits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.matrix.worlds import world
from tests.methods.softmax_world import Regression, RegressionAdapter, points
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, get_method
from expunge.methods.ssd import dampening

SSD = get_method("ssd")


def slow_importance(model: Any, samples: tuple[Sample, ...]) -> Tensor:
    """E over samples of (∂ log p(y|x) / ∂θ)², one class at a time."""
    total = torch.zeros_like(model.linear.weight)
    for s in samples:
        x = torch.as_tensor(s.image)
        z = model(x)
        log_p = z[int(s.target)] - torch.log(sum(torch.exp(v) for v in z))  # type: ignore[arg-type]
        model.zero_grad()
        log_p.backward()
        total += model.linear.weight.grad**2
    model.zero_grad(set_to_none=True)
    return total / len(samples)


@pytest.mark.parametrize(("alpha", "strength"), [(1.0, 1.0), (1.2, 0.5), (1.2, 1.1)])
def test_each_weight_as_in_the_paper(alpha: float, strength: float) -> None:
    forget, retain = points(3, seed=1), points(12, seed=2)
    model, start = Regression(), Regression()
    outcome = SSD(
        Context(model, RegressionAdapter(), forget, retain), SSD.configure({"alpha": alpha, "strength": strength})
    )
    f, d = slow_importance(start, forget), slow_importance(start, (*forget, *retain))
    chosen = 0
    for i in range(3):
        for j in range(4):
            old, new = start.linear.weight[i, j].item(), model.linear.weight[i, j].item()
            if f[i, j] > alpha * d[i, j]:
                beta = min(float(strength * d[i, j] / f[i, j]), 1.0)
                chosen += beta < 1
                assert new == pytest.approx(beta * old, rel=1e-4)
            else:
                assert new == old
    assert outcome.record == {"alpha": alpha, "dampened": chosen} and 0 < chosen < 12


def test_identical_data_or_a_high_threshold_changes_nothing() -> None:
    forget, retain = points(3, seed=1), points(12, seed=2)
    model, start = Regression(), Regression()
    outcome = SSD(Context(model, RegressionAdapter(), forget, retain), SSD.configure({"alpha": 5.0}))
    assert torch.equal(model.linear.weight, start.linear.weight)
    assert any("selects nothing" in note for note in outcome.notes)
    again = tuple(replace(s, id=s.id + "x") for s in forget)
    SSD(Context(model, RegressionAdapter(), forget, again), SSD.configure({"alpha": 1.001}))
    assert torch.equal(model.linear.weight, start.linear.weight)


def test_default_alpha_is_the_papers_where_it_can_select() -> None:
    few = SSD(Context(Regression(), RegressionAdapter(), points(1, seed=1), points(199, seed=2)))
    half = SSD(Context(Regression(), RegressionAdapter(), points(10, seed=1), points(10, seed=2)))
    assert few.record["alpha"] == 10.0 and half.record["alpha"] == pytest.approx(1.6)


def test_unreached_weights_stay() -> None:
    zero = torch.zeros(2, 2)
    assert torch.equal(dampening(zero, zero, 1.0, 1.0), torch.ones(2, 2))


def test_weights_of_the_forget_samples_alone_are_those_that_go() -> None:
    """Tokens that only the forget people have: their embeddings shrink more than those of the others."""
    here = world("text")
    model = copy.deepcopy(here.original)
    SSD(here.context(model=model), SSD.configure({"alpha": 2.5}))
    ids = {
        role: {int(i) for s in samples for i in here.adapter.tokenizer(f"{s.prompt} {s.target}").input_ids}  # type: ignore[attr-defined]
        for role, samples in (("forget", here.forget), ("retain", here.retain))
    }
    own: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    old: nn.Module = here.original.get_input_embeddings()  # type: ignore[operator]
    kept = (own.weight.norm(dim=1) / old.weight.norm(dim=1)).detach()  # type: ignore[operator, union-attr]
    only_forget, only_retain = (sorted(ids[a] - ids[b]) for a, b in (("forget", "retain"), ("retain", "forget")))
    assert only_forget and float(kept[only_forget].mean()) < 0.9 < float(kept[only_retain].mean())


@pytest.mark.parametrize("values", [{"alpha": 0.0}, {"strength": -1.0}])
def test_numbers_outside_their_domain(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be"):
        SSD.configure(values)
