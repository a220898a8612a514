"""SalUn, SURE and their masks against slow loops; the random-label loss on the masked weights alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.families import FAMILIES
from expunge.methods.registry import get_method
from expunge.methods.salun import saliency_masks
from expunge.methods.scope import get_scope
from expunge.methods.sure import neuron_masks

PLAIN = {
    "batch_size": 99, "retain_batch": 99, "optimizer": "sgd", "learning_rate": 0.05, "clip": 0.0, "epochs": 3,
    "schedule": "constant", "warmup": 0.0,
}  # fmt: skip


def gradients(where: str) -> dict[str, Tensor]:
    """Of the mean NLL per target over all forget samples: one sample at a time, full logits."""
    here = world(where)
    model: Any = copy.deepcopy(here.original).eval()
    total = torch.zeros(())
    count = 0
    for sample in here.forget:
        batch = here.adapter.collate([sample])
        logits = model(**batch.inputs).logits
        chosen = logits[0][batch.cols_N] if logits.ndim == 3 else logits
        total = total + torch.nn.functional.cross_entropy(chosen, batch.targets_N, reduction="sum")
        count += len(batch.targets_N)
    (total / count).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("where", ["text", "vit"])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_salun_takes_the_largest_gradients_over_all_tensors_together(where: str, share: float) -> None:
    masks, slow = saliency_masks(world(where).context(), share), gradients(where)
    every = np.sort(np.concatenate([g.abs().numpy().ravel() for g in slow.values()]))[::-1]
    least = every[round(share * len(every)) - 1]
    assert sum(int(m.sum()) for m in masks.values()) == round(share * len(every))
    for name, gradient in slow.items():
        # Rounding may swap entries that are next to the threshold.
        clear = (gradient.abs() - least).abs() > 1e-4 * least
        assert torch.equal(masks[name][clear], (gradient.abs() > least)[clear]), name


@pytest.mark.parametrize("where", ["text", "vit"])
def test_sure_takes_the_neurons_with_the_longest_gradients(where: str) -> None:
    masks, slow = neuron_masks(world(where).context(), 0.2), gradients(where)
    norms = {(n, i): float(row.norm()) for n, g in slow.items() for i, row in enumerate(g)}
    ranked = sorted(norms, key=lambda key: -norms[key])
    count = round(0.2 * len(ranked))
    least = norms[ranked[count - 1]]
    chosen = {(n, i) for n, m in masks.items() for i in range(len(m)) if bool(m[i].all())}
    assert len(chosen) == count and all(
        bool(m[i].all()) == bool(m[i].any()) for n, m in masks.items() for i in range(len(m))
    )
    for key in ranked:
        if abs(norms[key] - least) > 1e-4 * least:
            assert (key in chosen) == (norms[key] > least), key


def moved(model: nn.Module, start: nn.Module) -> dict[str, Tensor]:
    old = dict(start.named_parameters())
    return {n: p.detach() != old[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "row"), [("salun", "random-labels"), ("sure", "npo")])
def test_what_moves_moves_as_the_family_says(name: str, row: str) -> None:
    """One SGD step of the masked method is the step of its loss family at the masked entries, and none elsewhere."""
    here = world("text")
    once = PLAIN | {"epochs": 1}
    method, family = get_method(name), get_method(row)
    settings = method.configure({**once, "share": 0.3})
    got = method(here.context(seed=2), settings).model
    whole = family(here.context(seed=2), family.configure(once)).model
    masks = (saliency_masks if name == "salun" else neuron_masks)(here.context(), 0.3)
    start, target = dict(here.original.named_parameters()), dict(whole.named_parameters())
    for n, p in got.named_parameters():
        wanted = torch.where(masks[n], target[n].detach(), start[n].detach())
        assert torch.allclose(p.detach(), wanted, atol=1e-7), n
    assert any(bool(m.any()) for m in moved(got, here.original).values())


@pytest.mark.parametrize("name", ["salun", "sure"])
def test_the_mask_holds_under_momentum_and_weight_decay(name: str) -> None:
    here = world("text")
    method = get_method(name)
    outcome = method(
        here.context(), method.configure({**PLAIN, "optimizer": "adamw", "weight_decay": 0.3, "share": 0.1})
    )
    masks = (saliency_masks if name == "salun" else neuron_masks)(here.context(), 0.1)
    changed = moved(outcome.model, here.original)
    assert not any(bool((m & ~masks[n]).any()) for n, m in changed.items())
    assert outcome.record["weights_free"] == sum(int(m.sum()) for m in masks.values())


def test_a_share_of_one_is_the_family_itself() -> None:
    here = world("text")
    method, family = get_method("salun"), get_method("random-labels")
    once = PLAIN | {"epochs": 2}
    a = method(here.context(), method.configure({**once, "share": 1.0})).model
    b = family(here.context(), family.configure(once)).model
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert "random-labels" in {row.name for row in FAMILIES}


@pytest.mark.parametrize("scope", ["salun", "sure", "memflex"])
def test_as_scopes_of_another_method(scope: str) -> None:
    here = world("text")
    method = get_method("npo")
    context = here.context(scope=get_scope(scope, {}))
    masks = context.scope.masks(context)
    changed = moved(method(context, method.configure({"epochs": 1})).model, here.original)
    assert any(bool(m.any()) for m in changed.values())
    assert not any(bool((m & ~masks.get(n, torch.zeros_like(m))).any()) for n, m in changed.items())


def test_sure_ascends_where_it_is_told_to() -> None:
    here = world("text")
    method = get_method("sure")
    first = method(here.context(), method.configure({**PLAIN, "epochs": 1, "objective": "graddiff"})).record["log"][0]
    batch = [here.adapter.num_targets(s) for s in here.forget]
    loss = np.average(here.losses(here.original, here.forget), weights=batch)
    assert first["forget"] == pytest.approx(-float(loss), rel=1e-4)


def test_what_they_refuse() -> None:
    for name in ("salun", "sure"):
        for share in (0.0, 1.5, float("nan")):
            with pytest.raises(UserError, match=rf"share = {share} cannot be: give a share above 0"):
                get_method(name).configure({"share": share})
            with pytest.raises(UserError, match=rf"share = {share} cannot be"):
                get_scope(name, {"share": share})
    with pytest.raises(UserError, match="allowed are npo, graddiff"):
        get_method("sure").configure({"objective": "ga"})
