"""SaMIA against a slow loop over its own samples."""

from __future__ import annotations

import math
import zlib
from collections import Counter

import pytest

from attack_cases import adapter, exam
from expunge.attacks.exam import Exam
from expunge.attacks.samia import SamiaOptions, halved, overlap, overlaps, samia
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.sampling import sample_ids
from slow_loss import assert_finds, run


def recall(truth: list[str], text: list[str]) -> float:
    """Share of the true words that the text has, each counted as often as it stands there."""
    left, hits = Counter(text), 0
    for word in truth:
        if left[word] > 0:
            left[word] -= 1
            hits += 1
    return hits / len(truth)


def test_every_text_is_averaged_over_its_own_samples() -> None:
    options = SamiaOptions(n=4, top_k=5)
    samples = [*exam().forget, *exam().holdout]
    found = overlaps(exam().audited, samples, options)
    own = adapter()
    for sample, (plain, weighted) in zip(samples, found, strict=True):
        words = str(sample.target).split()
        half = len(words) // 2
        given = own.tokenizer(f"{sample.prompt} {' '.join(words[:half])}")["input_ids"]
        truth = words[half:]
        drawn = sample_ids(exam().audited.model, own, [sample], [given], [len(truth)], n=4, top_k=5)[0]
        texts = [[own.tokenizer.decode([i]) for i in ids] for ids in drawn]
        shares = [recall(truth, t) for t in texts]
        sizes = [len(zlib.compress(" ".join(t).encode())) / len(zlib.compress(" ".join(truth).encode())) for t in texts]
        assert plain == pytest.approx(sum(shares) / 4)
        assert weighted == pytest.approx(sum(a * b for a, b in zip(shares, sizes, strict=True)) / 4)
    assert len({p for p, _ in found}) > 3
    assert overlaps(exam().audited, samples[::-1], options) == found[::-1]


def test_finds_the_original_and_nothing_in_a_retrain() -> None:
    assert_finds("samia", members=0.7)
    assert_finds("samia", "samia.zlib", members=0.7)


def test_a_perfect_copy_has_one_and_repetition_is_worth_less() -> None:
    assert overlap("red green blue", ["red green blue"]) == (1.0, 1.0)
    plain, weighted = overlap("red green blue", ["red red red", "blue red pink"])
    assert plain == pytest.approx((1 / 3 + 2 / 3) / 2) and weighted < plain
    assert overlap("red", [""]) == (0.0, 0.0)
    assert all(math.isnan(x) for x in overlap("...", ["red"]))


def test_what_the_model_is_given() -> None:
    own, words = adapter(), str(exam().forget[0].target).split()
    given, rest = halved(own, exam().forget[0], 0.5)
    assert own.tokenizer.decode(given) == f"{exam().forget[0].prompt} {' '.join(words[:2])}"
    assert own.tokenizer.decode(rest) == " ".join(words[2:])  # without the end mark
    document = Sample(id="d", subject="d", target="ada ash likes red blue")
    given, rest = halved(own, document, 0.5)
    assert (own.tokenizer.decode(given), own.tokenizer.decode(rest)) == ("ada ash likes", "red blue")
    assert halved(own, exam().forget[0], 0.0)[0] == list(own.cached(exam().forget[0]).prompt)


def test_no_word_left_no_score() -> None:
    one = Sample(id="o", subject="o", target="ada")  # a document's only word is what it starts from
    own = Exam(exam().audited, {"forget": [one, *exam().forget]})
    found = samia(own, own.audited, SamiaOptions(n=2))
    assert [math.isnan(x) for x in found.scores["samia"]["forget"]] == [True] + [False] * len(exam().forget)
    assert "1 text(s)" in found.notes[1]
    with pytest.raises(UserError, match="share"):
        run("samia", share=1.0)
