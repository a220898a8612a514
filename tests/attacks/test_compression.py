"""Adversarial compression against an exhaustive search of all short prompts."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import attack_cases
from expunge.attacks.compression import (
    CompressionOptions,
    Target,
    compression,
    search,
    shortest_prompt,
    target_of,
)
from expunge.data.samples import Sample
from expunge.errors import UserError

OPTIONS = CompressionOptions(strings=2, steps=15, batch=48, top_k=30)
CLOSED = [0, 1, 2]  # padding, unknown, end
WORDS = list(range(3, 64))


def target(text: str = "likes") -> Target:
    sample = Sample(id="t", subject="t", target=text)
    return target_of(attack_cases.exam().audited, sample, 0)


def says(prompt: list[int], wanted: Target) -> bool:
    """Greedy decoding, one token after the other."""
    ids = [*wanted.opening, *prompt]
    for _ in wanted.ids:
        with torch.no_grad():
            ids.append(int(wanted.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[-len(wanted.ids) :]) == wanted.ids


def test_losses_and_success_equal_decoding() -> None:
    exam = attack_cases.exam()
    wanted = target_of(exam.audited, exam.forget[0], 0)
    start = list(exam.audited.adapter.cached(exam.forget[0]).prompt)
    prompts = [start, [*start[:-1], 5], [3, 4, 5, 6, 7, 8]]
    losses, said = wanted.losses(torch.tensor(prompts))
    assert said.tolist() == [says(p, wanted) for p in prompts] and said[0]
    for prompt, loss in zip(prompts, losses, strict=True):
        with torch.no_grad():
            logits = wanted.model(input_ids=torch.tensor([[*prompt, *wanted.ids]])).logits[0, len(prompt) - 1 : -1]
        assert float(loss) == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, torch.tensor(wanted.ids))), abs=1e-5
        )


def test_better_tokens_are_those_of_the_gradient_of_the_one_hot_input() -> None:
    wanted = target("ada ash likes red")
    prompt = torch.tensor([10, 20, 30])
    model = wanted.model
    weight = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    one_hot = torch.nn.functional.one_hot(torch.tensor([[*prompt.tolist(), *wanted.ids]]), 64).float().requires_grad_()
    logits = model(inputs_embeds=one_hot @ weight).logits[0, 2:-1]
    torch.nn.functional.cross_entropy(logits, torch.tensor(wanted.ids)).backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None
    assert one_hot.grad is not None
    gain = -one_hot.grad[0, :3]
    gain[:, CLOSED] = -math.inf
    assert torch.equal(wanted.better_tokens(prompt, 7, CLOSED), gain.topk(7, dim=1).indices)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_shortest_prompt_is_that_of_an_exhaustive_search() -> None:
    checked = 0
    for text in ("likes", "lives in", "ada"):
        wanted = target(text)
        pairs = torch.tensor(list(product(WORDS, repeat=2)))
        ones = torch.tensor(WORDS)[:, None]
        least = next((len(p[0]) for p in (ones, pairs) if bool(wanted.losses(p)[1].any())), 3)
        found, tried = shortest_prompt(
            wanted,
            steps=25,
            batch=64,
            top_k=61,
            longest=8,
            budget=10**6,
            banned=CLOSED,
            allowed=WORDS,
            rng=np.random.default_rng(0),
        )
        assert found is not None and says(found.tolist(), wanted)
        assert len(found) >= least  # never shorter than what exists
        assert tried[0] == 5 and not set(found.tolist()) & set(CLOSED)
        checked += len(found) == least
    assert checked >= 2


def test_lengths_follow_the_schedule() -> None:
    steps_of: list[int] = []
    lengths: list[int] = []

    class Stub(Target):
        def losses(self, prompts_BX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            count, length = prompts_BX.shape
            if count == 1:
                lengths.append(length)
                steps_of.append(0)
            else:
                steps_of[-1] += 1
            return torch.zeros(count), torch.full((count,), length >= 8)

        def better_tokens(self, prompt_X: torch.Tensor, top_k: int, banned: object) -> torch.Tensor:
            return torch.arange(3, 6).repeat(len(prompt_X), 1)

    stub = Stub(torch.nn.Identity(), attack_cases.adapter(), (), (5, 6, 7))
    rest = {
        "budget": 1000,
        "steps": 10,
        "batch": 4,
        "top_k": 3,
        "banned": CLOSED,
        "allowed": WORDS,
        "rng": np.random.default_rng(0),
    }
    found, tried = shortest_prompt(stub, longest=30, **rest)  # type: ignore[arg-type]
    assert tried == lengths == [5, 10, 9, 8, 7] and found is not None and len(found) == 8
    assert steps_of == [10, 0, 0, 0, 12]
    steps_of.clear()
    none, tried = shortest_prompt(stub, longest=30, **{**rest, "budget": 7 * 4})  # type: ignore[arg-type]
    assert none is None and tried == [5] and steps_of == [7]
    missing, tried = shortest_prompt(stub, longest=7, **rest)  # type: ignore[arg-type]
    assert missing is None and tried == [5]


def test_the_original_says_its_texts_and_a_retrained_or_untrained_model_does_not() -> None:
    exam = attack_cases.exam()
    ours = compression(exam, exam.audited, OPTIONS)
    retrain = compression(exam, attack_cases.retrain(), OPTIONS)
    assert np.isnan(retrain.scores["compression.ratio"]["forget"]).all()
    blank = compression(exam, attack_cases.blank_copy(), replace(OPTIONS, steps=4))
    assert np.nanmax(ours.scores["compression.ratio"]["forget"]) > 0.5
    assert blank.figures["compression.memorized.forget"].value == 0.0
    assert np.isnan(blank.scores["compression.ratio"]["forget"]).all()
    assert "for 2 no prompt was found" in blank.notes[0]
    done = [d for d in ours.details.values() if d["found"]]
    assert done and all(d["ratio"] == d["text_tokens"] / len(d["prompt"].split()) for d in done)
    assert sum(not math.isnan(s) for s in ours.scores["compression"]["forget"]) == 2


def test_the_model_is_left_as_it_was() -> None:
    exam = attack_cases.exam()
    before = {name: p.clone() for name, p in exam.audited.model.named_parameters()}
    compression(exam, exam.audited, replace(OPTIONS, strings=1, steps=2))
    for name, parameter in exam.audited.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert not exam.audited.model.training


def test_a_prompt_that_works_is_taken_without_a_step() -> None:
    exam = attack_cases.exam()
    wanted = target_of(exam.audited, exam.forget[0], 0)
    start = torch.tensor(exam.audited.adapter.cached(exam.forget[0]).prompt)
    found, taken = search(wanted, start, steps=0, batch=1, top_k=1, banned=[], rng=np.random.default_rng(0))
    assert found is not None and torch.equal(found, start) and taken == 0


def test_mistakes_are_named() -> None:
    exam = attack_cases.exam()
    with pytest.raises(UserError, match="at least 1"):
        compression(exam, exam.audited, CompressionOptions(strings=0))
    with pytest.raises(UserError, match="budget of 5 prompts"):
        compression(exam, exam.audited, CompressionOptions(budget=5))
