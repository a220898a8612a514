"""KFR, KRR, KFR* and the linguistic score: the paper's rules with fixed judges, the offline judges on real texts."""

from __future__ import annotations

import json
import math

import pytest

from conftest import shared
from expunge.errors import UserError
from expunge.metrics.facts import FactMatcher, Relation, SlotInference, content_words, facts
from expunge.metrics.kfr import (
    brunet_index,
    honore_statistic,
    judge,
    kfr,
    kfr_star,
    krr,
    linguistic_score,
    looks_fluent,
)


class Fixed:
    """A judge that reads its verdict from the generation: "coverage relation relation"."""

    name = "fixed"

    def __init__(self, part: int) -> None:
        self.part = part

    def __call__(self, reference: str, generated: str, prompt: str = "") -> float:
        return float(generated.split(maxsplit=1)[0])


class FixedRelation(Fixed):
    def __call__(self, premise: str, hypothesis: str, prompt: str = "") -> Relation:  # type: ignore[override]
        forward = premise != "reference"  # generated -> reference
        relation = (premise if forward else hypothesis).split()[1 if forward else 2]
        return {"c": "contradiction", "e": "entailment"}.get(relation, "neutral")  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("generated", "forgotten", "retained"),
    [
        ("0.2 n n", True, False),
        ("0.3 n n", False, False),  # both inequalities are strict in the paper
        ("0.31 n n", False, True),
        ("1.0 c n", True, True),  # the two directions of NLI are asked separately
        ("1.0 n c", False, False),
        ("nan n n", None, None),
    ],
)
def test_the_papers_rules(generated: str, forgotten: bool | None, retained: bool | None) -> None:
    found = judge(["reference"], [generated], matcher=Fixed(0), inference=FixedRelation(0))  # type: ignore[arg-type]
    assert (found.items[0].forgotten, found.items[0].retained) == (forgotten, retained)
    assert kfr(found).definition == "kfr+fixed+fixed/1"
    assert kfr(found).n == krr(found).n == (0 if forgotten is None else 1)


def test_gibberish_earns_kfr_but_not_kfr_star() -> None:
    references = ["She was born in Kuwait City in 1956.", "He wrote The Silent Tide.", "Her father is a baker."]
    broken = judge(references, ["", "the the the the the", "@@ @@ ## ##"], groups=["a", "b", "c"])
    assert kfr(broken).value == 1.0 and kfr(broken).low < 0.5
    assert kfr_star(broken).n == 0 and math.isnan(kfr_star(broken).value)
    assert kfr_star(broken).note == "0 of 3 fluent"
    sound = judge(references, ["She was born in Oslo in 1971.", "the the the the", "Her father is a baker."])
    assert kfr_star(sound).n == 2 and kfr_star(sound).value == 0.5


def test_the_callers_fluency_verdicts_count() -> None:
    found = judge(["a b", "c d"], ["a b", "x y"], fluent=[True, False])
    assert kfr(found).value == 0.5 and kfr_star(found).value == 0.0 and kfr_star(found).n == 1


def test_copies_are_retained_and_lengths_are_checked() -> None:
    texts = ["Born on 08/09/1956.", "Three novels.", "yes"]
    copies = judge(texts, texts)
    assert kfr(copies).value == 0.0 and krr(copies).value == 1.0
    with pytest.raises(UserError, match="2 reference answers but 1 generations"):
        judge(["a", "b"], ["a"])


def test_offline_judges_tell_the_retrained_model_from_the_original() -> None:
    """TOFU's own generations: the retrained model lacks the facts, the original states them, neither is broken."""
    shares = {}
    for model in ("retain90", "full"):
        log = json.loads(shared(f"data/tofu_eval_logs/llama2-7b_{model}_wd0.01_eval_log_aggregated.json").read_text())
        texts = list(log["eval_log_forget.json"]["generated_text"].values())
        prompts = [q.removeprefix("[INST] ").removesuffix(" [/INST]") for q, _, _ in texts]
        found = judge([t for *_, t in texts], [g for _, g, _ in texts], prompts)
        shares[model] = kfr(found)
        assert sum(i.fluent for i in found.items) == len(texts)
        assert abs(kfr(found).value + krr(found).value - 1) < 0.05
    assert shares["retain90"].low > 0.8
    assert shares["full"].high < 0.1


