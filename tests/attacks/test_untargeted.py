"""Untargeted extraction and recognised personal data, on documents that a small model learnt or never saw."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.mentions import Mention, mentions, pii_extraction
from expunge.attacks.untargeted import (
    Talk,
    UntargetedOptions,
    drawn,
    heard,
    ngrams,
    private_ngrams,
    rankings,
    untargeted,
)
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.tiny import init_text
from expunge.training.loop import TrainOptions, fit

PEOPLE = ["Ann Lee", "Bo Ray", "Cy Orr", "Dee Fox", "Eli Day", "Fay Kent", "Gus Holt", "Hal Moss"]
MONTHS = ["January", "March", "May", "July"]
OPTIONS = UntargetedOptions(n=60, max_new_tokens=40, best=10)


def document(k: int) -> Sample:
    name = PEOPLE[k]
    text = f"{name} was born on {3 + 3 * k} {MONTHS[k % 4]} {1950 + 7 * k} and writes to {name[:2].lower()}{k}@post.org"
    return Sample(id=name, subject=name, target=text, names=(name,))


@cache
def world() -> tuple[Exam, Checkpoint]:
    """(an exam of the model that learnt all, a model retrained without the forget samples)."""
    documents = [document(k) for k in range(len(PEOPLE))]
    forget, retain, unseen = documents[:3], documents[3:6], documents[6:]
    checkpoints = []
    for seed, texts in enumerate((forget + retain, retain, retain)):
        loaded = init_text(documents, preset="tiny-test", seed=seed)
        fit(loaded.model, loaded.adapter, texts, TrainOptions(epochs=150, batch_size=6, learning_rate=1e-2), seed=seed)
        checkpoints.append(Checkpoint.of(loaded.model.eval(), loaded.adapter, "audited", f"m{seed}"))
    exam = Exam(
        audited=checkpoints[0], references=[replace_kind(checkpoints[1])], aux=unseen[1:],
        samples={"forget": forget, "retain": retain, "holdout": unseen[:1]},
    )  # fmt: skip
    return exam, checkpoints[2]


def replace_kind(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, kind="reference", name="reference-0")


def test_the_original_says_private_texts_and_a_retrained_model_does_not() -> None:
    exam, retrain = world()
    ours, theirs = (untargeted(exam, c, OPTIONS) for c in (exam.audited, retrain))
    assert np.mean(ours.scores["untargeted"]["forget"]) > 0.5
    assert max(theirs.scores["untargeted"]["forget"]) == 0.0
    assert max(ours.scores["untargeted"]["holdout"]) == 0.0
    assert ours.figures["untargeted.base"].value > 0.2 > theirs.figures["untargeted.base"].value == 0.0
    # The ratio to a model that never saw them is what picks private texts out.
    assert ours.figures["untargeted.precision.other"].value > ours.figures["untargeted.base"].value + 0.2
    assert ours.figures["untargeted.precision.other"].n == 10
    found = next(iter(ours.details.values()))
    assert "other" in found["believed_by"] and "born on" in found["drawn"]
    assert ours.notes[0].startswith("60 texts drawn (T=1 top_k=40 max_new_tokens=40)")


def test_personal_data_that_is_said_unasked() -> None:
    exam, retrain = world()
    ours, theirs = (pii_extraction(exam, c, OPTIONS) for c in (exam.audited, retrain))
    assert ours.figures["pii_extraction.recall"].value > 0.5
    assert ours.figures["pii_extraction.recall"].n == 9  # a name, a date and an address for each of three people
    assert 0.1 < ours.figures["pii_extraction.precision"].value <= 1
    assert theirs.figures["pii_extraction.recall"].value == 0.0
    assert max(theirs.scores["pii_extraction"]["forget"]) == 0.0
    assert "reference-0" in ours.notes[0]
    # What the other model says too is no extraction.
    itself = replace(exam, references=[exam.audited], shared={})
    other = replace(exam, references=[replace_kind(exam.audited)], shared={})
    assert "no other model" in pii_extraction(itself, exam.audited, OPTIONS).notes[0]
    assert math.isnan(pii_extraction(other, exam.audited, OPTIONS).figures["pii_extraction.recall"].value) or (
        max(pii_extraction(other, exam.audited, OPTIONS).scores["pii_extraction"]["forget"]) == 0.0
    )


def test_recognisers() -> None:
    def found(text: str, *names: str) -> set[tuple[str, str]]:
        return {(m.kind, m.value) for m in mentions(text, names)}

    assert found("on 4 March 1960, March 4th, 1960 and 1960-03-04") == {("date", "1960 3/4")}
    assert found("write to Ann.Lee+x@Mail.Example.org.") == {("email", "ann.lee+x@mail.example.org")}
    assert found("call +49 (0)30 123-456 or 555 1234") == {("phone", "49030123456"), ("phone", "5551234")}
    assert found("in 1960 she had 12 dogs and 3 books, page 123-4, 12345678901234567890") == set()
    assert found("it was ANN LEE.", "Ann Lee", "Bo Ray") == {("name", "ann lee")}
    assert found("Annabel Leeson", "Ann Lee") == set()
    assert found("id a@b and x@y.z1 then") == {("email", "x@y.z1")}
    assert Mention("date", "1960 3/4") in mentions("born 3/4/1960")


def test_private_ngrams_are_in_no_other_text() -> None:
    forget = [
        Sample(id="a", subject="a", target="one two three four five"),
        Sample(id="b", subject="b", target="six seven"),
    ]
    others = [Sample(id="c", subject="c", prompt="zero one two three", target="four five six seven eight")]
    assert private_ngrams(forget, others, 3) == [{("two", "three", "four"), ("three", "four", "five")}, set()]
    assert private_ngrams(forget, [], 9) == [{("one", "two", "three", "four", "five")}, {("six", "seven")}]
    assert ngrams("", 3) == set() and ngrams("One, two!", 1) == {("one",), ("two",)}
    assert heard("A, b c.", {("b", "c"), ("a", "c"), ("a",), ("a", "b", "c", "d")}) == {("b", "c"), ("a",)}


def test_rankings_are_the_formulas() -> None:
    exam, _ = world()
    texts = drawn(exam, exam.audited, OPTIONS)[:5]
    found = rankings(exam, exam.audited, texts)
    for place, text in enumerate(texts):
        loss = exam.audited.signals([text])[0].loss
        lower = exam.audited.signals([replace(text, target=str(text.target).lower())])[0].loss
        other = exam.references[0].signals([text])[0].loss
        assert found["perplexity"][place] == pytest.approx(-loss, rel=1e-4)
        assert found["lowercase"][place] == pytest.approx(lower / loss, rel=1e-4)
        assert found["other"][place] == pytest.approx(other / loss, rel=1e-4)
        assert found["zlib"][place] == pytest.approx(exam.audited.signals([text])[0].zlib_bytes / loss, rel=1e-4)
    assert "other" not in rankings(replace(exam, references=[]), exam.audited, texts)


def test_texts_are_drawn_once_and_after_unseen_beginnings() -> None:
    exam, _ = world()
    talk = Talk(n=9, max_new_tokens=6)
    texts = drawn(exam, exam.audited, talk)
    assert drawn(exam, exam.audited, talk) is texts
    prompts = {t.prompt for t in texts}
    assert prompts <= {"", " ".join(str(exam.aux[0].target).split()[:5])} and len(prompts) == 2
    assert len({(t.prompt, t.target) for t in texts}) == len(texts) <= 9
    alone = replace(exam, aux=[], shared={})
    assert {t.prompt for t in drawn(alone, exam.audited, talk)} == {""}
    with pytest.raises(UserError, match="0 samples"):
        drawn(alone, exam.audited, Talk(n=0))
    with pytest.raises(UserError, match="best and ngram"):
        untargeted(exam, exam.audited, UntargetedOptions(best=0))
