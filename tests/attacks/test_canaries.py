"""Planted canaries are found, others rank by chance; exposure against its definition and against enumeration."""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import numpy as np
import pytest
from scipy import stats as scipy_stats

import attack_cases
from expunge.attacks.canaries import ExposureOptions, exposure_attack, extrapolated_exposure, skew_normal
from expunge.attacks.candidates import chance_exposure, exposure, mid_rank
from expunge.attacks.exam import Checkpoint, Exam
from expunge.data.canaries import canaries, is_canary, plant
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.models.tiny import init_text
from expunge.training.loop import TrainOptions, fit


@cache
def planted() -> tuple[Exam, Exam]:
    """(the exam of a model that learnt the canaries, the same for one that did not)."""
    data = Dataset(name="empty", roles={"forget": (Sample(id="a", subject="a", prompt="Who is it", target="nobody"),)})
    data, secrets = plant(data, 6, seed=1)
    strangers = canaries(24, seed=1, series="control")
    exams = []
    for texts in (data["forget"], canaries(6, seed=2, series="other")):
        loaded = init_text([*data["forget"], *strangers], preset="tiny-test", seed=0)
        fit(loaded.model, loaded.adapter, list(texts), TrainOptions(epochs=150, batch_size=8, learning_rate=1e-2))
        checkpoint = Checkpoint.of(loaded.model.eval(), loaded.adapter)
        exams.append(Exam(audited=checkpoint, samples={"forget": list(secrets), "holdout": list(strangers)}))
    return exams[0], exams[1]


def test_planted_canaries_have_a_high_exposure_and_others_rank_by_chance() -> None:
    exam, other = planted()
    found = exposure_attack(exam, exam.audited, ExposureOptions())
    most = math.log2(64)
    assert found.figures["exposure.canaries.forget"].value > 0.9 * most
    assert found.figures["exposure.canaries.forget"].n == 6
    assert np.mean(found.scores["exposure.extrapolated"]["forget"]) > most
    ranks = 64 / 2 ** np.array(found.scores["exposure"]["holdout"])
    assert scipy_stats.kstest(ranks / 64, "uniform").pvalue > 0.01
    untrained = exposure_attack(other, other.audited, ExposureOptions())
    assert untrained.figures["exposure.canaries.forget"].value < 3.0
    assert f"{chance_exposure(64):.2f} bits" in found.notes[0]


def test_the_original_of_an_ordinary_dataset_is_exposed_and_a_retrained_model_is_not() -> None:
    exam, retrain = attack_cases.exam(), attack_cases.retrain()
    ours, theirs = (
        exposure_attack(exam, c, ExposureOptions()).scores["exposure"]["forget"] for c in (exam.audited, retrain)
    )
    assert np.mean(ours) > np.mean(theirs) + 0.7


def test_exposure_is_the_definition() -> None:
    assert exposure(1, 1024) == 10
    assert exposure(1024, 1024) == 0
    assert mid_rank(np.array([-1.0, -2.0, -0.5, -1.0, -1.0])) == 3.0
    assert mid_rank(np.array([-1.0, np.nan, -2.0])) == 1.0
    assert math.isnan(mid_rank(np.array([np.nan, 1.0])))
    assert chance_exposure(50) == pytest.approx(np.mean([exposure(r, 50) for r in range(1, 51)]))


def test_skew_normal_has_the_moments_it_was_fitted_to() -> None:
    values = np.random.default_rng(0).gamma(6.0, size=3000)
    shape, place, scale = skew_normal(values)
    mean, variance, skewness = scipy_stats.skewnorm.stats(shape, place, scale, moments="mvs")
    assert mean == pytest.approx(values.mean())
    assert variance == pytest.approx(values.var())
    assert skewness == pytest.approx(scipy_stats.skew(values))
    left = skew_normal(-values)
    assert left == pytest.approx((-shape, -place, scale))
    assert skew_normal(np.ones(30)) == (0.0, 1.0, 0.0)


def test_extrapolation_agrees_with_ranking_in_the_whole_space() -> None:
    """A sample of 200 of 10^5 phrases, whose scores are sums of word scores as those of a language model are."""
    rng = np.random.default_rng(1)
    words = rng.normal(-2.0, 0.7, size=(5, 10))
    everything = np.array([sum(words[i, w] for i, w in enumerate(p)) for p in product(range(10), repeat=5)])
    sampled = rng.choice(everything, 200, replace=False)
    for bits in (2, 6, 10):
        score = np.sort(everything)[-round(len(everything) / 2**bits)]
        whole = exposure(1 + np.sum(everything > score), len(everything))
        assert extrapolated_exposure(np.array([score, *sampled])) == pytest.approx(whole, abs=0.25 + 0.15 * bits)
    assert extrapolated_exposure(np.array([1e6, *sampled])) == 40.0
    assert math.isnan(extrapolated_exposure(np.array([0.0, 1.0, 2.0])))
    assert math.isnan(extrapolated_exposure(np.zeros(30)))


def test_planting() -> None:
    data = Dataset(name="d", roles={"forget": (), "retain": (Sample(id="r", subject="r", target="x"),)})
    first, secrets = plant(data, 3, seed=4)
    again, same = plant(data, 3, seed=4)
    assert secrets == same and first == again and len(first["forget"]) == 3 and first["retain"] == data["retain"]
    assert all(is_canary(s) for s in secrets) and len({s.target for s in secrets}) == 3
    assert plant(data, 5, seed=4)[1][:3] == secrets
    assert plant(data, 3, seed=5)[1][0].target != secrets[0].target
    assert len({p.target for p in secrets[0].probes} | {secrets[0].target}) == 64
    assert all(len(str(s.target).split()) == 6 for s in secrets)
    with pytest.raises(UserError, match="has canaries already"):
        plant(first, 1)


def test_phrases_are_uniform() -> None:
    drawn = [str(s.target).split() for s in canaries(300, seed=9, surrogates=1)]
    for place in range(6):
        counts = np.unique([d[place] for d in drawn], return_counts=True)[1]
        assert len(counts) == 10 and scipy_stats.chisquare(counts).pvalue > 1e-4


def test_mistakes_are_named() -> None:
    exam = attack_cases.exam()
    with pytest.raises(UserError, match="2 different words in phrases of 3 make 8 phrases"):
        canaries(2, words=("a", "b"), length=3)
    with pytest.raises(UserError, match="0 canaries"):
        canaries(0)
    with pytest.raises(UserError, match="classifier dataset"):
        plant(Dataset(name="digits", roles={}, modality="classifier"), 2)
    with pytest.raises(UserError, match="0 candidates"):
        exposure_attack(exam, exam.audited, ExposureOptions(candidates=0))
