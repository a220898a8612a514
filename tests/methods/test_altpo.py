"""AltPO: its loss with whole logits, and where the alternates come from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge.data.refusals import REFUSALS
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.altpo import FILE, AltPOOptions, next_classes, other_texts
from expunge.methods.augmentation import words
from expunge.methods.registry import Context, Outcome, get_method
from expunge.models.tiny import init_classifier
from family_cases import FORGET, LOADED, RETAIN, fresh, token_log_probs

SETTINGS = {
    "epochs": 2, "batch_size": 99, "retain_batch": 99, "optimizer": "sgd", "learning_rate": 0.02, "clip": 0.0,
    "schedule": "constant", "warmup": 0.0, "retain": "none",
}  # fmt: skip


def context(**changes: Any) -> Context:
    return Context(fresh(), LOADED.adapter, FORGET, RETAIN, seed=3, **changes)


def run(where: Context, **values: Any) -> Outcome:
    method = get_method("altpo")
    return method(where, method.configure({**SETTINGS, **values}))


def told(prompt: str) -> str:
    """A language model whose answer depends on the question alone."""
    asked = prompt.split("Question: ")[1]
    return "likes teal or red" if "colour" in asked else "lives in cairo"


def test_steps_follow_the_formula() -> None:
    """2/β · −log σ(β[Δ alternate − Δ answer]) with every alternate as a pair of its own, two SGD steps."""
    beta, where = 0.3, context(llm=told)
    outcome = run(where, beta=beta)
    slow, old = fresh(), fresh()
    others = [replace(s, target=told(f"Question: {s.prompt}")) for s in FORGET]
    momentum: dict[str, torch.Tensor] = {}
    for step in range(2):
        parts = []
        for answer, other in zip(FORGET, others, strict=True):
            won = token_log_probs(slow, other).sum() - token_log_probs(old, other).sum().detach()
            lost = token_log_probs(slow, answer).sum() - token_log_probs(old, answer).sum().detach()
            parts.append(2 / beta * torch.log1p(torch.exp(-beta * (won - lost))))
        loss = torch.stack(parts).mean()
        assert outcome.record["log"][step]["forget"] == pytest.approx(float(loss.detach()), rel=1e-4)
        slow.zero_grad()
        loss.backward()
        with torch.no_grad():
            for n, p in slow.named_parameters():
                assert p.grad is not None
                momentum[n] = p.grad.clone() if step == 0 else 0.9 * momentum[n] + p.grad
                p.sub_(0.02 * momentum[n])
    for p, q in zip(outcome.model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-5)
    assert outcome.record["log"][0]["forget"] == pytest.approx(2 * math.log(2) / beta, rel=1e-5)


def test_the_language_model_is_asked_without_the_answer() -> None:
    prompts: list[str] = []

    def asked(prompt: str) -> str:
        prompts.append(prompt)
        return f"number {len(prompts)}"

    found = other_texts(context(llm=asked), AltPOOptions(alternates=2))
    assert [len(texts) for texts in found] == [2] * 4 and len(prompts) == 8
    for prompt in prompts:
        assert sum(s.prompt in prompt for s in FORGET) == 1
        assert not any(str(s.target) in prompt for s in FORGET)


def test_what_says_the_answer_itself_is_asked_again_and_then_refused() -> None:
    answers = {s.prompt: str(s.target) for s in FORGET}

    def parrot(prompt: str) -> str:
        return next(f" {target.upper()}. " for question, target in answers.items() if question in prompt)

    assert all(text in REFUSALS for (text,) in other_texts(context(llm=parrot), AltPOOptions()))
    outcome = run(context(llm=parrot), epochs=1)
    assert "4 alternates are refusals: nothing else than the answer was said" in outcome.notes


def test_the_original_itself_is_asked_about_others() -> None:
    where = context()
    first, again = (other_texts(where, AltPOOptions(alternates=2, temperature=0.3)) for _ in range(2))
    assert first == again
    others = {name for s in RETAIN for name in s.names} - {name for s in FORGET for name in s.names}
    for sample, texts in zip(FORGET, first, strict=True):
        assert len({tuple(words(t)) for t in (*texts, str(sample.target))}) == 3
        assert not any(name in text for text in texts for name in others), "their names are put back"
    own = sum(sample.names[0] in text for sample, texts in zip(FORGET, first, strict=True) for text in texts)
    assert own >= 4, "half of the alternates at least speak of the person who was asked about"
    nameless = [replace(s, names=()) for s in FORGET]
    found = other_texts(replace(where, forget=nameless), AltPOOptions())
    assert all(words(t) != words(str(s.target)) for s, (t,) in zip(nameless, found, strict=True))


def test_classes_are_the_next_guesses() -> None:
    loaded = init_classifier(4, image_size=8)
    rng = np.random.default_rng(0)
    samples = [
        Sample(id=str(i), subject="", target=i % 4, image=rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        for i in range(5)
    ]
    where = Context(loaded.model, loaded.adapter, samples)
    for sample, guesses in zip(samples, next_classes(where, 2), strict=True):
        with torch.no_grad():
            positions = loaded.adapter.positions(loaded.model.eval(), [sample])
            z = positions.head(positions.hidden_ND)[0].tolist()
        ranked = sorted((v for v in range(4) if v != sample.target), key=lambda v: -z[v])
        assert guesses == ranked[:2]
    with pytest.raises(UserError, match="alternates = 4 cannot be: a class has 3 others"):
        next_classes(where, 4)


def test_the_alternates_of_a_run_that_goes_on_are_those_it_began_with(tmp_path: Path) -> None:
    said = iter(range(100))
    first = run(context(llm=lambda _: f"number {next(said)}", work=tmp_path), epochs=1)
    assert json.loads((tmp_path / FILE).read_text())["made"] == [[f"number {i}"] for i in range(4)]
    again = run(context(llm=lambda _: f"number {next(said)}", work=tmp_path), epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_several_alternates_are_several_pairs_and_silence_is_said_aloud() -> None:
    outcome = run(context(), alternates=2, batch_size=4, epochs=1)
    assert outcome.record["steps"] == 2
    assert "no language model was given: the alternates are what the original itself says" in outcome.notes
