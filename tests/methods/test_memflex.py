"""MemFlex: gradients of half-random answers against a slow loop, the two thresholds, what moves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.matrix.worlds import world

from expunge.errors import UserError
from expunge.methods.memflex import chosen_regions, half_wrong, perturbed_gradient, region_masks
from expunge.methods.registry import get_method


@pytest.mark.parametrize("where", ["text", "resnet"])
def test_half_of_the_labels_are_wrong_and_drawn_anew_for_each_copy(where: str) -> None:
    here = world(where)
    context = here.context(seed=3)
    first, again, other = (half_wrong(context, here.forget, copy) for copy in (0, 0, 1))
    for sample in here.forget:
        true = here.adapter.collate([sample]).targets_N
        wrong = first[sample.id] != true
        assert int(wrong.sum()) == math.ceil(len(true) / 2)
        assert torch.equal(first[sample.id], again[sample.id])
    assert where == "resnet" or any(not torch.equal(first[s.id], other[s.id]) for s in here.forget)


@pytest.mark.parametrize("where", ["text", "resnet"])
def test_gradients_are_those_of_full_logits_one_sample_at_a_time(where: str) -> None:
    here = world(where)
    context = here.context(seed=3)
    got = perturbed_gradient(context, here.forget, 2)
    model: Any = copy.deepcopy(here.original).eval()
    loss, count = torch.zeros(()), 0
    for number in range(2):
        labels = half_wrong(context, here.forget, number)
        for sample in here.forget:
            batch = here.adapter.collate([sample])
            logits = model(**batch.inputs).logits
            chosen = logits[0][batch.cols_N] if logits.ndim == 3 else logits
            loss = loss + torch.nn.functional.cross_entropy(chosen, labels[sample.id], reduction="sum")
            count += len(batch.targets_N)
    (loss / count).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(got[name], p.grad, rtol=1e-3, atol=1e-6), name


def test_both_thresholds_choose() -> None:
    same, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[-2.0, 1.0]])
    forget = {"along": same, "across": same, "small": 0.01 * same, "vector": same[0], "zero": 0 * same}
    retain = {"along": 3 * same, "across": other, "small": -same, "vector": other[0], "zero": same}
    assert chosen_regions(forget, retain, 0.92, 0.1) == pytest.approx({"across": 0.0})
    assert set(chosen_regions(forget, retain, 1.1, 0.1)) == {"across", "along"}
    assert chosen_regions(forget, retain, 0.92, 0.0) == pytest.approx({"across": 0.0, "small": -1.0})
    assert set(chosen_regions(forget, retain, 0.92, None)) == {"across"}  # the median of .015, 0, 1.5 and 1.5 is .7575


def test_only_chosen_regions_move_as_in_gradient_difference() -> None:
    here = world("text")
    plain = {
        "batch_size": 99, "retain_batch": 99, "optimizer": "sgd", "learning_rate": 0.01, "clip": 0.0, "epochs": 1,
    }  # fmt: skip
    method, family = get_method("memflex"), get_method("graddiff")
    outcome = method(here.context(seed=5), method.configure(plain))
    whole = dict(family(here.context(seed=5), family.configure(plain)).model.named_parameters())
    masks = region_masks(here.context(seed=5), 0.92, None, 3)
    start = dict(here.original.named_parameters())
    assert 0 < len(masks) < len(start) and all(bool(m.all()) for m in masks.values())
    for n, p in outcome.model.named_parameters():
        assert torch.allclose(p.detach(), (whole if n in masks else start)[n].detach(), atol=1e-7), n


def test_what_it_refuses() -> None:
    context = world("text").context()
    with pytest.raises(UserError, match="no region has a cosine below mu = -1"):
        region_masks(context, -1.0, None, 1)
    with pytest.raises(UserError, match="needs retain data"):
        get_method("memflex")(world("text").context(retain=()))
    with pytest.raises(UserError, match="give --retain"):
        region_masks(world("text").context(retain=()), 0.92, None, 1)
    for values, text in [({"mu": 1.2}, "mu = 1.2"), ({"sigma": -1.0}, "sigma = -1.0"), ({"copies": 0}, "copies = 0")]:
        with pytest.raises(UserError, match=f"{text} cannot be"):
            get_method("memflex").configure(values)
