"""SKU against section 3 of the paper by hand: the bad model's three terms, then the negation."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.llmu import mismatched
from expunge.methods.registry import Outcome, get_method
from slow_steps import FORGET, PLAIN, RETAIN, assert_moved_alike, context, fresh, kl, loaded, nll, sgd

SKU, TASK_VECTOR = get_method("sku"), get_method("task-vector")
OPTIONS: dict[str, Any] = {**PLAIN, "epochs": 3, "learning_rate": 0.01, "scale": 1.0, "bound": 1e6}


def run(model: nn.Module, retain: Any = RETAIN, forget: Any = FORGET, **values: Any) -> Outcome:
    return SKU(context(model, retain=retain, forget=forget), SKU.configure({**OPTIONS, **values}))


def other_answers(count: int) -> list[Sample]:
    rng = np.random.default_rng(3)
    return [s for own in FORGET for s in mismatched(own, FORGET, count, loaded().adapter, rng)]


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_bad_model_is_made_and_subtracted(scale: float) -> None:
    model, bad = fresh(), fresh()
    old = copy.deepcopy(bad)
    outcome = run(model, guided=1.1, random=0.8, preserving=0.6, random_answers=2, scale=scale)

    def objective() -> Tensor:
        return 1.1 * nll(bad, FORGET) + 0.8 * nll(bad, other_answers(2)) - 0.6 * kl(old, bad, RETAIN)

    values = sgd(bad, [objective] * 3, 0.01)
    for step, value in zip(outcome.record["log"], values, strict=True):
        assert 1.1 * step["forget"] + 0.8 * step["random"] - 0.6 * step["retain"] == pytest.approx(value, rel=1e-3)
    slow = fresh()
    with torch.no_grad():
        for p, q in zip(slow.parameters(), bad.parameters(), strict=True):
            p.sub_(scale * (q - p))
    assert_moved_alike(model, slow, old)
    (entry,) = outcome.record["helpers"]
    assert entry["destroyed"] and entry["samples"] == len(FORGET) + len(RETAIN)


def test_without_the_other_two_terms_it_is_a_task_vector() -> None:
    first, second = fresh(), fresh()
    run(first, (), guided=1.0, random=0.0)
    plain = {k: v for k, v in OPTIONS.items() if k not in ("retain_batch", "bound")}
    TASK_VECTOR(context(second), TASK_VECTOR.configure(plain))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_random_answers_are_other_forget_answers() -> None:
    for own, made in zip([s for s in FORGET for _ in range(2)], other_answers(2), strict=True):
        assert made.target != own.target and made.target in {s.target for s in FORGET} and made.prompt == own.prompt
    alone = run(fresh(), forget=FORGET[:1])
    assert "random" not in alone.record["log"][0] and any("one answer" in note for note in alone.notes)


def test_the_bound_ends_the_divergence() -> None:
    """Beyond the bound there is no gradient: the bad model stays where the unbounded one goes on."""
    # A little of the first term: at the original itself the divergence has no gradient.
    steps: dict[str, Any] = {"guided": 1e-3, "random": 0.0, "epochs": 40, "learning_rate": 5e-3, "optimizer": "adamw"}
    near = run(fresh(), **steps, bound=0.5).record["log"]
    far = run(fresh(), **steps).record["log"]
    assert max(s["retain"] for s in near) <= 0.5 and far[-1]["retain"] > 2.0
    assert near[-1]["retain"] > 0.3


def test_at_the_scale_of_the_paper_retain_suffers_and_the_chosen_one_is_smaller() -> None:
    settings: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-2, "epochs": 10, "bound": 2.0}
    whole, chosen = fresh(), fresh()
    run(whole, **settings)
    outcome = run(chosen, **settings, scale=None, keep=0.9)
    assert 0 < outcome.record["scale"] < 1 and any("chosen on 6 retain samples" in note for note in outcome.notes)
    with torch.no_grad():
        assert float(nll(whole, RETAIN)) > float(nll(chosen, RETAIN)) + 1
        assert float(nll(chosen, FORGET)) > float(nll(loaded().model, FORGET))


def test_refuses_what_is_no_weight() -> None:
    for wrong in ({"guided": -1}, {"random_answers": 0}, {"bound": 0}):
        with pytest.raises(UserError, match="cannot be: give weights of 0 or more"):
            SKU.configure(wrong)
    with pytest.raises(UserError, match="cannot be: give scales above 0"):
        SKU.configure({"scale": 0})
