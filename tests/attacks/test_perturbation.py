"""PAC, the neighbourhood attack and its word model against slow references."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attack_cases import exam, retrain
from expunge.attacks.cloze import EDGE, MIX, Cloze, Swap, bare_word, replaced
from expunge.attacks.exam import Exam
from expunge.attacks.perturbation import PacOptions, pac, polarized_distance, swapped, swapped_versions
from expunge.data.samples import Sample
from expunge.errors import UserError
from slow_loss import assert_finds, log_probs, loss, run

TEXTS = ["the cat sat on the mat", "the dog sat on a log.", "A cat likes the dog"]


# -- PAC -----------------------------------------------------------------------------------------------------------


def slow_distance(values: list[float], top: float = 0.05, bottom: float = 0.3) -> float:
    order = sorted(values)
    high = order[-max(1, math.floor(len(order) * top)) :]
    low = order[: max(1, math.floor(len(order) * bottom))]
    return sum(high) / len(high) - sum(low) / len(low)


def test_pac_equals_single_passes() -> None:
    found, model = run("pac").scores["pac"], exam().audited.model
    for role in ("forget", "holdout"):
        for sample, score in zip(exam().samples[role], found[role], strict=True):
            rng, words = exam().rng("pac", 0, sample.digest()), str(sample.target).split()
            versions = [" ".join(swapped(words, 0.3, rng)) for _ in range(10)]
            far = [slow_distance(log_probs(model, sample.prompt, v)) for v in versions]
            own = slow_distance(log_probs(model, sample.prompt, str(sample.target)))
            assert score == pytest.approx(sum(far) / 10 - own, rel=1e-3)


@given(st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=60))
def test_polarized_distance_of_any_length(values: list[float]) -> None:
    one = exam().audited.signals(exam().forget[:1])[0]
    found = polarized_distance(replace(one, log_prob_L=np.array(values, dtype=np.float32)))
    assert found == pytest.approx(slow_distance(values), rel=1e-5, abs=1e-5)


def test_pac_finds_the_original_and_nothing_in_a_retrain() -> None:
    assert_finds("pac", members=0.8)


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=30), st.floats(0.01, 1), st.integers(0, 99))
def test_swaps_keep_the_words(words: list[str], alpha: float, seed: int) -> None:
    found = swapped(words, alpha, np.random.default_rng(seed))
    assert Counter(found) == Counter(words)
    changed = sum(a != b for a, b in zip(words, found, strict=True))
    assert changed <= 2 * max(1, math.floor(alpha * len(words) + 1e-9))


def test_versions_are_the_same_for_every_checkpoint_and_order() -> None:
    turned = replace(exam(), audited=retrain(), samples={"forget": exam().forget[::-1]}, shared={})
    for sample in exam().forget:
        ours, theirs = (swapped_versions(e, sample, PacOptions()) for e in (exam(), turned))
        assert [v.target for v in ours] == [v.target for v in theirs] and len(ours) == 10
    whole = run("pac", retrain()).scores["pac"]["forget"]
    assert pac(turned, retrain(), PacOptions()).scores["pac"]["forget"] == whole[::-1]


def test_one_word_has_no_other_order() -> None:
    short = Sample(id="o", subject="o", prompt="what colour does ada ash like", target="red")
    own = Exam(exam().audited, {"forget": [short, exam().forget[0]]}, aux=exam().aux)
    found = pac(own, own.audited, PacOptions())
    assert [math.isnan(x) for x in found.scores["pac"]["forget"]] == [True, False] and "one word" in found.notes[0]
    for wrong in ({"alpha": 0.0}, {"versions": 0}):
        with pytest.raises(UserError, match="give alpha"):
            run("pac", **wrong)


# -- neighbourhood -------------------------------------------------------------------------------------------------


def slow_probability(texts: list[str], left: str, word: str, right: str) -> float:
    """p(word | left, right) from raw lists of pairs, normalised over the vocabulary by hand."""
    framed = [[EDGE, *(w.lower().strip(".") for w in t.split()), EDGE] for t in texts]
    lefts = [w for f in framed for w in f[:-1]]
    pairs = [(a, b) for f in framed for a, b in itertools.pairwise(f)]
    vocabulary = {w for w in lefts if w != EDGE}

    def unigram(b: str) -> float:
        return (lefts.count(b) + 1) / (len(lefts) + len(vocabulary) + 1)

    def follows(b: str, a: str) -> float:
        if a not in lefts:
            return unigram(b)
        if b != EDGE and b not in vocabulary:
            return 1.0  # the same for every word before it
        return MIX * pairs.count((a, b)) / lefts.count(a) + (1 - MIX) * unigram(b)

    joint = {w: follows(w, left) * follows(right, w) for w in vocabulary}
    return joint[word] / sum(joint.values())


@pytest.mark.parametrize(("left", "right"), [("the", "sat"), (EDGE, "cat"), ("the", EDGE), ("new", "on"), ("a", "new")])
def test_word_model_equals_raw_counts(left: str, right: str) -> None:
    model = Cloze(TEXTS)
    p_V = model.probabilities(left, right)
    assert p_V.sum() == pytest.approx(1)
    assert p_V == pytest.approx([slow_probability(TEXTS, left, w, right) for w in model.words])


def test_swaps_are_the_likeliest_of_all() -> None:
    model, text = Cloze(TEXTS), "The cat sat, - here"
    bare = ["the", "cat", "sat", "", "here"]
    framed = [EDGE, *bare, EDGE]
    every = []
    for t, old in enumerate(bare):
        for word in model.words:
            if old and word != old:
                p_old = slow_probability(TEXTS, framed[t], old, framed[t + 2]) if old in model.words else 0.0
                odds = slow_probability(TEXTS, framed[t], word, framed[t + 2]) / (1 - p_old)
                every.append((t, word, odds))
    best = sorted(every, key=lambda x: (-round(x[2], 12), x[0], x[1]))[:12]
    found = model.swaps(text, 12)
    assert [s.odds for s in found] == pytest.approx([x[2] for x in best])
    assert {(s.place, s.word) for s in found[:5]} <= {x[:2] for x in every}
    assert len({(s.place, s.word) for s in found}) == 12
    assert Cloze([]).swaps(text, 3) == []


def test_replacing_keeps_capitals_and_punctuation() -> None:
    assert replaced('He said "Cats," twice', Swap(2, "dogs", 1.0)) == 'He said "Dogs," twice'
    assert replaced("Cats\n\n  ran  off", Swap(1, "sat", 1.0)) == "Cats\n\n  sat  off"
    assert bare_word('"Cats,"') == "cats" and bare_word("--") == ""


def test_neighbourhood_equals_single_passes() -> None:
    found, model = run("neighbourhood", neighbours=6).scores["neighbourhood"], exam().audited.model
    words = Cloze([str(s.target) for s in (*exam().trained, *exam().aux)])
    for role in ("forget", "holdout"):
        for sample, score in zip(exam().samples[role], found[role], strict=True):
            target = str(sample.target)
            near = [replaced(target, s) for s in words.swaps(target, 6)]
            assert len(set(near)) == 6 and all(
                sum(a != b for a, b in zip(n.split(), target.split(), strict=True)) == 1 for n in near
            )
            far = sum(loss(model, sample.prompt, n) for n in near) / 6
            assert score == pytest.approx(far - loss(model, sample.prompt, target), rel=1e-3, abs=1e-4)


def test_neighbourhood_finds_the_original_and_nothing_in_a_retrain() -> None:
    assert_finds("neighbourhood", members=0.6)


def test_neighbourhood_options_and_notes() -> None:
    assert "bigram model of 17 words" in run("neighbourhood").notes[0]
    with pytest.raises(UserError, match="at least 1"):
        run("neighbourhood", neighbours=0)


def test_white_space_stays() -> None:
    """Else every version of a text with line breaks would lose them, and be unlikely for that alone."""
    text = "ada ash\n\nlikes  red"
    sample = Sample(id="w", subject="w", target=text)
    for version in swapped_versions(exam(), sample, PacOptions()):
        assert re.split(r"\S+", str(version.target)) == re.split(r"\S+", text)
        assert sorted(str(version.target).split()) == sorted(text.split())
