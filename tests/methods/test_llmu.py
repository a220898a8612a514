"""LLMU against equations 1 to 5 of the paper by hand: three terms, random answers that are another's."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from expunge.data.refusals import REFUSALS
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.llmu import AnsweredPlan, mismatched
from expunge.methods.registry import get_method
from expunge.models.tiny import init_classifier
from expunge.training.batching import EpochPlan
from slow_steps import FORGET, PLAIN, RETAIN, assert_moved_alike, context, fresh, kl, loaded, nll, sgd

LLMU = get_method("llmu")
OPTIONS = {**PLAIN, "epochs": 3, "learning_rate": 0.03}


def run(model: nn.Module, retain: Any = RETAIN, **values: Any) -> Any:
    return LLMU(context(model, retain=retain), LLMU.configure({**OPTIONS, **values}))


def answers(count: int) -> list[Sample]:
    rng = np.random.default_rng(3)
    return [s for own in FORGET for s in mismatched(own, RETAIN, count, loaded().adapter, rng)]


@pytest.mark.parametrize("count", [1, 3])
def test_steps_follow_the_paper(count: int) -> None:
    model, slow = fresh(), fresh()
    old = copy.deepcopy(slow)
    outcome = run(model, forget_weight=0.4, random_weight=0.9, normal_weight=1.3, random_answers=count)

    def objective() -> Tensor:
        return -0.4 * nll(slow, FORGET) + 0.9 * nll(slow, answers(count)) + 1.3 * kl(old, slow, RETAIN)

    values = sgd(slow, [objective] * 3, 0.03)
    for step, value in zip(outcome.record["log"], values, strict=True):
        found = -0.4 * step["forget"] + 0.9 * step["random"] + 1.3 * step["retain"]
        assert found == pytest.approx(value, rel=1e-3)
    assert_moved_alike(model, slow, old)


def test_one_term_alone_is_ascent_or_learning() -> None:
    """ε2 = ε3 = 0 is gradient ascent; ε1 = ε3 = 0 only learns the random answers."""
    model, slow = fresh(), fresh()
    run(model, forget_weight=1.0, random_weight=0.0, normal_weight=0.0)
    sgd(slow, [lambda: -nll(slow, FORGET)] * 3, 0.03)
    assert_moved_alike(model, slow, loaded().model)
    model, other = fresh(), fresh()
    run(model, forget_weight=0.0, random_weight=1.0, normal_weight=0.0)
    sgd(other, [lambda: nll(other, answers(5))] * 3, 0.03)
    assert_moved_alike(model, other, loaded().model)


def test_random_answers_are_others() -> None:
    rng = np.random.default_rng(0)
    for own in FORGET:
        made = mismatched(own, RETAIN, 4, loaded().adapter, rng)
        assert len({s.target for s in made}) == len({s.id for s in made}) == 4
        assert {s.target for s in made} <= {s.target for s in RETAIN} - {own.target}
        assert {s.prompt for s in made} == {own.prompt} and not any(s.probes for s in made)
    same = [replace(RETAIN[0], target=FORGET[0].target)]
    assert {s.target for s in mismatched(FORGET[0], same, 3, loaded().adapter, rng)} <= set(REFUSALS)
    more = mismatched(FORGET[0], RETAIN[:2], 5, loaded().adapter, rng)
    assert len(more) == 5 and len({s.id for s in more}) == 5
    images = init_classifier(3, image_size=8).adapter
    shown = Sample(id="x", subject="", target=1, image=np.zeros((8, 8, 3), np.uint8))
    assert {s.target for s in mismatched(shown, [shown], 20, images, rng)} == {0, 2}
    assert {s.target for s in mismatched(shown, [replace(shown, target=2)], 3, images, rng)} == {2}


def test_each_forget_sample_comes_with_all_its_answers() -> None:
    plan = AnsweredPlan(EpochPlan({"forget": [1] * 5, "retain": [1] * 4}, {"forget": 2, "retain": 3}, 1, "forget"), 3)
    seen = [plan.batch(step) for step in range(plan.steps)]
    assert all({i // 3 for i in b["random"]} == set(b["forget"]) and len(b["retain"]) for b in seen)
    assert sorted(i for b in seen for i in b["random"]) == list(range(15))


def test_stops_when_the_forget_loss_has_run_away() -> None:
    outcome = run(fresh(), epochs=40, stop_loss=3.0, forget_weight=3.0, random_weight=0.0)
    log = outcome.record["log"]
    assert len(log) < 40 and np.mean([s["forget"] for s in log[-3:]]) > 3.0 >= np.mean(
        [s["forget"] for s in log[-4:-1]]
    )
    assert any(f"stopped after {len(log)} of 40 steps" in note for note in outcome.notes)
    assert any("no retain samples" in note for note in run(fresh(), ()).notes)


def test_refuses_what_is_no_weight() -> None:
    for wrong in ({"forget_weight": -1}, {"random_answers": 0}):
        with pytest.raises(UserError, match="cannot be: give weights of 0 or more"):
            LLMU.configure(wrong)
