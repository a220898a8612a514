"""ReCaLL and Con-ReCall against single passes; what may stand before a sample."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from attack_cases import adapter, exam
from expunge.attacks.context import fits, most_that_fit, placed_after, tail, text_of
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.recall import (
    LOSS_FLOOR,
    ConRecallOptions,
    RecallOptions,
    con_recall,
    con_recall_score,
    drawn,
    recall,
    recall_score,
)
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.text import TextAdapter
from expunge.models.tiny import train_tokenizer
from slow_loss import assert_finds, loss, run
from tiny_text import tiny_dataset, tiny_tokenizer


def shots(pool: list[Sample], sample: Sample, number: int) -> str:
    return " ".join(text_of(s) for s in [s for s in pool if s.subject != sample.subject][:number])


@pytest.mark.parametrize("number", [1, 3])
def test_recall_equals_single_passes(number: int) -> None:
    options = RecallOptions(shots=number, seed=4)
    found, model = run("recall", shots=number, seed=4).scores["recall"], exam().audited.model
    pool = drawn(exam(), exam().aux, options)
    for role in ("forget", "holdout"):
        for sample, score in zip(exam().samples[role], found[role], strict=True):
            after = loss(model, f"{shots(pool, sample, number)} {sample.prompt}", str(sample.target))
            assert score == pytest.approx(after / loss(model, sample.prompt, str(sample.target)), rel=1e-3)


def test_con_recall_equals_single_passes() -> None:
    options = ConRecallOptions(shots=2, gamma=0.3)
    found, model = run("con_recall", shots=2, gamma=0.3).scores["con_recall"], exam().audited.model
    unseen, members = drawn(exam(), exam().aux, options), drawn(exam(), exam().trained, options)
    for role in ("forget", "holdout"):
        for sample, score in zip(exam().samples[role], found[role], strict=True):
            target = str(sample.target)
            non, mem = (loss(model, f"{shots(p, sample, 2)} {sample.prompt}", target) for p in (unseen, members))
            assert score == pytest.approx((non - 0.3 * mem) / loss(model, sample.prompt, target), rel=1e-3)


def test_finds_the_original_and_nothing_in_a_retrain() -> None:
    assert_finds("recall", members=0.8)
    assert_finds("con_recall", members=0.8)


def test_documents_are_judged_by_their_own_tokens_alone() -> None:
    """A document's prefix opens its target; the first token of a document is predicted by nothing when alone."""
    documents = [Sample(id=s.id, subject=s.subject, target=text_of(s)) for s in exam().forget]
    own = Exam(exam().audited, {"forget": documents}, aux=exam().aux)
    found = recall(own, own.audited, RecallOptions(shots=2)).scores["recall"]["forget"]
    pool = drawn(own, own.aux, RecallOptions(shots=2))
    for sample, score in zip(documents, found, strict=True):
        first, rest = str(sample.target).split(" ", 1)
        alone = loss(own.audited.model, first, rest)
        assert score == pytest.approx(
            loss(own.audited.model, f"{shots(pool, sample, 2)} {first}", rest) / alone, rel=1e-3
        )


def test_no_measured_text_and_not_the_own_subject_stands_before_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = [*exam().forget, *exam().holdout, *exam().aux]
    assert {s.id for s in drawn(exam(), crowd, RecallOptions())} == {s.id for s in exam().aux}
    assert drawn(exam(), exam().aux[::-1], RecallOptions()) == drawn(exam(), exam().aux, RecallOptions())
    others = {tuple(s.id for s in drawn(exam(), exam().aux, RecallOptions(seed=k))) for k in range(5)}
    assert len(others) > 1
    subject = exam().forget[0].subject
    twins = [replace(s, id=f"x{i}", subject=subject) for i, s in enumerate(exam().aux)]
    own = replace(exam(), aux=twins, shared={})
    found = recall(own, own.audited, RecallOptions())
    blank = [s.subject == subject for s in own.forget]
    assert [math.isnan(x) for x in found.scores["recall"]["forget"]] == blank and any(blank) and not all(blank)
    assert "none and no score" in found.notes[0]


def test_the_context_bounds_the_number_of_texts() -> None:
    sample, texts = exam().forget[0], [text_of(s) for s in exam().aux]
    lengths = [len(t.split()) for t in texts]
    alone = adapter().num_tokens(sample)
    for room in range(alone, alone + sum(lengths) + 2):
        small = TextAdapter(tokenizer=tiny_tokenizer(), context=room)
        wanted = sum(alone + sum(lengths[:k]) <= room for k in range(1, 5))
        assert most_that_fit(small, sample, texts) == wanted
        assert sample.id not in small.truncated  # only the longer versions were cut
    short = Checkpoint.of(exam().audited.model, TextAdapter(tokenizer=tiny_tokenizer(), context=alone + 12))
    found = recall(exam(), short, RecallOptions())
    assert "fewer than 10 texts" in found.notes[0] and all(x > 0 for x in found.scores["recall"]["forget"])


def test_subword_tokens_stay_the_same() -> None:
    """With byte-level tokens too: all of an answer's, and all but the first of a document's."""
    texts = [*tiny_dataset(people=20).private, Sample(id="d", subject="d", target="Ada's story: she likes red.")]
    own = TextAdapter(tokenizer=train_tokenizer([text_of(s) for s in texts], 200), context=256)
    before = ["Who is it? Bo.", "And who else?"]
    for sample in texts:
        placed = placed_after(sample, before)
        assert fits(own, sample, placed)
        alone, coded = own.cached(sample), own.cached(placed)
        targets = alone.ids[alone.first :]
        assert coded.ids[-len(targets) + 1 :] == targets[1:]
        if sample.prompt:
            assert coded.ids[coded.first :] == targets


def test_tail_counts_equal_tokens_at_the_end() -> None:
    plain = exam().audited.signals(exam().forget[:1])[0]
    for changed in range(len(plain)):
        ids = plain.ids_L.copy()
        ids[changed] += 1
        assert tail(plain, replace(plain, ids_L=ids)) == len(plain) - changed - 1
    assert tail(plain, plain) == len(plain)


def test_a_certain_text_gives_a_finite_score() -> None:
    assert recall_score(0.0, 2.0) == 2.0 / LOSS_FLOOR
    assert con_recall_score(0.0, 2.0, 1.0, 1.0) == 1.0 / LOSS_FLOOR


def test_without_members_or_shots() -> None:
    found = con_recall(replace(exam(), trained=[]), exam().audited, ConRecallOptions())
    assert not found.scores and "no members" in found.notes[0]
    with pytest.raises(UserError, match="at least 1 text"):
        run("recall", shots=0)
    with pytest.raises(UserError, match="gamma"):
        run("con_recall", gamma="nan")
