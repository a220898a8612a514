"""Whole classes that go from a classifier: rows by hand, a retrained model as the measure, when it does not apply."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.worlds import World, pictures, world
from torch import nn

from expunge.bench.results import properties
from expunge.methods.cluster.classes import comparable, place_rows
from expunge.methods.registry import Context, Outcome, get_method
from expunge.methods.scope import held
from expunge.models.classifier import last_linear
from expunge.models.tiny import init_classifier
from expunge.training.loop import TrainOptions, fit

torch.set_num_threads(1)
METHOD = get_method("cluster")
GOES, STAYS, NEVER = (5,), (0, 1, 2, 3, 4), (6, 7, 8)
SETTINGS = TrainOptions(epochs=20, batch_size=8, learning_rate=5e-3)


@cache
def setting() -> tuple[World, nn.Module]:
    """Classes with textures of their own, and the retrained model, which never saw class 5."""
    loaded = init_classifier(9, image_size=16, arch="resnet")
    start = copy.deepcopy(loaded.model)
    crowd = [replace(s, target=i % 9) for i, s in enumerate(pictures(54, 9, 0))]
    forget, retain, unseen = (tuple(s for s in crowd if s.target in part) for part in (GOES, STAYS, NEVER))
    retrained = copy.deepcopy(start)
    fit(loaded.model, loaded.adapter, [*forget, *retain], SETTINGS)
    fit(retrained, loaded.adapter, retain, SETTINGS, seed=1)
    return World("classes", loaded.adapter, forget, retain, unseen, start, loaded.model.eval()), retrained.eval()


def run(context: Context, **values: Any) -> Outcome:
    return METHOD(context, METHOD.configure(values))


def test_the_row_is_the_mean_of_the_rows_without_samples() -> None:
    here, _ = setting()
    outcome = run(here.context())
    own, was = (last_linear(m) for m in (outcome.model, here.original))
    for name in ("weight", "bias"):
        new, old = (getattr(head, name).detach().double().numpy() for head in (own, was))
        for row in range(9):
            wanted = sum(old[never] for never in NEVER) / len(NEVER) if row in GOES else old[row]
            np.testing.assert_allclose(new[row], wanted, rtol=1e-5, atol=1e-6, err_msg=f"{name} of class {row}")
    before = here.original.state_dict()
    changed = {n for n, p in outcome.model.state_dict().items() if not torch.equal(p, before[n])}
    assert len(changed) == 2, "everything else stays bit for bit"
    assert outcome.record["steps"] == 0 and any("whole classes go" in note for note in outcome.notes)
    # The features still hold what was learnt, and the record of the run must say so.
    assert not properties(get_method("cluster"), outcome)["removes_from_weights"]
    assert properties(get_method("cluster"), Outcome(outcome.model))["removes_from_weights"]


def test_it_ends_where_retraining_does() -> None:
    here, retrained = setting()
    outcome = run(here.context())
    outcome.model.eval()
    wanted = here.loss(retrained, here.forget)
    assert here.loss(here.original, here.forget) < 0.1 and wanted > 3, "the original knows them, retraining does not"
    assert abs(here.loss(outcome.model, here.forget) - wanted) < 0.25 * wanted
    assert here.loss(outcome.model, here.retain) <= here.loss(here.original, here.retain) + 1e-3
    # People nobody was trained on are where they were.
    assert abs(here.loss(outcome.model, here.unseen) - here.loss(here.original, here.unseen)) < 0.25


@pytest.mark.parametrize("why", ["a class stays", "no strangers", "no retain", "head fixed", "text"])
def test_where_the_original_does_not_show_it_nothing_is_placed(why: str) -> None:
    here, _ = setting()
    context = here.context()
    if why == "text":
        context = world("text").context()
    elif why == "a class stays":
        context.retain = (*here.retain, replace(here.forget[0], id="stays"))
    elif why == "no strangers":
        context.unseen = tuple(replace(s, target=0) for s in here.unseen)
    elif why == "no retain":
        context.retain = ()
    elif why == "head fixed":
        last_linear(context.model).weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
    assert not place_rows(context)
    assert all(torch.equal(p, before[n]) for n, p in context.model.named_parameters())
    assert place_rows(here.context(base=None)), "and with everything there it is"


def test_members_that_are_asked_for_are_edited_towards() -> None:
    here, _ = setting()
    outcome = run(here.context(), members="proxy+blend", steps=2, groups="all", negations=0)
    assert outcome.record["steps"] == 2 and outcome.record["log"]


def test_a_scope_without_the_head_holds() -> None:
    here, _ = setting()
    context = here.context()
    head = {id(p) for p in last_linear(context.model).parameters()}
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in context.model.named_parameters() if id(p) not in head}
    with held(context.model, masks):
        assert not place_rows(context)
    assert torch.equal(last_linear(context.model).weight, last_linear(here.original).weight)


def test_comparable_are_strangers_where_whole_classes_go() -> None:
    here, _ = setting()
    views = tuple(replace(s, target=0) for s in here.unseen)
    assert comparable(here.context(unseen=(*views, *here.unseen))) == list(here.unseen)
    resnet, text = world("resnet"), world("text")
    assert comparable(resnet.context()) == list(resnet.unseen)
    assert comparable(text.context()) == list(text.unseen)
