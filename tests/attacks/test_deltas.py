"""Weight deltas against finite differences and closed forms, and whom they point at."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.matrix import worlds
from torch import nn

import attack_cases
from attack_cases import audited, exam
from expunge.attacks.deltas import difference, norm_of, pull, weights
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, get_attack
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import evaluating
from expunge.stats import auc
from tiny_text import tiny_model

DELTA = get_attack("weight-delta")


def run(checkpoint: Checkpoint, **options: object) -> Finding:
    return DELTA.run(audited(checkpoint), checkpoint, DELTA.configure(options))


def loss_of(model: nn.Module, sample: Sample) -> float:
    with evaluating(model):
        return -float(attack_cases.adapter().positions(model, [sample]).log_prob_N().double().mean())


def moved(model: nn.Module, delta: dict[str, torch.Tensor], step: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.add_(step * delta[name])
    return other


def ascended(samples: list[Sample], rate: float, steps: int = 1) -> nn.Module:
    """The original after plain gradient ascent on the mean loss of the samples."""
    assert exam().original is not None
    model, adapter = copy.deepcopy(exam().original.model), attack_cases.adapter()
    for _ in range(steps):
        model.zero_grad()
        loss = sum(-adapter.positions(model, [s]).log_prob_N().mean() for s in samples) / len(samples)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(rate * parameter.grad)
    model.zero_grad()
    return model.eval()


def test_inner_product_is_the_slope_of_the_loss_along_the_delta() -> None:
    model, sample = copy.deepcopy(exam().audited.model).double(), exam().forget[0]
    other = tiny_model(4).double()
    delta = {n: w.double() - weights(model)[n] for n, w in weights(other).items()}
    along, _ = pull(model, attack_cases.adapter(), sample, delta)
    step = 1e-3
    slope = (loss_of(moved(model, delta, step), sample) - loss_of(moved(model, delta, -step), sample)) / (2 * step)
    assert along == pytest.approx(slope, rel=5e-3, abs=1e-4)  # the head computes in float32


def test_along_its_own_gradient_the_inner_product_is_the_squared_norm() -> None:
    model, sample = exam().audited.model, exam().forget[1]
    raised = ascended([sample], 1e-3)
    delta = difference(weights(raised), weights(model))
    along, norm = pull(copy.deepcopy(model), attack_cases.adapter(), sample, delta)
    assert along == pytest.approx(1e-3 * norm**2, rel=1e-3)
    assert along / (norm * norm_of(delta)) == pytest.approx(1.0, rel=1e-3)  # the cosine


def test_the_middle_predicts_the_change_of_loss() -> None:
    """The mean of the slopes at both ends is the trapezoid rule: much nearer to the change than one end."""
    raised = Checkpoint.of(ascended(exam().forget, 0.05, steps=3), attack_cases.adapter())
    assert exam().original is not None
    change = [loss_of(raised.model, s) - loss_of(exam().original.model, s) for s in exam().forget]
    errors = {
        at: np.abs(np.array(run(raised, at=at).scores["weight-delta.product"]["forget"]) - change).mean()
        for at in ("original", "middle")
    }
    assert errors["middle"] < 0.5 * errors["original"]
    assert np.mean(change) > 0.1


def test_points_at_what_was_erased() -> None:
    raised = Checkpoint.of(ascended(exam().forget, 0.05, steps=3), attack_cases.adapter())
    scores = run(raised).scores
    assert auc(scores["weight-delta"]["forget"], scores["weight-delta"]["holdout"]) > 0.95
    assert auc(scores["weight-delta"]["forget"], scores["weight-delta"]["retain"]) > 0.95
    # Never-seen texts have long gradients, so the bare product points at forget less sharply.
    bare = scores["weight-delta.product"]
    assert (
        0.5
        < auc(bare["forget"], bare["holdout"])
        < auc(scores["weight-delta"]["forget"], scores["weight-delta"]["holdout"])
    )


def test_an_edit_that_is_not_about_the_forget_set_does_not_point_at_it() -> None:
    """Ascent on retained samples: those stand out, and forget does not stand above them."""
    chosen = exam().samples["retain"][:6]
    raised = Checkpoint.of(ascended(chosen, 0.05, steps=3), attack_cases.adapter())
    scores = run(raised).scores["weight-delta"]
    assert auc(scores["retain"][:6], scores["forget"]) > 0.85


def test_no_difference_gives_zero_everywhere() -> None:
    assert exam().original is not None
    found = run(exam().original)
    assert all(v == 0 for by_role in found.scores.values() for values in by_role.values() for v in values)
    assert found.figures["weight-delta.norm"].value == 0
    assert "original itself" in found.notes[0]


def test_the_limit_leaves_the_others_out_and_models_stay_as_they_were() -> None:
    raised = Checkpoint.of(ascended(exam().forget, 0.05), attack_cases.adapter())
    before = {n: w.clone() for n, w in weights(raised.model).items()}
    found = run(raised, limit=3)
    assert [int(np.isfinite(v).sum()) for v in found.scores["weight-delta"].values()] == [3, 3, 3]
    assert any("at most 3" in note for note in found.notes)
    assert all(torch.equal(w, before[n]) for n, w in weights(raised.model).items())
    assert all(p.grad is None for p in raised.model.parameters())


def test_models_of_other_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="different weights"):
        run(Checkpoint.of(tiny_model(0, width=48), attack_cases.adapter()))


@pytest.mark.parametrize("name", ["resnet", "llava"])
def test_classes_and_images(name: str) -> None:
    world = worlds.world(name)
    raised = copy.deepcopy(world.original)
    raised.zero_grad()
    loss = -world.adapter.positions(raised, list(world.forget)).log_prob_N().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in raised.parameters():
            if parameter.grad is not None:
                parameter.add_(1e-2 * parameter.grad)
    after, before = (Checkpoint.of(m.eval(), world.adapter) for m in (raised, world.original))
    both = Exam(audited=after, original=before, samples={"forget": list(world.forget), "holdout": list(world.unseen)})
    scores = DELTA.run(both, after, DELTA.configure({})).scores["weight-delta"]
    assert np.mean(scores["forget"]) > np.mean(scores["holdout"])
    assert np.mean(scores["forget"]) > 0
