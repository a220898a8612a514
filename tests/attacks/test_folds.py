"""Relearning in two folds: what is measured was not learnt; the original is told from a retrain."""

from __future__ import annotations

import numpy as np

from attack_cases import audited, exam, retrain
from expunge.attacks.curves import CurveOptions
from expunge.attacks.folds import NAME, relearn_folds
from expunge.attacks.relearning import relearn, split
from expunge.signals.forward import collect

OPTIONS = CurveOptions(steps=3, learning_rate=1e-3)


def test_each_sample_is_measured_after_the_other_half_was_learnt() -> None:
    one = exam()
    scores = relearn_folds(one, one.audited, OPTIONS).scores[NAME]
    first, second = split(one.forget, 0.5, one.seed)
    expected = {}
    for learned, measured in ((first, second), (second, first)):
        attacked = relearn(one.audited.model, one.audited.adapter, learned, steps=3, learning_rate=1e-3)
        for sample in measured:
            expected[sample.id] = -collect(attacked, one.audited.adapter, [sample])[0].loss
    assert np.allclose(scores["forget"], [expected[s.id] for s in one.forget], atol=1e-4)
    assert len(scores["holdout"]) == len(one.holdout)
    assert np.isfinite(scores["holdout"]).all()


def test_tells_the_original_from_a_retrain_and_leaves_the_models_alone() -> None:
    one = exam()
    before = [p.detach().clone() for p in one.audited.model.parameters()]
    ours = relearn_folds(one, one.audited, OPTIONS).scores[NAME]["forget"]
    theirs = relearn_folds(audited(retrain()), retrain(), OPTIONS).scores[NAME]["forget"]
    assert np.mean(ours) > np.mean(theirs) + 1
    assert all(bool((a == b).all()) for a, b in zip(before, one.audited.model.parameters(), strict=True))


def test_one_sample_leaves_nothing_to_measure() -> None:
    one = exam()
    single = audited(one.audited)
    single.samples = {**one.samples, "forget": one.forget[:1]}
    found = relearn_folds(single, single.audited, OPTIONS)
    assert not found.scores
    assert "two different" in found.notes[0]
