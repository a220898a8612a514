"""Translation with a made-up language: words written backwards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attack_cases import audited, exam, retrain
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import get_attack
from expunge.attacks.translation import TranslationOptions, translated, translation
from expunge.errors import UserError


def same(request: str) -> str:
    """A translator between languages that are the same."""
    return request.split("\n\n", 1)[1]


def backwards(request: str) -> str:
    """ "Back" is English written backwards; every other language is English itself."""
    text = same(request)
    return " ".join(w[::-1] for w in text.split()) if "into Back" in request else text


def here(checkpoint: Checkpoint, llm: object = same) -> Exam:
    return replace(audited(checkpoint), llm=llm)  # type: ignore[arg-type]


def test_into_the_same_language_it_is_the_plain_question() -> None:
    own = exam().audited
    found = translation(here(own), own, TranslationOptions(languages="English"))
    assert found.scores["translation"]["forget"] == pytest.approx([-s.loss for s in own.signals(exam().forget)])
    assert np.mean(found.scores["translation.answers"]["forget"]) > 0.8
    assert set(found.details) == {s.id for s in exam().forget} and not found.notes


def test_the_best_language_counts_and_the_answer_is_unchanged() -> None:
    own = exam().audited
    room = here(own, backwards)
    variant = translated(exam().forget[0], "Back", room)
    assert variant is not None and variant.target == exam().forget[0].target
    assert variant.prompt.split() == [w[::-1] for w in exam().forget[0].prompt.split()]
    both, back, plain = (
        np.array(translation(room, own, TranslationOptions(languages=n, answers=False)).scores["translation"]["forget"])
        for n in ("Back,English", "Back", "English")
    )
    assert np.array_equal(both, np.maximum(back, plain)) and back.mean() < plain.mean()


def test_finds_the_original_and_no_more_in_a_retrain_than_in_the_reference() -> None:
    options = TranslationOptions(languages="English")
    means = []
    for checkpoint in (exam().audited, retrain(), exam().references[0]):
        found = translation(here(checkpoint), checkpoint, options).scores
        means.append([np.mean(found[n]["forget"]) for n in ("translation", "translation.answers")])
    own, clean, reference = np.array(means)
    assert (own > clean + np.abs(clean - reference)).all()


def test_each_request_is_made_once_for_all_checkpoints() -> None:
    asked: list[str] = []

    def counting(request: str) -> str:
        asked.append(request)
        return same(request)

    room = here(exam().audited, counting)
    for checkpoint in (exam().audited, exam().references[0]):
        translation(room, checkpoint, TranslationOptions(languages="English", answers=False))
    assert len(asked) == len(set(asked)) == len({s.prompt for s in (*exam().forget, *exam().holdout)})


def test_no_text_is_said_and_something_else_refused() -> None:
    own = exam().audited
    found = translation(here(own, lambda _: " "), own, TranslationOptions(languages="French"))
    count = len(exam().forget) + len(exam().holdout)
    assert np.isnan(found.scores["translation"]["forget"]).all() and f"{count} question(s)" in found.notes[0]
    with pytest.raises(UserError, match="gave a int"):
        translation(here(own, lambda _: 3), own, TranslationOptions())
    with pytest.raises(UserError, match="no language"):
        TranslationOptions(languages=",")
    assert get_attack("translation").missing(exam()) == "needs llm"