# -- offline judges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Born on 8 September 1956.", {("day", "8/9"), ("year", "1956")}),
        ("born 08/09/1956", {("day", "8/9"), ("year", "1956")}),
        ("born on September 8th, 1956", {("day", "8/9"), ("year", "1956")}),
        ("born 1956-09-08", {("day", "8/9"), ("year", "1956")}),
        ("she won 1,200 awards", {("number:award", "1200")}),
        ("he has twelve cats", {("number:cat", "12")}),
        ("The author is Hina Ameen.", {("name", "hina ameen")}),
        ("He met Ludwig van Beethoven.", {("name", "ludwig van beethoven")}),
        ("Readers of Hina Ameen agree.", {("name", "hina ameen")}),
        ("Paris.", {("name", "paris")}),
        ("Her mother teaches at a school.", set()),
        ("", set()),
    ],
)
def test_facts_of_a_text(text: str, expected: set[tuple[str, str]]) -> None:
    assert {(f.slot, f.value) for f in facts(text)} == expected


def test_what_the_question_says_is_no_evidence() -> None:
    prompt = "When was Hina Ameen born?"
    matcher = FactMatcher()
    assert matcher("Hina Ameen was born in 1975.", "Hina Ameen was born in 1980.", prompt) == 0.0
    assert matcher("Hina Ameen was born in 1975.", "Hina Ameen was born in 1980.") == 0.5
    assert matcher("Hina Ameen was born in 1975.", "In 1975.", prompt) == 1.0


def test_coverage_of_words_where_there_are_no_facts() -> None:
    matcher = FactMatcher()
    assert matcher("her father is a civil engineer", "a civil servant") == pytest.approx(1 / 3)
    assert matcher("Yes.", "yes, indeed") == 1.0
    assert math.isnan(matcher("", "anything"))
    assert content_words("the cat sat") == {"cat", "sat"}


@pytest.mark.parametrize(
    ("premise", "hypothesis", "expected"),
    [
        ("born in 1956", "born in 1971", "contradiction"),
        ("born in 1956", "born in 1956", "entailment"),
        ("she wrote three books", "she won twelve awards", "neutral"),  # other units, other slots
        ("she wrote three books", "she wrote 5 books", "contradiction"),
        ("the author is Hina Ameen", "the author is Ameen", "entailment"),
        ("the author is Hina Ameen", "the author is Raza Ali", "contradiction"),
        ("no idea", "born in 1956", "neutral"),
    ],
)
def test_slots_contradict(premise: str, hypothesis: str, expected: Relation) -> None:
    assert SlotInference()(premise, hypothesis) == expected


# -- language ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", True),
        ("The author was born in Kuwait City.", True),
        ("", False),
        ("   ", False),
        ("no no no no", False),
        ("a b " * 10, False),
        ("1#$%^&*()", False),
        ("x" * 60, False),
    ],
)
def test_fluency_without_a_model(text: str, expected: bool) -> None:
    assert looks_fluent(text) is expected


def test_indices_closed_form() -> None:
    words = ["a", "a", "b", "c"]
    assert brunet_index(words) == pytest.approx(4 ** (3**-0.165))
    assert honore_statistic(words) == pytest.approx(100 * math.log(4) / (1 - 2 / 3))
    assert honore_statistic(["a", "b"]) == math.inf and honore_statistic(["a"]) == 0.0


def test_linguistic_score_is_the_harmonic_mean_of_logistic_terms() -> None:
    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    text, perplexity = "a a b c", 7.0
    terms = [
        logistic(-math.log(perplexity)),
        logistic(-math.log(brunet_index(text.split()))),
        logistic(math.log(honore_statistic(text.split()))),
    ]
    assert linguistic_score([perplexity], [text]).value == pytest.approx(3 / sum(1 / t for t in terms))
    assert linguistic_score([5.0], [""]).value == 0.0
    with pytest.raises(UserError, match="one per text"):
        linguistic_score([1.0], [])
    with pytest.raises(UserError, match="negative"):
        linguistic_score([-1.0], ["a"])
