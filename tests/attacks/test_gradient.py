"""Gradient norms against a plain backward pass; nothing is left in the model."""

from __future__ import annotations

import math

import pytest
import torch

from attack_cases import adapter, exam
from expunge.attacks.exam import Checkpoint
from expunge.attacks.gradient import gradient_norm, gradient_norms
from expunge.attacks.registry import get_attack
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.lora import LoraOptions, apply_lora
from slow_loss import assert_finds, run
from tiny_text import tiny_model, tiny_tokenizer


def slow(model: torch.nn.Module, sample: Sample, norm: str, over: str) -> float:
    """Labels given to the model itself, .backward(), norms in plain Python."""
    tokenizer = tiny_tokenizer()
    before = tokenizer(sample.prompt)["input_ids"]
    ids = torch.tensor([before + tokenizer(str(sample.target))["input_ids"] + [2]])
    labels = ids.clone()
    labels[0, : len(before)] = -100
    model.zero_grad()
    model(input_ids=ids, labels=labels).loss.backward()
    grads = [p.grad.double().flatten().tolist() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    def one(values: list[float]) -> float:
        if norm == "inf":
            return max(map(abs, values))
        return math.fsum(abs(v) ** int(norm) for v in values) ** (1 / int(norm))

    return sum(map(one, grads)) / len(grads) if over == "tensors" else one([v for g in grads for v in g])


@pytest.mark.parametrize("over", ["all", "tensors"])
@pytest.mark.parametrize("norm", ["1", "2", "inf"])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_a_plain_backward_pass(norm: str, over: str, tied: bool) -> None:
    model, samples = tiny_model(3, tied=tied).eval(), exam().forget[:3]
    found = gradient_norms(model, adapter(), samples, norm, over)
    assert found == pytest.approx([slow(model, s, norm, over) for s in samples], rel=1e-4)


def test_finds_the_original_and_nothing_in_a_retrain() -> None:
    assert_finds("gradient_norm", members=0.8)


def test_the_model_is_not_touched() -> None:
    model = exam().audited.model
    before = {name: p.clone() for name, p in model.state_dict().items()}
    run("gradient_norm")
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_adapters_are_measured_over_the_merged_weights() -> None:
    """A fresh adapter changes nothing, so the norms are those of the model without it, frozen as that is."""
    model = tiny_model(3, tied=False).eval()
    entry = get_attack("gradient_norm")
    plain = gradient_norm(exam(), Checkpoint.of(model, adapter()), entry.configure({})).scores
    wrapped = apply_lora(tiny_model(3, tied=False), LoraOptions(r=2)).eval()
    found = gradient_norm(exam(), Checkpoint.of(wrapped, adapter()), entry.configure({})).scores
    assert found["gradient_norm"]["forget"] == pytest.approx(plain["gradient_norm"]["forget"], rel=1e-4)


def test_a_sample_without_a_token_has_no_norm() -> None:
    empty = Sample(id="e", subject="e", target="")
    assert math.isnan(gradient_norms(tiny_model(), adapter(), [empty])[0])


def test_wrong_norm() -> None:
    with pytest.raises(UserError, match="allowed are 1, 2, inf"):
        run("gradient_norm", norm="3")
    with pytest.raises(UserError, match="Allowed: all, tensors"):
        gradient_norms(tiny_model(), adapter(), exam().forget, "2", "each")
