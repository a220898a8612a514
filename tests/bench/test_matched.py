"""Equal utility: the edit is mixed with the original until the retain set is at the level."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.matrix.worlds import world

from expunge.bench.matched import HALVINGS, at_level, mix, probability
from expunge.methods.registry import get_method


def test_an_edit_that_damages_is_cut_to_the_level_and_another_is_left_alone() -> None:
    here = world("text")
    method = get_method("ga")
    damaged = method(here.context(), method.configure({"epochs": 6, "learning_rate": 4e-3, "batch_size": 3})).model
    kept = probability(here.original, here.adapter, here.retain)
    assert probability(damaged, here.adapter, here.retain) < 0.9 * kept
    mixed, share = at_level(damaged, here.original, here.adapter, here.retain, 0.95)
    assert 0 < share < 1
    assert probability(mixed, here.adapter, here.retain) >= 0.95 * kept
    further = copy.deepcopy(damaged)
    mix(further, damaged, here.original, share + 2.0**-HALVINGS)
    assert probability(further, here.adapter, here.retain) < 0.95 * kept, "the largest share"
    assert here.loss(mixed, here.forget) > here.loss(here.original, here.forget)
    same, whole = at_level(here.original, here.original, here.adapter, here.retain, 1.0)
    assert whole == 1.0 and same is here.original


def test_mixing_is_linear_and_leaves_counters_alone() -> None:
    here = world("resnet")
    other = copy.deepcopy(here.start)
    into = copy.deepcopy(other)
    mix(into, other, here.original, 0.25)
    for name, tensor in into.state_dict().items():
        one, two = other.state_dict()[name], here.original.state_dict()[name]
        expected = 0.25 * one + 0.75 * two if tensor.is_floating_point() else one
        assert torch.allclose(tensor, expected, atol=1e-6), name


def test_a_level_that_cannot_be_is_refused() -> None:
    from expunge.bench.plan import StudyOptions, check_study
    from expunge.errors import UserError
    from tiny_text import tiny_dataset

    with pytest.raises(UserError, match="--matched 120: give a percentage"):
        check_study(tiny_dataset(), StudyOptions(matched=120))
