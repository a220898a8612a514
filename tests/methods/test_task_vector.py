"""Task vector: the weights against training by hand, the chosen scale against a search by hand, LoRA and batch norm."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, get_method
from expunge.models.lora import LoraOptions, apply_lora
from expunge.models.tiny import init_classifier
from slow_steps import FORGET, PLAIN, RETAIN, UNSEEN, assert_moved_alike, context, fresh, loaded, logits, nll, sgd

TASK_VECTOR = get_method("task-vector")
OPTIONS = {**PLAIN, "epochs": 4, "learning_rate": 0.03}
del OPTIONS["retain_batch"]


def run(model: nn.Module, retain: Any = RETAIN, **values: Any) -> Any:
    return TASK_VECTOR(context(model, retain=retain), TASK_VECTOR.configure({**OPTIONS, **values}))


def accuracy(model: nn.Module, samples: tuple[Sample, ...]) -> float:
    with torch.no_grad():
        hits = [logits(model, s)[0].argmax(1) == logits(model, s)[1] for s in samples]
    return float(torch.cat(hits).float().mean())


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
def test_the_weights_are_the_original_minus_what_was_learnt(scale: float) -> None:
    model, learnt = fresh(), fresh()
    outcome = run(model, scale=scale)
    values = sgd(learnt, [lambda: nll(learnt, FORGET)] * 4, 0.03)
    assert [s["nll"] for s in outcome.record["log"]] == pytest.approx(values, rel=1e-3)
    slow = fresh()
    with torch.no_grad():
        for p, q in zip(slow.parameters(), learnt.parameters(), strict=True):
            p.sub_(scale * (q - p))
    assert_moved_alike(model, slow, loaded().model)


def test_the_scale_is_the_largest_that_keeps_the_retain_accuracy() -> None:
    model, end = fresh(), fresh()
    outcome = run(model, epochs=12, largest=4.0, keep=0.9)
    sgd(end, [lambda: nll(end, FORGET)] * 12, 0.03)
    kept = {}
    for number in range(1, 21):
        slow = fresh()
        with torch.no_grad():
            for p, q in zip(slow.parameters(), end.parameters(), strict=True):
                p.copy_(p - number / 5 * (q - p))
        kept[number / 5] = accuracy(slow, RETAIN) >= 0.9 * accuracy(loaded().model, RETAIN)
    assert any(kept.values()) and not all(kept.values())
    assert outcome.record["scale"] == pytest.approx(max(s for s, good in kept.items() if good))
    assert any("chosen on 6 retain samples" in note for note in outcome.notes)


def test_what_is_chosen_does_not_depend_on_the_never_seen() -> None:
    first, second = fresh(), fresh()
    run(first)
    TASK_VECTOR(context(second, unseen=UNSEEN), TASK_VECTOR.configure(OPTIONS))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_without_retain_or_without_a_good_scale_it_says_so() -> None:
    outcome = run(fresh(), (), largest=0.5)
    assert outcome.record["scale"] == 0.5 and any("no retain samples" in note for note in outcome.notes)
    wild = run(fresh(), keep=1.0, largest=2000.0)
    assert wild.record["scale"] == 100.0 and any("taken all the same" in note for note in wild.notes)


def test_the_helper_is_registered_and_destroyed() -> None:
    there = context(fresh())
    outcome = TASK_VECTOR(there, TASK_VECTOR.configure(OPTIONS))
    (entry,) = outcome.record["helpers"]
    assert entry["samples"] == len(FORGET) and entry["destroyed"]


def test_with_lora_the_update_itself_is_negated() -> None:
    """An adapter that is not zero at the start: twice the scale changes the product of its factors by twice as much."""

    def product(model: Any) -> dict[str, Tensor]:
        weights = {n: p.detach() for n, p in model.named_parameters()}
        firsts = [n for n in weights if ".lora_A." in n]
        return {n: weights[n.replace("lora_A", "lora_B")] @ weights[n] for n in firsts}

    model = apply_lora(fresh(), LoraOptions(r=2))
    run(model, scale=1.0, optimizer="adamw", learning_rate=1e-2)
    before, twin = product(model), copy.deepcopy(model)
    run(model, scale=0.7, optimizer="adamw", learning_rate=1e-2)
    run(twin, scale=1.4, optimizer="adamw", learning_rate=1e-2)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    once, double = product(model), product(twin)
    for name, start in before.items():
        assert float((once[name] - start).abs().max()) > 1e-3
        torch.testing.assert_close(double[name] - start, 2 * (once[name] - start), rtol=1e-3, atol=1e-6)


def test_running_means_stay_the_originals() -> None:
    made = init_classifier(3, image_size=8)
    rng = np.random.default_rng(0)
    crowd = [
        Sample(id=str(i), subject="", target=i % 3, image=rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        for i in range(6)
    ]
    before = {n: b.clone() for n, b in made.model.named_buffers()}
    first = copy.deepcopy(made.model)
    TASK_VECTOR(Context(made.model, made.adapter, crowd[:3], crowd[3:]), TASK_VECTOR.configure({"epochs": 2}))
    assert before and all(torch.equal(b, before[n]) for n, b in made.model.named_buffers())
    assert any(not torch.equal(p, q) for p, q in zip(made.model.parameters(), first.parameters(), strict=True))


def test_refuses_what_is_no_scale() -> None:
    for wrong in ({"scale": 0}, {"keep": 1.2}, {"largest": -1}):
        with pytest.raises(UserError, match="cannot be: give scales above 0"):
            TASK_VECTOR.configure(wrong)
