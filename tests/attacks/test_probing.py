"""Probes: ridge against scikit-learn, controls, and what they read in a model that knows and one that does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as Slow
from sklearn.model_selection import LeaveOneOut

import attack_cases
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.probing import (
    ProbeOptions,
    fact_probe,
    fit_ridge,
    folds_by,
    held_out,
    membership_probe,
    one_hot,
    pooled,
    reciprocal_rank,
    shuffled_within,
    token_rows,
)
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import evaluating
from expunge.stats import auc
from expunge.training.loop import TrainOptions, fit
from tiny_text import tiny_dataset, tiny_model

RNG = np.random.default_rng(0)


@cache
def crowd() -> tuple[Exam, Checkpoint]:
    """More people than the common exam has: 12 to forget, 30 retained, 22 never seen; and a retrain."""
    data = tiny_dataset(people=42, forget=12, holdout=22)
    made = []
    for seed, samples in enumerate((data.private, data["retain"])):
        model = tiny_model(seed, width=48)
        options = TrainOptions(epochs=80, batch_size=12, learning_rate=1e-2)
        fit(model, attack_cases.adapter(), list(samples), options, seed=seed)
        made.append(Checkpoint.of(model.eval(), attack_cases.adapter()))
    exam = Exam(
        audited=made[0],
        samples={
            "forget": list(data["forget"]),
            "retain": list(data["retain"][:20]),
            "holdout": list(data["holdout"][:22]),
        },
        aux=list(data["holdout"][22:]),
        trained=list(data["retain"][20:]),
    )
    return exam, made[1]


def slow_scores(x: np.ndarray, y: np.ndarray, new: np.ndarray, penalties: tuple[float, ...]) -> np.ndarray:
    """scikit-learn's ridge on standardised states, the penalty by really leaving each row out."""
    spread = x.std(0)
    z, other = (x - x.mean(0)) / spread, (new - x.mean(0)) / spread
    errors = []
    for penalty in penalties:
        total = 0.0
        for kept, out in LeaveOneOut().split(z):
            total += float(((y[out] - Slow(alpha=penalty).fit(z[kept], y[kept]).predict(z[out])) ** 2).sum())
        errors.append(total)
    best = penalties[int(np.argmin(errors))]
    return np.asarray(Slow(alpha=best).fit(z, y).predict(other))


@pytest.mark.parametrize("width", [5, 40])  # fewer and more columns than rows
def test_ridge_equals_scikit_learn_with_real_leave_one_out(width: int) -> None:
    x, new = RNG.normal(size=(24, width)), RNG.normal(size=(6, width))
    y = one_hot((x[:, 0] + 0.5 * RNG.normal(size=24) > 0).astype(np.int64), np.array([0, 1]))
    penalties = (0.1, 1.0, 10.0, 100.0)
    np.testing.assert_allclose(fit_ridge(x, y, penalties).scores(new), slow_scores(x, y, new, penalties), atol=1e-8)


def test_ridge_survives_constant_columns_and_a_single_class() -> None:
    x = np.hstack([RNG.normal(size=(10, 2)), np.ones((10, 1))])
    scores = fit_ridge(x, np.ones((10, 1))).scores(x)
    np.testing.assert_allclose(scores, 1.0)


def test_held_out_scores_never_saw_their_subject() -> None:
    """Labels that are noise: in-sample they are fitted, out of fold they cannot be."""
    x, label = RNG.normal(size=(60, 50)), RNG.integers(0, 2, 60)
    fold = folds_by(np.arange(60), [f"s{i // 2}" for i in range(60)])
    assert all(fold[2 * i] == fold[2 * i + 1] for i in range(30))
    y = label[:, None].astype(float)
    inside = fit_ridge(x, y, (1e-2,)).scores(x)[:, 0]
    outside = held_out(x, y, fold)[:, 0]
    assert auc(inside[label == 1], inside[label == 0]) > 0.95
    assert abs(auc(outside[label == 1], outside[label == 0]) - 0.5) < 0.25


def test_reciprocal_rank() -> None:
    scores = np.array([[0.1, 0.9, 0.5], [1.0, 1.0, 0.0]])
    np.testing.assert_allclose(reciprocal_rank(scores, np.array([2, 0])), [1 / 2, 1 / 1.5])


