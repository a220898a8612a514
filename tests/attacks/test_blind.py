"""The blind baseline: flags a shifted split, stays at one half on a fair one, never mixes a subject's texts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from attack_cases import audited, exam, retrain
from expunge.attacks import blind
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, get_attack
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.stats import Estimate, auc

QUICK = blind.BlindOptions(trees=15)
WORDS = [f"word{i}" for i in range(12)]


def crowd(name: str, subjects: int, seed: int, extra: str = "", each: int = 2, length: int = 6) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        Sample(
            id=f"{name}{i}/{j}", subject=f"{name}{i}", prompt="say", target=" ".join(rng.choice(WORDS, length)) + extra
        )
        for i in range(subjects)
        for j in range(each)
    ]


def look(forget: list[Sample], holdout: list[Sample], options: blind.BlindOptions = QUICK) -> Finding:
    base = exam()
    one = Exam(audited=base.audited, samples={"forget": forget, "holdout": holdout})
    return get_attack("blind").run(one, base.audited, options)


def test_a_shifted_split_is_flagged() -> None:
    finding = look(crowd("f", 25, 1, " in 2019"), crowd("h", 25, 2, " in 2024"))
    assert finding.figures["blind.words_auc"].low > 0.8 and not finding.scores
    assert any("split unfit" in note and "words" in note for note in finding.notes)
    assert "split unfit" in finding.figures["blind.words_auc"].record()["note"]
    # The lengths are the same on both sides but for the random words.
    assert not any("length alone" in note for note in finding.notes)


@pytest.mark.parametrize(("forget", "holdout"), [(4, 9), (9, 4)])
def test_a_difference_in_length_is_flagged_in_both_directions(forget: int, holdout: int) -> None:
    finding = look(crowd("f", 25, 1, length=forget), crowd("h", 25, 2, length=holdout))
    assert any("length alone" in note for note in finding.notes)
    expected = auc([forget], [holdout])
    assert abs(finding.figures["blind.length_auc"].value - expected) < 0.05


def test_a_fair_split_stays_at_one_half() -> None:
    """Pooled answers of folds with different shares lie far below one half when nothing can be learnt; ranks do not."""
    values, flags = [], 0
    for seed in range(12):
        finding = look(crowd("f", 11, 2 * seed, each=1 + seed % 3), crowd("h", 24, 2 * seed + 1))
        values.append(finding.figures["blind.words_auc"].value)
        flags += any("words" in note for note in finding.notes)
    assert abs(np.mean(values) - 0.5) < 0.07
    assert flags <= 1


def test_a_subject_is_never_in_two_folds() -> None:
    """Each subject has a word of its own in all its texts: without grouping the forest would know them by it."""
    texts, labels, subjects = [], [], []
    for subject in range(8):
        for _ in range(12):
            texts.append(f"name{subject} word")
            labels.append(subject % 2)
            subjects.append(f"s{subject}")
    scores = blind.out_of_fold(texts, labels, subjects, replace(QUICK, share=0.01, trees=40), 0)
    label = np.array(labels)
    assert auc(scores[label == 1], scores[label == 0]) < 0.65
    alone = blind.out_of_fold(
        texts, labels, [str(i) for i in range(len(texts))], replace(QUICK, share=0.01, trees=40), 0
    )
    assert auc(alone[label == 1], alone[label == 0]) > 0.8


def test_the_same_for_every_checkpoint_and_computed_once() -> None:
    attack, here = get_attack("blind"), audited(retrain())
    first = attack.run(here, here.audited, attack.options())
    assert attack.run(here, here.references[0], attack.options()) is first
    assert not any("split unfit" in note for note in first.notes)
    never = Checkpoint("none", "audited", here.audited.adapter, lambda: pytest.fail("the model was loaded"))
    assert attack.run(replace(here, audited=never, shared={}), never, attack.options()).figures.keys() == {
        "blind.words_auc", "blind.length_auc",
    }  # fmt: skip


def test_too_few_texts_claim_nothing() -> None:
    single = look(crowd("f", 1, 1, each=6), crowd("h", 8, 2))
    assert math.isnan(single.figures["blind.words_auc"].value) and any("single subject" in n for n in single.notes)
    small = look(crowd("f", 3, 1), crowd("h", 3, 2)).figures["blind.words_auc"]
    assert small.value == 0.5 and math.isnan(small.low) and small.note == "the same for every text"
    numbers = [replace(s, prompt="", target=str(i)) for i, s in enumerate(crowd("f", 12, 1))]
    others = [replace(s, prompt="", target=str(i)) for i, s in enumerate(crowd("h", 12, 1))]
    assert look(numbers, others).figures["blind.words_auc"].value == 0.5  # no word in 5 % of the texts


def test_the_margin() -> None:
    clear, near = Estimate(0.8, 0.58, 0.9, 50), Estimate(0.7, 0.52, 0.9, 50)
    assert blind.unfit(clear, 0.05, False) and not blind.unfit(near, 0.05, False) and blind.unfit(near, 0.0, False)
    below = Estimate(0.2, 0.1, 0.4, 50)
    assert blind.unfit(below, 0.05, True) and not blind.unfit(below, 0.05, False)
    assert not blind.unfit(Estimate(math.nan), 0.05, True)
    for wrong, words in (({"folds": 1}, "at least 2"), ({"margin": 0.5}, "margin")):
        with pytest.raises(UserError, match=words):
            get_attack("blind").configure(wrong)
