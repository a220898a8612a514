"""Fisher removal against Newton's step with dense matrices, and against optima of a convex loss."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world
from tests.methods.softmax_world import RegressionAdapter, gradient, hessian, model_at, optimum, points, weight_of

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.curvature import Line, farthest, mean_gradient, mean_loss
from expunge.methods.registry import Context, Outcome, get_method

REMOVAL = get_method("fisher-removal")
RIDGE = 2.0


def remove(weight: np.ndarray, forget: tuple[Sample, ...], retain: tuple[Sample, ...], **values: object) -> Outcome:
    return REMOVAL(Context(model_at(weight), RegressionAdapter(), forget, retain), REMOVAL.configure(values))


def newton(weight: np.ndarray, forget: tuple[Sample, ...], retain: tuple[Sample, ...]) -> np.ndarray:
    """The method, with exact curvature and the ridge as damping."""
    mean = np.trace(hessian(weight, retain)) / len(retain) / (3 * len(retain))  # 3 rows per sample
    damping = RIDGE / len(retain) / mean
    settings = {"steps": 1, "step": 1.0, "labels": "every", "damping": damping, "samples": 10_000}
    return weight_of(remove(weight, forget, retain, **settings).model)


def test_one_step_is_newtons_with_the_dense_hessian() -> None:
    samples = points(60, seed=4)
    forget, retain = samples[:6], samples[6:]
    start = optimum(samples, RIDGE)
    wanted = start.reshape(-1) + np.linalg.solve(
        hessian(start, retain) + RIDGE * np.eye(start.size), gradient(start, forget)
    )
    assert np.allclose(newton(start, forget, retain).reshape(-1), wanted, atol=2e-5)


@pytest.mark.parametrize(("gone", "share"), [(20, 0.2), (4, 0.05)])
def test_from_an_optimum_it_leads_to_the_retrained_one(gone: int, share: float) -> None:
    """The error is of second order: a smaller forget set leaves a smaller part of the way."""
    samples = points(200, seed=4)
    forget, retain = samples[:gone], samples[gone:]
    start, retrained = optimum(samples, RIDGE), optimum(retain, RIDGE)
    left = np.linalg.norm(newton(start, forget, retain) - retrained) / np.linalg.norm(start - retrained)
    assert left < share


def test_searched_steps_keep_the_budget_and_forget_more_than_plain_ascent_does() -> None:
    here = world("text")
    outcome = REMOVAL(here.context(), REMOVAL.configure({"budget": 0.2}))
    before = here.loss(here.original, here.retain)
    assert 0.1 < here.loss(outcome.model, here.retain) - before <= 0.2 + 1e-6
    assert [e["retain"] - before <= 0.05 * (i + 1) + 1e-6 for i, e in enumerate(outcome.record["log"])] == [True] * 4
    plain = copy.deepcopy(here.original)
    line = Line(plain, mean_gradient(plain, here.adapter, here.forget))
    farthest(line.at, mean_loss(plain, here.adapter, here.retain), before + 0.2, 1.0)
    assert here.loss(outcome.model, here.forget) > here.loss(plain, here.forget) + 0.5


def test_the_guard_of_the_forget_loss_holds() -> None:
    here = world("resnet")
    outcome = REMOVAL(here.context(), REMOVAL.configure({"stop_loss": 1.5}))
    assert 0.5 < here.loss(outcome.model, here.forget) <= 1.5


def test_by_default_the_loss_on_never_seen_samples_is_the_guard() -> None:
    here = world("resnet")
    most = here.loss(here.original, here.unseen)
    guarded = REMOVAL(here.context(), REMOVAL.configure({"budget": 0.5}))
    assert here.loss(guarded.model, here.forget) <= most and not guarded.notes
    free = REMOVAL(here.context(unseen=()), REMOVAL.configure({"budget": 0.5}))
    assert here.loss(free.model, here.forget) > most and any("no never-seen samples" in n for n in free.notes)


def test_an_impossible_guard_changes_nothing_and_says_so() -> None:
    samples = points(40, seed=4)
    outcome = remove(np.zeros((3, 4)), samples[:4], samples[4:], stop_loss=0.5)  # it is ln 3 at zero
    assert np.array_equal(weight_of(outcome.model), np.zeros((3, 4)))
    assert any("nothing was changed" in note for note in outcome.notes)


def test_sampled_labels_follow_the_seed_and_steps_draw_anew() -> None:
    here = world("text")
    options = REMOVAL.configure({"labels": "model", "steps": 2, "samples": 6})
    a, b, c = (REMOVAL(here.context(seed=s), options).model for s in (1, 1, 2))
    first, again, other = ([p.detach() for p in m.parameters()] for m in (a, b, c))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("values", [{"steps": 0}, {"step": 0.0}, {"budget": -1.0}, {"damping": 0.0}, {"samples": 0}])
def test_numbers_outside_their_domain(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be"):
        REMOVAL.configure(values)
