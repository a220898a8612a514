"""Repetition against single passes."""

from __future__ import annotations

import math

import pytest

from attack_cases import exam
from expunge.attacks.context import text_of
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import get_attack
from expunge.attacks.repetition import RepetitionOptions, gains
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.text import TextAdapter
from slow_loss import assert_finds, loss, run
from tiny_text import tiny_tokenizer


def test_equals_single_passes() -> None:
    found, model = run("repetition", times=3).scores, exam().audited.model
    for name, before in (("repetition", 1), ("repetition.3", 2)):
        for role in ("forget", "holdout"):
            for sample, score in zip(exam().samples[role], found[name][role], strict=True):
                again = " ".join([text_of(sample)] * before)
                later = loss(model, f"{again} {sample.prompt}", str(sample.target))
                assert score == pytest.approx(later - loss(model, sample.prompt, str(sample.target)), abs=1e-4)


def test_a_document_is_compared_over_the_same_tokens() -> None:
    document = Sample(id="d", subject="d", target=text_of(exam().forget[0]))
    first, rest = str(document.target).split(" ", 1)
    model = exam().audited.model
    later = loss(model, f"{document.target} {first}", rest)
    assert gains(exam().audited, [document], 1) == [pytest.approx(later - loss(model, first, rest), abs=1e-4)]


def test_finds_the_original_and_nothing_in_a_retrain() -> None:
    """A world this small hardly reads its context, so the score says little between texts, and more between models."""
    assert_finds("repetition", members=0.5, over_retrain=0.8)


def test_what_does_not_fit_has_no_score() -> None:
    short = Checkpoint.of(exam().audited.model, TextAdapter(tokenizer=tiny_tokenizer(), context=22))
    entry = get_attack("repetition")
    found = entry.run(Exam(short, {"forget": exam().forget}), short, RepetitionOptions(times=3))
    sizes = [short.adapter.num_tokens(s) for s in exam().forget]  # with the end mark
    assert [math.isnan(x) for x in found.scores["repetition"]["forget"]] == [2 * n - 1 > 22 for n in sizes]
    assert [math.isnan(x) for x in found.scores["repetition.3"]["forget"]] == [True] * len(sizes)
    assert "do not fit" in found.notes[0]
    with pytest.raises(UserError, match="at least 2"):
        run("repetition", times=1)
