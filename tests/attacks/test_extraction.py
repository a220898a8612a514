"""Greedy extraction against a loop that really decodes, token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attack_cases
from expunge.attacks.continuations import closing_ids, ids_up_to, split_ids, suffix_span
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.extraction import (
    GreedyOptions,
    MemorizationOptions,
    edit_similarity,
    greedy,
    greedy_texts,
    memorization,
)
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.text import TextAdapter
from expunge.stats import auc

WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=5)


def text_of(checkpoint: Checkpoint) -> TextAdapter:
    assert isinstance(checkpoint.adapter, TextAdapter)
    return checkpoint.adapter


def decoded(model: torch.nn.Module, ids: list[int], steps: int) -> list[int]:
    """Slow greedy decoding without a cache."""
    for _ in range(steps):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[len(ids) - steps :] if steps else []


def documents() -> Exam:
    """The forget samples as documents, under the original that learnt them as answers."""
    base = attack_cases.exam()
    texts = [replace(s, prompt="", target=f"{s.prompt} {s.target}") for s in base.forget]
    return replace(base, samples={"forget": texts}, shared={})


@pytest.mark.parametrize("exam", [attack_cases.exam, documents])
@pytest.mark.parametrize("kind", ["original", "retrain"])
def test_memorization_equals_decoding_by_hand(exam, kind: str) -> None:  # type: ignore[no-untyped-def]
    under, checkpoint = exam(), attack_cases.exam().audited if kind == "original" else attack_cases.retrain()
    found = memorization(under, checkpoint, MemorizationOptions(prefix=4)).scores
    adapter = text_of(checkpoint)
    for place, sample in enumerate(under.forget):
        opening, _ = split_ids(adapter, replace(sample, prompt=sample.prompt or "x"), 0, 0)
        ids = list(adapter.cached(sample).ids)
        first = len(opening) if sample.prompt else 1
        content = ids[first:-1]  # without the closing token
        given, wanted = split_ids(adapter, sample, 4, 0)
        assert given + wanted == ids[:-1]
        hits = [decoded(checkpoint.model, ids[: first + k], 1)[0] == content[k] for k in range(len(content))]
        enough = [
            k for k in range(len(content) + 1)
            if decoded(checkpoint.model, ids[: first + k], len(content) - k) == content[k:]
        ]  # fmt: skip
        assert found["memorization.exact"]["forget"][place] == pytest.approx(np.mean(hits))
        assert found["memorization.strength"]["forget"][place] == pytest.approx(1 - min(enough) / len(content))
        assert found["memorization.verbatim"]["forget"][place] == (
            decoded(checkpoint.model, given, len(wanted)) == wanted
        )


def test_the_original_gives_its_texts_and_a_retrained_model_does_not() -> None:
    exam, retrain = attack_cases.exam(), attack_cases.retrain()
    ours, theirs = (memorization(exam, c, MemorizationOptions()) for c in (exam.audited, retrain))
    assert ours.figures["memorization.verbatim.forget"].value >= 0.5
    assert theirs.figures["memorization.verbatim.forget"].value == 0.0
    for name in ("memorization.strength", "memorization.exact"):
        assert np.mean(ours.scores[name]["forget"]) > np.mean(theirs.scores[name]["forget"]) + 0.3
    assert auc(ours.scores["memorization.exact"]["forget"], ours.scores["memorization.exact"]["holdout"]) > 0.75


def test_greedy_texts_and_their_comparison() -> None:
    exam, retrain = attack_cases.exam(), attack_cases.retrain()
    ours, theirs = (greedy(exam, c, GreedyOptions()) for c in (exam.audited, retrain))
    assert ours.figures["greedy.exact.forget"].value >= 0.5
    assert theirs.figures["greedy.exact.forget"].value == 0.0
    assert np.mean(ours.scores["greedy"]["forget"]) > np.mean(theirs.scores["greedy"]["forget"])
    assert ours.details[exam.forget[0].id]["generated"] == exam.forget[0].target


def test_documents_are_continued_from_their_prefix() -> None:
    exam = documents()
    sample = exam.forget[0]
    adapter = text_of(exam.audited)
    [(wanted, got)] = greedy_texts(exam.audited, [sample], 6, 64)
    ids = list(adapter.cached(sample).ids)
    assert wanted == " ".join(str(sample.target).split()[1 + len(ids[:-2]) // 2 :])
    given, rest = split_ids(adapter, sample, 6, 64)
    assert (
        got == adapter.tokenizer.decode(decoded(exam.audited.model, given, len(rest)), skip_special_tokens=True).strip()
    )


def test_spans() -> None:
    ids = np.arange(10, 22)
    closing = frozenset({20, 21})
    assert suffix_span(ids, True, closing) == slice(0, 10)
    assert suffix_span(ids, True, closing, suffix=3) == slice(0, 3)
    assert suffix_span(ids, False, closing, prefix=4, suffix=0) == slice(4, 10)
    assert suffix_span(ids, False, closing, prefix=50) == slice(5, 10)
    assert suffix_span(ids[:1], False, closing) == slice(0, 1)
    assert suffix_span(np.array([20, 21]), True, closing) == slice(0, 0)
    adapter = attack_cases.adapter()
    assert closing_ids(adapter) == {0, 2}  # not the mark for unknown words
    sample = attack_cases.exam().forget[0]
    whole = list(adapter.cached(sample).ids)
    words = str(sample.target).split()
    assert ids_up_to(adapter, sample, " ".join(words[:2]) + " ") == whole[: -1 - (len(words) - 2)]


def test_one_token_and_nothing() -> None:
    exam = attack_cases.exam()
    samples = [
        Sample(id="one", subject="x", prompt="who is ada", target="red"),
        Sample(id="no", subject="x", target=""),
    ]
    scores = memorization(replace(exam, samples={"forget": samples}), exam.audited, MemorizationOptions()).scores
    assert scores["memorization.strength"]["forget"][0] in (0.0, 1.0)
    assert math.isnan(scores["memorization.verbatim"]["forget"][1])


@given(WORDS, WORDS)
def test_edit_similarity_equals_the_recursion(first: list[str], second: list[str]) -> None:
    def distance(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(
            distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0])
        )  # fmt: skip

    found = edit_similarity(" ".join(first), " ".join(second))
    if not first:
        assert math.isnan(found)
        return
    assert found == pytest.approx(1 - distance(first, second) / max(len(first), len(second)))


def test_mistakes_are_named() -> None:
    exam = attack_cases.exam()
    with pytest.raises(UserError, match="prefix -1 and suffix 50"):
        memorization(exam, exam.audited, MemorizationOptions(prefix=-1))
    with pytest.raises(UserError, match="similarity 2"):
        greedy(exam, exam.audited, GreedyOptions(alike=2))