def test_control_labels_keep_the_values_of_each_slot() -> None:
    label, context = RNG.integers(0, 5, 200), RNG.integers(0, 3, 200)
    mixed = shuffled_within(label, context, np.random.default_rng(1))
    for slot in range(3):
        assert sorted(mixed[context == slot]) == sorted(label[context == slot])
    assert (mixed != label).mean() > 0.5


def test_rows_are_the_states_that_predict_the_facts() -> None:
    exam, _ = crowd()
    samples = exam.forget[:5]
    rows = token_rows(exam.audited, samples)
    adapter, model = exam.audited.adapter, exam.audited.model
    words = [str(samples[i].target).split()[-1] for i in rows.sample_N]
    assert [adapter.tokenizer.decode([i]) for i in rows.label_N] == words  # type: ignore[attr-defined]
    # The last block's states through norm and head are the model's own prediction at that place.
    signals = {s.id: s for s in exam.audited.signals(samples)}
    with evaluating(model):
        logits = model.lm_head(model.model.norm(torch.tensor(rows.states[-1]).float()))  # type: ignore[union-attr, operator]
        log_p = logits.log_softmax(-1)
    for row, (label, index) in enumerate(zip(rows.label_N, rows.sample_N, strict=True)):
        own = signals[samples[index].id]
        place = int(np.flatnonzero(own.ids_L == label)[0])
        assert float(log_p[row, label]) == pytest.approx(float(own.log_prob_L[place]), abs=1e-4)


def test_pooled_states_are_means_over_the_answer() -> None:
    exam, _ = crowd()
    alone = np.concatenate([pooled(exam.audited, [s])[1] for s in exam.forget[:4]])
    np.testing.assert_allclose(pooled(exam.audited, exam.forget[:4])[1], alone, atol=1e-5)


def test_facts_are_read_where_they_are_known() -> None:
    exam, other = crowd()
    found, gone = (fact_probe(exam, c, ProbeOptions()) for c in (exam.audited, other))
    reads = [np.nanmean(f.scores["fact-probe"]["forget"]) for f in (found, gone)]
    assert reads[0] > reads[1] + 0.25
    assert found.figures["fact-probe.selectivity"].low > 0.2  # above what shuffled labels give
    assert gone.figures["fact-probe.selectivity"].value < 0.2
    # In a retrain forgotten people are read no better than people who were never there.
    scores = gone.scores["fact-probe"]
    assert auc(scores["forget"], scores["holdout"]) < 0.65
    assert found.figures["fact-probe.covered"].value == 1.0


def test_membership_of_kinds_that_differ_is_read() -> None:
    """Members asked about colours, the others about towns: a difference that any linear probe must find."""
    exam, _ = crowd()

    def kind(samples: Sequence[Sample], word: str) -> list[Sample]:
        return [s for s in samples if s.id.endswith(word)]

    planted = replace(
        exam,
        samples={"forget": kind(exam.forget, "colour"), "holdout": kind(exam.holdout, "town")},
        aux=kind(exam.aux, "town"),
        trained=kind(exam.trained, "colour"),
    )
    found = membership_probe(planted, exam.audited, ProbeOptions())
    assert auc(found.scores["membership-probe"]["forget"], found.scores["membership-probe"]["holdout"]) == 1.0
    assert found.figures["membership-probe.known_auc"].low > 0.6
    assert abs(found.figures["membership-probe.control_auc"].value - 0.5) < 0.25
    assert not any("no evidence" in note for note in found.notes)


def test_membership_probe_finds_nothing_in_a_retrain_and_says_when_it_knows_nothing() -> None:
    exam, other = crowd()
    gone = membership_probe(exam, other, ProbeOptions())
    assert auc(gone.scores["membership-probe"]["forget"], gone.scores["membership-probe"]["holdout"]) < 0.65
    known = gone.figures["membership-probe.known_auc"]
    assert known.low < known.value < known.high
    assert any("no evidence" in n for n in gone.notes) == (not known.low > 0.5)


def test_small_worlds_and_wrong_options_are_told() -> None:
    exam, _ = crowd()
    few = Exam(audited=exam.audited, samples={"forget": exam.forget}, aux=exam.aux[:2], trained=exam.trained[:1])
    for probe in (fact_probe, membership_probe):
        found = probe(few, few.audited, ProbeOptions())
        assert not found.scores and "not measured" in found.notes[0]
        with pytest.raises(UserError, match="at least 1"):
            probe(exam, exam.audited, ProbeOptions(limit=0))
