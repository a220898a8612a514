"""MMUnlearner against slow gradients of one sample at a time, and one step by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.matrix.worlds import world
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.mmunlearner import salient_masks
from expunge.methods.registry import get_method
from expunge.methods.scope import get_scope
from expunge.models.towers import parameters_of
from slow_steps import PLAIN

METHOD = get_method("mmunlearner")


def slow_gradient(model: Any, sample: Sample) -> dict[str, Tensor]:
    """∂/∂θ of one sample's mean NLL, by the model's own loss."""
    batch = world("llava").adapter.collate([sample])
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    labels[batch.sample_N, batch.cols_N + 1] = batch.targets_N
    model.zero_grad()
    model(**batch.inputs, labels=labels).loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@cache
def slow_masks(threshold: float) -> dict[str, tuple[Tensor, Tensor]]:
    """(chosen, far enough from the threshold that rounding decides nothing) of every weight, from the definition."""
    here = world("llava")
    model = copy.deepcopy(here.original)

    def mean_square(samples: list[Sample]) -> dict[str, Tensor]:
        rows = [slow_gradient(model, s) for s in samples]
        return {n: torch.stack([row[n] ** 2 for row in rows]).mean(0) for n in rows[0]}

    forget = mean_square(list(here.forget))
    seen = mean_square([s for s in here.retain if s.image is not None])
    told = mean_square([s for s in here.retain if s.image is None])
    found = {}
    for n, own in forget.items():
        stays = torch.maximum(seen[n], told[n])
        found[n] = ((own >= threshold * stays) & (own > 0), (own - threshold * stays).abs() > 1e-3 * own + 1e-12)
    return found


@pytest.mark.parametrize("threshold", [1.0, 3.0])
@pytest.mark.parametrize("tower", ["both", "language", "vision"])
def test_the_mask_is_the_definition(tower: str, threshold: float) -> None:
    context = world("llava").context()
    masks = salient_masks(context, threshold, tower)
    slow = slow_masks(threshold)
    linear = {
        f"{n}.{p}"
        for n, m in context.model.named_modules()
        if isinstance(m, nn.Linear)
        for p, _ in m.named_parameters()
    } - {"lm_head.weight"}
    assert set(masks) == linear & (linear if tower == "both" else parameters_of(context.model, tower))
    for name, mask in masks.items():
        chosen, clear = slow[name]
        assert torch.equal(mask[clear], chosen[clear]), name
    assert 0 < sum(int(m.sum()) for m in masks.values()) < 0.6 * sum(m.numel() for m in masks.values())


def test_a_step_is_masked_ascent_and_whole_descent() -> None:
    here = world("llava")
    options = {**PLAIN, "epochs": 1, "learning_rate": 0.1, "alpha": 0.7, "gamma": 0.5, "tower": "vision"}
    context = here.context(forget=here.forget[:3], retain=here.retain[:3])
    masks = salient_masks(context, 1.0, "vision")
    moved = METHOD(context, METHOD.configure(options)).model
    slow: Any = copy.deepcopy(here.original)

    def mean_nll_gradient(samples: tuple[Sample, ...]) -> dict[str, Tensor]:
        tokens = [here.adapter.num_targets(s) for s in samples]
        rows = [slow_gradient(slow, s) for s in samples]
        shares = torch.tensor(tokens) / sum(tokens)
        return {n: torch.einsum("s,s...->...", shares, torch.stack([row[n] for row in rows])) for n in rows[0]}

    up, down = mean_nll_gradient(here.forget[:3]), mean_nll_gradient(here.retain[:3])
    old = dict(here.original.named_parameters())
    for name, p in moved.named_parameters():
        mask = masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        wanted = -0.1 * (0.7 * down[name] - 0.5 * torch.where(mask, up[name], torch.zeros(())))
        torch.testing.assert_close(p - old[name], wanted, rtol=5e-3, atol=1e-5)


def test_as_a_scope_only_salient_weights_of_the_tower_move() -> None:
    here = world("llava")
    scope = get_scope("mmunlearner", {"tower": "vision", "threshold": 0.5})
    context = here.context(scope=scope)
    assert scope is not None
    masks = scope.masks(context)
    method = get_method("npo")
    settings = {"epochs": 2, "optimizer": "sgd", "weight_decay": 0.1, "learning_rate": 0.1}
    model = method(context, method.configure(settings)).model
    old = dict(here.original.named_parameters())
    changed = {n: p.detach() != old[n] for n, p in model.named_parameters()}
    assert any(bool(m.any()) for m in changed.values())
    assert not any(bool((m & ~masks.get(n, torch.zeros_like(m))).any()) for n, m in changed.items())


def test_what_it_refuses() -> None:
    here = world("llava")
    with pytest.raises(UserError, match="compares saliencies of forget and retain"):
        salient_masks(here.context(retain=()), 1.0, "both")
    with pytest.raises(UserError, match=r"no weight matters 1000000000\.0 times"):
        METHOD(here.context(), METHOD.configure({"threshold": 1e9}))
    with pytest.raises(UserError, match="works on multimodal, text, not on a classifier model"):
        METHOD(world("vit").context())
    with pytest.raises(UserError, match="'vision' is a tower of vision-language models"):
        METHOD(world("text").context(), METHOD.configure({"tower": "vision"}))
    for wrong, words in (({"threshold": -1.0}, "give 0 or more"), ({"retain": "none"}, "give nll or kl")):
        with pytest.raises(UserError, match=words):
            replace(METHOD.options(), **wrong)
