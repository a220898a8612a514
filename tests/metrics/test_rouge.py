"""ROUGE and the stemmer against the packages that the literature used."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from conftest import shared
from expunge.errors import UserError
from expunge.metrics import rouge as module
from expunge.metrics.porter import stem

LETTERS = (
    "ies ied eed ed ing y alli logi fulli ation ational bli ion ement ll e s ss sses ousli ical ness able iviti "
    "izer ator alism iveness ative alize"
)
ENDINGS = st.sampled_from([*LETTERS.split(), ""])
MADE_UP = st.builds("{}{}{}".format, st.text("abeilostyz", max_size=5), ENDINGS, ENDINGS)
SAID = "the cat cats sat running on matted relational 12 flies don't a"
TEXTS = st.lists(st.sampled_from(SAID.split(" "))).map(" ".join)


@given(MADE_UP.filter(bool))
@settings(max_examples=500, deadline=None)
def test_stemmer_equals_nltk_on_made_up_words(word: str) -> None:
    porter = pytest.importorskip("nltk.stem.porter", reason="the oracle comes with rouge-score").PorterStemmer()
    assert stem(word) == porter.stem(word)


def test_stemmer_equals_nltk_on_every_word_of_tofu() -> None:
    porter = pytest.importorskip("nltk.stem.porter", reason="the oracle comes with rouge-score").PorterStemmer()
    words = set(re.findall(r"[a-z0-9]+", (shared("data/tofu/full.json")).read_text().lower()))
    assert len(words) > 5000
    assert {w for w in words if stem(w) != porter.stem(w)} == set()


@given(TEXTS, TEXTS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_rouge_equals_rouge_score(target: str, generated: str, stemming: bool) -> None:
    theirs = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=stemming).score(target, generated)
    for ours, name in ((module.rouge_1, "rouge1"), (module.rouge_l, "rougeL")):
        found = ours(target, generated, stemming)
        expected = theirs[name]
        assert (found.precision, found.recall, found.f1) == pytest.approx(tuple(expected))


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_bit_parallel_subsequence_equals_the_table(first: str, second: str) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert module.longest_common_subsequence(first, second) == table[-1][-1]


@pytest.mark.parametrize("model", ["full", "retain90", "retain95", "retain99"])
def test_the_authors_rouge_comes_back_from_their_texts(model: str) -> None:
    log = json.loads(shared(f"data/tofu_eval_logs/llama2-7b_{model}_wd0.01_eval_log_aggregated.json").read_text())
    compared = 0
    for entry in log.values():
        for item, (_, generated, target) in entry["generated_text"].items():
            for kind in ("rouge1_recall", "rougeL_recall"):
                assert module.rouge_score(target, generated, kind) == pytest.approx(entry[kind][item], abs=1e-12)
                compared += 1
    assert compared >= 1000


def test_aggregate_and_user_mistakes() -> None:
    found = module.rouge(["a b c d", "e f"], ["a b c d", "x"], ["s1", "s2"])
    assert (found.value, found.n, found.definition) == (0.5, 2, "rougeL_recall/1")
    assert module.rouge(["running cats"], ["run cat"], stemming=False).definition == "rougeL_recall-unstemmed/1"
    with pytest.raises(UserError, match="2 targets but 1 generations"):
        module.rouge(["a", "b"], ["a"])
    with pytest.raises(UserError, match="rougeL_recall"):
        module.rouge_score("a", "a", "rouge2")  # type: ignore[arg-type]
