"""Relearning curves: measured on what was not learnt, equal to training anew for each length, high for the original."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.attacks.hiding import hiding
from tests.matrix.worlds import world

from attack_cases import audited, exam, retrain
from expunge.attacks.curves import (
    CurveOptions,
    area,
    curve,
    marks,
    relearn_forget,
    relearn_syntactic,
    relearn_topical,
    relearn_unrelated,
)
from expunge.attacks.exam import Checkpoint
from expunge.attacks.registry import Finding, get_attack
from expunge.attacks.relearning import relearn
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.options import configure
from expunge.signals.forward import collect

ATTACKS = {
    "relearn-forget": relearn_forget,
    "relearn-topical": relearn_topical,
    "relearn-syntactic": relearn_syntactic,
    "relearn-unrelated": relearn_unrelated,
}
NAMES = list(ATTACKS)
SHORT = {"steps": 10, "learning_rate": 2e-3, "share": 0.34, "samples": 8}


def attacked(name: str, checkpoint: Checkpoint, **values: object) -> Finding:
    return ATTACKS[name](audited(checkpoint), checkpoint, configure(CurveOptions, SHORT | values, "option"))


def mean(finding: Finding, name: str) -> float:
    return float(np.nanmean(finding.scores[name]["forget"]))


@pytest.mark.parametrize("name", NAMES)
def test_the_original_stands_out_from_an_exact_retrain(name: str) -> None:
    own, clean, reference = (attacked(name, c) for c in (exam().audited, retrain(), exam().references[0]))
    for score in (name, f"{name}.area"):
        # Two retrained models differ by chance; the original differs from them by several times as much.
        assert mean(own, score) > mean(clean, score) + 3 * abs(mean(clean, score) - mean(reference, score))
    assert set(own.scores[name]) == {"forget", "holdout"}
    assert len(own.scores[name]["holdout"]) == len(exam().holdout)


def test_what_is_only_hidden_comes_back() -> None:
    hidden, *clean = (attacked("relearn-topical", c) for c in (hiding(), retrain(), exam().references[0]))
    start = [f.figures["relearn-topical.step_0"].value for f in (hidden, *clean)]
    assert start[0] < max(start[1:])  # before the attack it looks as clean as those that were retrained
    for score in ("relearn-topical", "relearn-topical.area"):
        assert mean(hidden, score) > max(mean(f, score) for f in clean) + 0.3


def test_held_in_samples_have_no_score_and_the_same_are_held_in_everywhere() -> None:
    first, second = (attacked("relearn-forget", c, steps=1) for c in (exam().audited, retrain()))
    missing = [np.isnan(f.scores["relearn-forget"]["forget"]).tolist() for f in (first, second)]
    assert missing[0] == missing[1] and sum(missing[0]) == round(0.34 * len(exam().forget))
    assert np.isnan(first.scores["relearn-forget.area"]["forget"]).tolist() == missing[0]
    assert not np.isnan(first.scores["relearn-forget"]["holdout"]).any()


def test_one_training_equals_a_training_for_each_length() -> None:
    checkpoint = exam().references[0]
    learned, measured = exam().forget[:2], exam().forget[2:]
    options = CurveOptions(steps=5, learning_rate=2e-3)
    values_SN, own = curve(checkpoint.model, checkpoint, learned, measured, options, exam())
    assert values_SN.shape == (4, len(measured))
    assert values_SN[0] == pytest.approx([-s.loss for s in checkpoint.signals(measured)])
    for row, steps in zip(values_SN[1:], (1, 2, 5), strict=True):
        slow = relearn(checkpoint.model, checkpoint.adapter, learned, steps=steps, learning_rate=2e-3)
        assert row == pytest.approx([-s.loss for s in collect(slow, checkpoint.adapter, measured)], abs=1e-5)
    assert own == pytest.approx(-np.mean([s.loss for s in collect(slow, checkpoint.adapter, learned)]), abs=1e-5)


def test_figures_are_the_means_of_the_curve() -> None:
    finding = attacked("relearn-topical", exam().audited)
    figures = finding.figures
    steps = [f"relearn-topical.step_{k}" for k in (0, 1, 2, 5, 10)]
    assert set(figures) == {*steps, "relearn-topical.learnt"}
    assert figures[steps[-1]].value == pytest.approx(mean(finding, "relearn-topical"))
    assert figures[steps[-1]].n == len(exam().forget)
    assert figures[steps[0]].value == pytest.approx(-np.mean([s.loss for s in exam().audited.signals(exam().forget)]))
    assert "8 samples were learnt for 10 steps, 6 forget samples measured" in finding.notes[0]


def test_area_is_the_mean_height() -> None:
    flat = np.full((3, 2), -1.5)
    assert area(flat, [0, 1, 10]) == pytest.approx([-1.5, -1.5])
    # A line in log(1 + step) has its middle as mean height, whatever the marks.
    steps = [0, 1, 2, 5, 10, 20, 50]
    line = np.log1p(steps)[:, None] / math.log(51)
    assert area(line, steps) == pytest.approx([0.5])
    # Linear: the difference of the areas is the area of the difference.
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 4))
    assert area(a, steps) - area(b, steps) == pytest.approx(area(a - b, steps))


def test_marks() -> None:
    assert marks(1) == [1] and marks(50) == [1, 2, 5, 10, 20, 50] and marks(120) == [1, 2, 5, 10, 20, 50, 100, 120]


def test_the_model_is_not_touched() -> None:
    before = copy.deepcopy(exam().audited.model.state_dict())
    attacked("relearn-unrelated", exam().audited, steps=2)
    assert all(torch.equal(before[n], t) for n, t in exam().audited.model.state_dict().items())


def test_without_anything_to_learn_it_says_so() -> None:
    lone = replace(exam(), samples={"forget": exam().forget[:1]}, aux=[], trained=[], shared={})
    for name, words in zip(NAMES[:3], ["two different", "retain or aux", "retain or aux"], strict=True):
        finding = ATTACKS[name](lone, lone.audited, CurveOptions())
        assert not finding.scores and words in finding.notes[0]
    assert get_attack("relearn-unrelated").missing(lone) == "needs utility"


def test_classifiers_relearn_too() -> None:
    images = world("resnet")
    checkpoint = Checkpoint.of(images.original, images.adapter)
    samples: list[Sample] = list(images.forget)
    roles = {"forget": samples, "holdout": list(images.unseen)}
    here = replace(exam(), audited=checkpoint, samples=roles, original=None, references=(), shadows=(), shared={})
    entry = get_attack("relearn-forget")
    assert entry.missing(here) is None and "not on a classifier" in str(get_attack("relearn-topical").missing(here))
    scores = entry.run(here, checkpoint, entry.configure({"steps": 2})).scores["relearn-forget"]
    assert np.isfinite(scores["holdout"]).all() and 0 < np.isfinite(scores["forget"]).sum() < len(samples)


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match="1 or more each"):
        CurveOptions(steps=0)
    with pytest.raises(UserError, match="above 0"):
        CurveOptions(learning_rate=-1.0)
