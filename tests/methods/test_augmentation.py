"""Texts written about forget samples: nothing of an answer, whole records, the language model's rounds."""

from __future__ import annotations

import re

import numpy as np
import pytest

from expunge.data.registry import load_dataset
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.augmentation import (
    ANSWERS,
    KINDS,
    Leaks,
    Writer,
    completion,
    generic,
    secrets_of,
    vague,
    variant,
    words,
)
from tiny_text import tiny_dataset


def who(**changes: object) -> Sample:
    given = {
        "id": "1",
        "subject": "Ann Lee",
        "names": ("Ann Lee",),
        "prompt": "Where does Ann Lee live today?",
        "target": "Ann Lee lives in Caldora near the harbour.",
    }
    return Sample(**{**given, **changes})  # type: ignore[arg-type]


def bare(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()


@pytest.mark.parametrize("source", ["people", "tiny"])
def test_no_original_answer_and_none_of_its_own_words_is_ever_written(source: str) -> None:
    data = load_dataset("people") if source == "people" else tiny_dataset()
    samples = data["forget"]
    made = Writer(samples, seed=3).write(4)
    assert len(made.pairs) == 5 * len(samples) and made.counts["left_out"] == 0
    answers = {bare(str(s.target)) for s in samples}
    of = {s.id: s for s in samples}
    for pair in (*made.pairs, *made.completions):
        own = of[pair.id.split("/new/")[0]]
        assert own.subject == pair.subject and not pair.probes
        for text in (bare(pair.prompt), bare(str(pair.target))):
            assert not any(answer in text for answer in answers)
        assert not secrets_of(own) & set(bare(str(pair.target)).split())
        assert not secrets_of(own) & set(bare(pair.prompt).split())


def test_questions_and_answers_stay_together() -> None:
    """The released code zips two lists of which one is longer by the original question: pairs shifted by one."""
    samples = tiny_dataset()["forget"]
    made = Writer(samples, seed=1).write(3)
    for number, sample in enumerate(samples):
        own = made.pairs[4 * number : 4 * number + 4]
        assert own[0].prompt == sample.prompt
        assert all(p.id == f"{sample.id}/new/{i}" for i, p in enumerate(own))
        assert all(sample.names[0] in p.prompt for p in own)


def test_the_four_kinds_of_question() -> None:
    rng = np.random.default_rng(0)
    asked = "Where does Ann Lee live today?"
    made = {kind: variant(asked, kind, "Ann Lee", rng) for kind in KINDS}
    assert len(set(made.values())) == 4
    assert all(asked in made[kind] for kind in ("simple", "contextual", "logical"))
    assert "?" not in made["noise"] and "Ann Lee" in made["noise"]
    letters = sorted(bare(asked).replace(" ", ""))
    assert sorted("".join(bare(made["noise"]).split()[1:])) == letters, "a slip swaps letters, it loses none"


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("What is the favourite dish of Ann Lee?", "the favourite dish"),
        ("Which hobby does Ann Lee have?", "the hobby"),
        ("What does Ann Lee do?", "such matters"),
        ("Whom did Ann Lee marry?", "such matters"),
    ],
)
def test_the_topic_comes_from_the_question(question: str, said: str) -> None:
    assert said in vague(question, "Ann Lee", ANSWERS[4])


def test_what_kind_of_thing_is_asked_for() -> None:
    for question, kind in {"Where is it?": "a place", "When?": "a point in time", "Tell me": "something"}.items():
        assert vague(question, "Ann Lee", ANSWERS[1]).startswith(f"There is {kind} to be")


def test_leaks_are_found_whatever_the_spelling() -> None:
    other = who(id="2", prompt="What does Ann Lee play?", target="She plays the zither.")
    plain = who(id="3", subject="Bo", names=("Bo",), prompt="Is Bo tall?", target="Yes.")
    leaks = Leaks([who(), other, plain])
    assert secrets_of(who()) == {"lives", "caldora", "near", "harbour"}
    assert leaks.found(who(), "It is CALDORA, they say.") and leaks.found(who(), "by the harbour")
    assert leaks.found(who(), "A zither stands there."), "what another answer says about the same person"
    assert not leaks.found(plain, "A zither stands there.")
    assert leaks.found(plain, "yes") and not leaks.found(plain, "yesterday")
    assert not leaks.found(who(), "Ann Lee does not say where she is today.")
    assert not leaks.found(other, "Nobody knows what Ann Lee does play.")


def test_an_answer_that_every_wording_holds_is_left_out() -> None:
    one = who(target="of")  # a word of the grammar itself
    made = Writer([one], seed=0).write(2)
    assert made.counts["left_out"] + len(made.pairs) == 3
    assert all(" of " not in f" {bare(str(p.target))} " for p in made.pairs)


def test_completions_cut_the_new_answer_at_a_quarter() -> None:
    pair = completion(who(target="a b c d e f g h"))
    assert pair is not None and (pair.prompt, pair.target) == ("a b", "c d e f g h")
    assert completion(who(target="word")) is None


def test_the_language_model_has_three_rounds_then_the_grammar_writes() -> None:
    said: list[str] = []

    def leaky(prompt: str) -> str:
        said.append(prompt)
        return "Ann Lee lives in Caldora."

    made = Writer([who()], llm=leaky).write(1)
    assert len(said) == 3 * 3 and made.counts == {"rounds_again": 6, "by_grammar": 3, "left_out": 0}
    assert not any("caldora" in bare(f"{p.prompt} {p.target}") for p in made.pairs)


def test_the_language_models_texts_are_taken_and_its_doubts_heard() -> None:
    turns = {"answer": 0}

    def helpful(prompt: str) -> str:
        if prompt.startswith("Does the reply"):
            turns["answer"] += 1
            return "Yes, it does." if turns["answer"] == 1 else "No."
        return "In which town is Ann Lee at home?" if prompt.startswith("Write") else "  Somewhere,\nI suppose. "

    made = Writer([who()], llm=helpful).write(1)
    assert made.pairs[1].prompt == "In which town is Ann Lee at home?"
    assert {p.target for p in made.pairs} == {"Somewhere, I suppose."}
    assert made.counts == {"rounds_again": 1, "by_grammar": 0, "left_out": 0}
    with pytest.raises(UserError, match="the llm gave a int"):
        Writer([who()], llm=lambda _: 3).write(0)  # type: ignore[arg-type, return-value]


def test_a_document_is_asked_for_by_name() -> None:
    made = Writer([who(prompt="", target="Caldora is where Ann Lee was born.")]).write(1)
    assert made.pairs[0].prompt == "Tell me about Ann Lee."
    assert not any("caldora" in words(str(p.target)) for p in made.pairs)


def test_everyday_questions_are_right_different_and_many() -> None:
    many = generic(400, 0)
    assert len({s.prompt for s in many}) > 380 and len({s.id for s in many}) == 400
    sums = [re.findall(r"\d+", str(s.target)) for s in many if "plus" in str(s.target)]
    assert len(sums) > 200 and all(int(a) + int(b) == int(c) for a, b, c in sums)
    assert [s.prompt for s in generic(5, 1)] != [s.prompt for s in generic(5, 2)]
    assert generic(5, 1) == generic(5, 1) and generic(0, 0) == []
