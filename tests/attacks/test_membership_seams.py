"""Membership attacks with passes of their own beyond the tiny text world: pictures, classes, chat, half precision."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from attack_cases import adapter, exam
from expunge.attacks.context import fits, placed_after, tail
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.gradient import gradient_norms
from expunge.attacks.registry import Attack, get_attack
from expunge.data.samples import Sample
from expunge.models.text import TextAdapter
from expunge.models.tiny import init_classifier, init_llava
from slow_loss import run
from tiny_text import tiny_tokenizer

RNG = np.random.default_rng(0)
NAMES = ["lowercase", "recall", "con_recall", "repetition", "pac", "neighbourhood", "gradient_norm", "samia"]
OPTIONS = {"samia": {"n": 2}, "neighbourhood": {"neighbours": 3}, "pac": {"versions": 2}}
PEOPLE = ["Ada Lovelace wrote.", "Grace Hopper sailed.", "Alan Turing ran.", "Mary Shelley dreamt."]


def picture(size: int) -> np.ndarray:
    return RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)


def scored(exam_: Exam, entry: Attack) -> dict[str, Any]:
    found = entry.run(exam_, exam_.audited, entry.configure(OPTIONS.get(entry.name, {})))
    for roles in found.scores.values():
        assert [len(roles[r]) for r in ("forget", "holdout")] == [len(exam_.forget), len(exam_.holdout)]
    return {name: [*roles["forget"], *roles["holdout"]] for name, roles in found.scores.items()}


@pytest.mark.parametrize("name", NAMES)
def test_multimodal_where_declared(name: str) -> None:
    samples = [
        Sample(id=str(i), subject=str(i), prompt="Who is it?" * (i != 3), target=text, image=picture(32))
        for i, text in enumerate(PEOPLE * 2)
    ]
    loaded = init_llava(samples, seed=1)
    world = Exam(
        Checkpoint.of(loaded.model, loaded.adapter), {"forget": samples[:2], "holdout": samples[2:4]},
        aux=samples[4:6], trained=samples[6:],
    )  # fmt: skip
    entry = get_attack(name)
    if "multimodal" in entry.modalities:
        assert entry.missing(world) is None
        assert all(np.isfinite(values).all() for values in scored(world, entry).values())
    else:
        assert "not on a multimodal model" in str(entry.missing(world))


def test_gradient_norm_of_a_classifier() -> None:
    samples = [Sample(id=str(i), subject=str(i), target=i % 3, image=picture(16)) for i in range(4)]
    loaded = init_classifier(3, 16)
    world = Exam(Checkpoint.of(loaded.model, loaded.adapter), {"forget": samples[:2], "holdout": samples[2:]})
    found = scored(world, get_attack("gradient_norm"))["gradient_norm"]
    model = loaded.model.eval()
    for sample, score in zip(samples, found, strict=True):
        pixels = loaded.adapter.collate([sample]).inputs["pixel_values"]
        model.zero_grad()
        logits = model(pixel_values=pixels).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([sample.target])).backward()
        grads = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        assert score == pytest.approx(-math.sqrt(sum(map(float, grads))), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_documents(name: str) -> None:
    documents = {role: [replace(s, prompt="", target=f"{s.prompt} Red {s.target}") for s in exam().samples[role]]
                 for role in ("forget", "holdout")}  # fmt: skip
    world = replace(exam(), samples=documents, shared={})
    assert all(np.isfinite(values).all() for values in scored(world, get_attack(name)).values())


def test_chat_templates_keep_documents_plain() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    chat = TextAdapter(tokenizer=tokenizer, context=64)
    question, before = exam().forget[0], ["ada likes red", "bo likes blue"]
    document = replace(question, id="d", prompt="", target="ada ash likes red")
    for sample in (question, document):
        assert fits(chat, sample, placed_after(sample, before))
    shown = tokenizer.decode(chat.cached(placed_after(document, before)).ids)
    assert "user" not in shown and shown.startswith("ada likes red bo likes blue ada ash")
    checkpoint = Checkpoint.of(exam().audited.model, chat)
    alone, placed = checkpoint.signals([document, placed_after(document, before)])
    assert tail(alone, placed) == len(alone) < len(placed)


def test_half_precision_norms_are_close() -> None:
    model = copy.deepcopy(exam().audited.model)
    single = gradient_norms(model, adapter(), exam().holdout)
    half = gradient_norms(model.to(torch.bfloat16), adapter(), exam().holdout)
    assert half == pytest.approx(single, rel=0.2)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "lowercase"])
def test_a_checkpoint_gets_the_same_scores_in_any_order(name: str) -> None:
    turned = replace(exam(), samples={r: exam().samples[r][::-1] for r in ("forget", "holdout")}, shared={})
    ours = run(name, **OPTIONS.get(name, {})).scores
    entry = get_attack(name)
    theirs = entry.run(turned, turned.audited, entry.configure(OPTIONS.get(name, {}))).scores
    for score, roles in ours.items():
        for role, values in roles.items():
            assert theirs[score][role][::-1] == pytest.approx(values, rel=1e-4, abs=1e-5)
