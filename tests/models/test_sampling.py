"""Sampling against a slow loop without cache, and its distribution against the exact one."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models import sampling
from expunge.models.classifier import ClassifierAdapter
from expunge.models.sampling import choose_tokens, sample_ids, sample_texts
from tiny_text import learned, tiny_adapter, tiny_dataset, tiny_model

DATA = tiny_dataset()
SAMPLES = list(DATA["forget"])
DOCUMENT = Sample(id="doc", subject="d", target="ada ash likes red")


def slow(
    model: torch.nn.Module, sample: Sample, draw: int, steps: int, t: float, top_k: int, top_p: float
) -> list[int]:
    """One row at a time, no cache, the filters written in plain Python."""
    ids = list(tiny_adapter().cached(sample).prompt)
    uniform = sampling._rng(0, sample, draw).random(steps)
    new: list[int] = []
    for u in uniform:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1].double() / t
        p = {i: float(x) for i, x in enumerate(torch.softmax(logits, 0))}
        order = sorted(p, key=lambda i: -p[i]) if top_k or top_p < 1 else list(p)
        order = order[: top_k or None]
        total, kept, before = sum(p[i] for i in order), [], 0.0
        for i in order:
            if before / total < top_p:
                kept.append(i)
            before += p[i]
        mass, seen = sum(p[i] for i in kept), 0.0
        for i in kept:
            seen += p[i]
            if seen > u * mass:
                break
        if i == 2:
            break
        new.append(i)
    return new


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (1.5, 5, 1.0), (0.7, 0, 0.8), (1.0, 9, 0.6)]
)
def test_equals_the_slow_loop(temperature: float, top_k: int, top_p: float) -> None:
    model = learned(SAMPLES, epochs=4).eval()
    adapter = tiny_adapter()
    samples = [*SAMPLES, DOCUMENT]
    starts = [list(adapter.cached(s).prompt) for s in samples]
    found = sample_ids(
        model, adapter, samples, starts, [6] * len(samples), n=2, temperature=temperature, top_k=top_k, top_p=top_p
    )
    wanted = [[slow(model, s, k, 6, temperature, top_k, top_p) for k in range(2)] for s in samples]
    assert found == wanted
    assert len({tuple(x) for each in found for x in each}) > 3


def test_order_batches_and_count_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = learned(SAMPLES, epochs=4).eval(), tiny_adapter()
    whole = sample_texts(model, adapter, SAMPLES, n=3, max_new_tokens=5)
    assert sample_texts(model, adapter, SAMPLES[::-1], n=3, max_new_tokens=5) == whole[::-1]
    assert [x[:2] for x in whole] == sample_texts(model, adapter, SAMPLES, n=2, max_new_tokens=5)
    monkeypatch.setattr(sampling, "MAX_TOKENS", 20)
    assert sample_texts(model, adapter, SAMPLES, n=3, max_new_tokens=5) == whole
    assert sample_texts(model, adapter, SAMPLES, n=3, max_new_tokens=5, seed=1) != whole
    assert all(len(text.split()) <= 5 for each in whole for text in each)


def test_draws_follow_the_distribution() -> None:
    logits_V = torch.tensor([2.0, 0.0, -torch.inf, 1.0, 0.5])
    num = 4000
    uniform_B = torch.from_numpy(np.random.default_rng(0).random(num))
    drawn = Counter(choose_tokens(logits_V.expand(num, -1), uniform_B, 2.0, 0, 1.0).tolist())
    p = torch.softmax(logits_V.double() / 2, 0).tolist()
    assert drawn[2] == 0
    live = [0, 1, 3, 4]
    assert stats.chisquare([drawn[i] for i in live], [num * p[i] for i in live]).pvalue > 0.01
    top = Counter(choose_tokens(logits_V.expand(num, -1), uniform_B, 1.0, 2, 1.0).tolist())
    share = math.exp(2) / (math.exp(2) + math.exp(1))
    assert set(top) == {0, 3} and abs(top[0] / num - share) < 0.03
    assert set(choose_tokens(logits_V.expand(num, -1), uniform_B, 1.0, 0, 0.3).tolist()) == {0}


@pytest.mark.parametrize("u", [0.0, 1 - 1e-16, 1.0])
def test_never_takes_an_impossible_token(u: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    assert choose_tokens(logits, torch.tensor([u], dtype=torch.float64), 1.0, 0, 1.0).tolist() == [1]


def test_a_learnt_answer_comes_back() -> None:
    model = learned(SAMPLES, epochs=60, rate=2e-2)
    texts = sample_texts(model, tiny_adapter(), SAMPLES, n=4, max_new_tokens=6)
    right = [t == s.target for s, each in zip(SAMPLES, texts, strict=True) for t in each]
    assert sum(right) / len(right) > 0.8


def test_wrong_options_get_their_sentence() -> None:
    model, adapter = tiny_model(), tiny_adapter()
    for options in ({"n": 0}, {"n": 1, "temperature": 0.0}, {"n": 1, "top_k": -1}, {"n": 1, "top_p": 0.0}):
        with pytest.raises(UserError, match="give"):
            sample_texts(model, adapter, SAMPLES, **{"max_new_tokens": 2, **options})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not generate text"):
        sample_texts(model, ClassifierAdapter(), SAMPLES, n=1, max_new_tokens=2)
