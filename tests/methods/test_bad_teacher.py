"""Bad teacher against equation 1 of the paper by hand: one mean over mixed batches, two teachers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.bad_teacher import MixedPlan, some
from expunge.methods.registry import get_method
from expunge.methods.retrain import from_scratch
from slow_steps import FORGET, PLAIN, RETAIN, assert_moved_alike, context, fresh, loaded, logits, sgd

BAD_TEACHER = get_method("bad-teacher")
OPTIONS = {name: value for name, value in PLAIN.items() if name != "retain_batch"}


def run(model: nn.Module, retain: Any = RETAIN, **values: Any) -> Any:
    return BAD_TEACHER(context(model, retain=retain), BAD_TEACHER.configure({**OPTIONS, **values}))


def token_kls(teacher: nn.Module, student: nn.Module, sample: Sample) -> list[Tensor]:
    with torch.no_grad():
        t_LV = logits(teacher, sample)[0].softmax(1)
    s_LV = logits(student, sample)[0].softmax(1)
    return [(t_V * (t_V.log() - s_V.log())).sum() for t_V, s_V in zip(t_LV, s_LV, strict=True)]


def mixed(bad: nn.Module, old: nn.Module, student: nn.Module, retain: list[Sample]) -> Tensor:
    """(1 − l)·KL(good ‖ student) + l·KL(bad ‖ student), l = 1 on forget: one mean over all tokens of the batch."""
    labelled = [(s, 1) for s in FORGET] + [(s, 0) for s in retain]
    values: list[Tensor] = []
    for sample, forgotten in labelled:
        values += token_kls(bad if forgotten else old, student, sample)
    return torch.stack(values).mean()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_steps_follow_the_paper(share: float) -> None:
    model, slow = fresh(), fresh()
    old, bad = copy.deepcopy(slow), from_scratch(slow, 3)
    retain = some(RETAIN, share, 3)
    assert len(retain) == round(share * len(RETAIN))
    outcome = run(model, epochs=3, learning_rate=0.05, retain_share=share)
    values = sgd(slow, [lambda: mixed(bad, old, slow, retain)] * 3, 0.05)
    tokens = {r: sum(len(logits(old, s)[1]) for s in own) for r, own in (("forget", FORGET), ("retain", retain))}
    for step, value in zip(outcome.record["log"], values, strict=True):
        sums = tokens["forget"] * step["forget"] + tokens["retain"] * step["retain"]
        assert sums / sum(tokens.values()) == pytest.approx(value, rel=1e-3)
    assert_moved_alike(model, slow, old)


def test_forget_becomes_as_uncertain_as_random_weights() -> None:
    """At the end both divergences are small: nearly uniform on forget, still the original on retain."""
    model = fresh()
    settings: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-2, "schedule": "cosine"}
    run(model, epochs=60, retain_share=1.0, **settings)
    with torch.no_grad():
        p_LV = torch.cat([logits(model, s)[0] for s in FORGET]).softmax(1)
        entropy = float(-(p_LV * p_LV.log()).sum(1).mean())
        kept = torch.stack([k for s in RETAIN for k in token_kls(loaded().model, model, s)]).mean()
    assert entropy > 0.9 * math.log(p_LV.shape[1]) and float(kept) < 0.2


def test_without_retain_only_the_bad_teacher_speaks() -> None:
    model, slow = fresh(), fresh()
    bad = from_scratch(slow, 3)
    outcome = run(model, (), epochs=2, learning_rate=0.05)
    sgd(slow, [lambda: mixed(bad, bad, slow, [])] * 2, 0.05)
    assert_moved_alike(model, slow, loaded().model)
    assert any("no retain samples" in note for note in outcome.notes)


def test_batches_are_drawn_from_both_together() -> None:
    plan = MixedPlan({"forget": [1] * 7, "retain": [1] * 21}, 4, 2, seed=0)
    assert plan.steps == 14
    for epoch in (range(7), range(7, 14)):
        seen = [(r, i) for s in epoch for r, own in plan.batch(s).items() for i in own]
        assert sorted(seen) == [("forget", i) for i in range(7)] + [("retain", i) for i in range(21)]
    alone = MixedPlan({"forget": [1], "retain": [1] * 30}, 4, 1, seed=0)
    assert alone.batch(0)["forget"] == [0]
    kinds = {len(plan.batch(s).get("forget", ())) for s in range(14)}
    assert len(kinds) > 1, "no fixed number of forget samples in a batch"
    assert some(RETAIN, 0.01, 0) != [] and some(RETAIN, 1.0, 5) == list(RETAIN)


def test_refuses_what_is_no_share() -> None:
    with pytest.raises(UserError, match=r"retain_share = 0\.0 cannot be"):
        BAD_TEACHER.configure({"retain_share": 0.0})
