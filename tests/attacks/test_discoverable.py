"""(n, p)-discoverable extraction against transformers' own samplers, enumeration, and real draws."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import attack_cases
from expunge.attacks.continuations import split_ids
from expunge.attacks.discoverable import (
    DiscoverableOptions,
    discoverable,
    draws_needed,
    extractable,
    scheme_log_prob,
    suffix_log_q,
)
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.sampling import sample_ids
from expunge.models.text import TextAdapter
from expunge.stats import auc, clopper_pearson

SCHEMES = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.9, 12, 0.6), (1.0, 1, 1.0)]


def warped(logits_BV: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Log-probabilities of the sampler as transformers builds it."""
    none = torch.zeros(len(logits_BV), 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(none, logits_BV.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(none, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(none, scores)
    return scores.log_softmax(1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_token_probabilities_equal_those_of_transformers(scheme: tuple[float, int, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 23, generator=generator)
    targets = torch.randint(23, (400,), generator=generator)
    wanted = warped(logits, *scheme).gather(1, targets[:, None])[:, 0]
    found = scheme_log_prob(logits, targets, *scheme)
    assert torch.equal(found == -math.inf, wanted == -math.inf)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)


def test_ties_at_the_border_count_as_kept() -> None:
    logits = torch.zeros(3, 4)
    found = scheme_log_prob(logits, torch.tensor([0, 1, 3]), 1.0, 2, 1.0)
    np.testing.assert_allclose(found, math.log(0.5))


@pytest.mark.parametrize("scheme", SCHEMES[:5])
def test_q_of_all_texts_sums_to_one(scheme: tuple[float, int, float]) -> None:
    """Every text of two tokens of the tiny vocabulary: they exclude each other, and one of them must be drawn."""
    exam = attack_cases.exam()
    adapter, model = exam.audited.adapter, exam.audited.model
    assert isinstance(adapter, TextAdapter)
    words = [w for w, i in adapter.tokenizer.get_vocab().items() if i not in (0, 2)]
    temperature, top_k, top_p = scheme
    texts = [
        Sample(id=f"{a} {b}", subject="x", prompt=exam.forget[0].prompt, target=f"{a} {b}")
        for a in words for b in words
    ]  # fmt: skip
    found = suffix_log_q(model, adapter, texts, temperature=temperature, top_k=top_k, top_p=top_p)
    total = math.fsum(math.exp(log_q) for log_q, _ in found)
    # What is missing are the texts with a closing token in them and those of ids that no word has.
    start, _ = split_ids(adapter, texts[0], 0, 0)
    gone = 0.0
    known = sorted(adapter.tokenizer.get_vocab()[w] for w in words)
    with torch.no_grad():
        first = warped(model(input_ids=torch.tensor([start])).logits[:, -1], *scheme)[0].exp()
        after = model(input_ids=torch.tensor([[*start, i] for i in known])).logits[:, -1]
        second = warped(after, *scheme).exp()
    gone = 1 - float(first[known] @ second[:, known].sum(1))
    assert total + gone == pytest.approx(1, abs=1e-5)
    assert all(tokens == 2 for _, tokens in found)


@pytest.mark.parametrize("scheme", [(1.0, 0, 1.0), (1.5, 4, 1.0), (1.5, 0, 0.7)])
def test_q_is_the_frequency_of_real_draws(scheme: tuple[float, int, float]) -> None:
    checkpoint, draws = attack_cases.exam().references[0], 1500
    adapter = checkpoint.adapter
    assert isinstance(adapter, TextAdapter)
    temperature, top_k, top_p = scheme
    for sample in attack_cases.exam().forget[:2]:
        given, wanted = split_ids(adapter, sample, 0, 0)
        [texts] = sample_ids(
            checkpoint.model, adapter, [sample], [given], [len(wanted)], n=draws,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=3,
        )  # fmt: skip
        [(log_q, tokens)] = suffix_log_q(
            checkpoint.model, adapter, [sample], temperature=temperature, top_k=top_k, top_p=top_p
        )
        interval = clopper_pearson(sum(t == wanted for t in texts), draws, level=0.9999)
        assert interval.low <= math.exp(log_q) <= interval.high
        assert tokens == len(wanted)


def test_documents_are_scored_after_their_prefix() -> None:
    checkpoint = attack_cases.exam().audited
    adapter = checkpoint.adapter
    assert isinstance(adapter, TextAdapter)
    sample = Sample(id="d", subject="x", target="ada ash likes red where is the home of ada")
    given, wanted = split_ids(adapter, sample, 3, 4)
    log_q = 0.0
    for token in wanted:
        with torch.no_grad():
            log_q += float(
                warped(checkpoint.model(input_ids=torch.tensor([given])).logits[:, -1], 1.0, 9, 1.0)[0, token]
            )
        given = [*given, token]
    [found] = suffix_log_q(checkpoint.model, adapter, [sample], top_k=9, prefix=3, suffix=4)
    assert found[1] == 4
    assert found[0] == pytest.approx(log_q, abs=1e-4)


def test_draws_needed_has_the_published_numbers() -> None:
    # Halved chance per draw of 1 in 1000: ln .5 / ln .999 and ln .1 / ln .999.
    assert 10 ** draws_needed(math.log(1e-3), 0.5) == pytest.approx(692.8, abs=0.05)
    assert 10 ** draws_needed(math.log(1e-3), 0.9) == pytest.approx(2301.4, abs=0.05)
    assert draws_needed(math.log(0.6), 0.5) == 0.0  # one draw
    assert draws_needed(0.0, 0.9) == 0.0
    assert draws_needed(-math.inf, 0.5) == math.inf
    assert math.isnan(draws_needed(math.nan, 0.5))
    assert draws_needed(-1000.0, 0.5) == pytest.approx((math.log(math.log(2)) + 1000) / math.log(10))


@given(st.floats(1e-9, 0.999), st.sampled_from([1, 7, 100, 10_000]), st.sampled_from([0.1, 0.5, 0.9]))
def test_extractable_is_the_definition(q: float, draws: int, p: float) -> None:
    reached = -math.expm1(draws * math.log1p(-q))
    if abs(reached - p) > 1e-9:
        assert extractable(math.log(q), draws, p) == float(reached >= p)


def test_the_original_is_extractable_and_a_retrained_model_is_not() -> None:
    exam, retrain = attack_cases.exam(), attack_cases.retrain()
    ours, theirs = (discoverable(exam, c, DiscoverableOptions()) for c in (exam.audited, retrain))
    assert ours.figures["discoverable.within_100.forget"].value == 1.0
    assert theirs.figures["discoverable.within_100.forget"].value == 0.0
    for name in ("discoverable", "discoverable.log_q"):
        assert auc(ours.scores[name]["forget"], ours.scores[name]["holdout"]) > 0.85
        assert auc(ours.scores[name]["forget"], theirs.scores[name]["forget"]) > 0.8
    wide = ours.figures["discoverable.within_100.holdout"]
    assert wide.n == len(exam.holdout) and wide.low <= wide.value <= wide.high
    assert ours.details[exam.forget[0].id]["q"] > 0.5


def test_plain_log_q_agrees_with_the_scheme_without_truncation() -> None:
    exam = attack_cases.exam()
    found = discoverable(exam, exam.audited, DiscoverableOptions(top_k=0))
    q = [found.details[s.id]["q"] for s in exam.forget]
    np.testing.assert_allclose(np.exp(found.scores["discoverable.log_q"]["forget"]), q, rtol=1e-4)


def test_impossible_suffixes_have_the_lowest_score() -> None:
    exam = attack_cases.exam()
    strange = Sample(id="s", subject="x", prompt=exam.forget[0].prompt, target="turin turin turin turin")
    found = discoverable(replace(exam, samples={"forget": [strange]}), exam.audited, DiscoverableOptions(top_k=1))
    assert found.scores["discoverable"]["forget"] == [-30.0]
    assert found.details["s"]["log10_n_0.5"] is None
    assert math.isfinite(found.scores["discoverable.log_q"]["forget"][0])


def test_mistakes_are_named() -> None:
    exam = attack_cases.exam()
    for options, words in (
        ({"p": 1.0}, "chance p = 1"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"top_p": 0.0}, "top-p"),
    ):
        with pytest.raises(UserError, match=words):
            discoverable(exam, exam.audited, DiscoverableOptions(**options))
