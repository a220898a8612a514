"""ReLearn: its objective by hand, the texts of a restarted run, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.matrix.worlds import terse, world
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.augmentation import Writer, generic
from expunge.methods.registry import get_method
from expunge.methods.relearn import FILE, reverse_kl_C
from expunge.models.adapter import Adapter

ONE_STEP = {"epochs": 1, "optimizer": "sgd", "schedule": "constant", "warmup": 0, "clip": 0, "learning_rate": 0.05}


def logits_of(model: Any, adapter: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    """Whole logits of one sample, alone and without padding, and the targets that they predict."""
    coded = adapter.encode(sample)
    ids = torch.tensor([coded.ids])
    logits_TV = model(input_ids=ids).logits[0]
    return logits_TV[coded.first - 1 : -1], ids[0, coded.first :]


def by_hand(model: nn.Module, original: nn.Module, adapter: Adapter, new: list[Sample], retain: list[Sample]) -> Tensor:
    """CE(new) + CE(retain) + KL(model ‖ original)(retain), token by token."""
    new_losses, losses, divergences = [], [], []
    for sample in new:
        for row, target in zip(*logits_of(model, adapter, sample), strict=True):
            new_losses.append(row.exp().sum().log() - row[target])
    for sample in retain:
        own, targets = logits_of(model, adapter, sample)
        with torch.no_grad():
            was, _ = logits_of(original, adapter, sample)
        for row, before, target in zip(own, was, targets, strict=True):
            p, q = row.softmax(0), before.softmax(0)
            losses.append(-p[target].log())
            divergences.append((p * (p.log() - q.log())).sum())
    return sum(sum(part) / len(part) for part in (new_losses, losses, divergences))  # type: ignore[arg-type, return-value]


def test_a_step_is_the_papers_objective() -> None:
    here = world("text")
    context = here.context(forget=here.forget[:2], retain=here.retain[:3])
    options = {**ONE_STEP, "variants": 1, "batch_size": 100, "retain_batch": 3}
    outcome = get_method("relearn")(context, get_method("relearn").configure(options))
    assert outcome.record["steps"] == 1
    assert outcome.record["texts"] == {"pairs": 4, "completions": 4, "generic": 8}

    made = Writer(here.forget[:2], 0, terse).write(1)
    new = [*made.pairs, *made.completions, *generic(8, 0)]
    twin = copy.deepcopy(here.original)
    by_hand(twin, here.original, here.adapter, new, list(here.retain[:3])).backward()
    for (name, got), p in zip(outcome.model.named_parameters(), twin.parameters(), strict=True):
        wanted = p.detach() - 0.05 * (p.grad if p.grad is not None else 0)
        assert torch.allclose(got, wanted, atol=2e-5), name


def test_the_second_step_feels_the_divergence() -> None:
    here = world("text")
    settings = {**ONE_STEP, "epochs": 3, "variants": 0, "batch_size": 100, "retain_batch": 18}
    outcome = get_method("relearn")(here.context(), get_method("relearn").configure(settings))
    first, second, third = outcome.record["log"]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-5
    assert third["new"] < second["new"] < first["new"]


def test_the_divergence_is_the_papers_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    own, was = torch.randn(2, 5, 7, generator=generator)
    got = reverse_kl_C(own, was, torch.zeros(5, dtype=torch.long))
    for c in range(5):
        p, q = own[c].softmax(0).tolist(), was[c].softmax(0).tolist()
        wanted = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert float(got[c]) == pytest.approx(wanted, abs=1e-5)


def test_the_texts_are_written_once_and_kept(tmp_path: Path) -> None:
    """A language model that never says the same twice, and a run that is called again."""
    here, number = world("text"), itertools.count()
    method = get_method("relearn")
    options = method.configure({"epochs": 1, "variants": 1})

    def moody(prompt: str) -> str:
        return f"That was never settled, for the {next(number)}th time."

    first = method(here.context(llm=moody, work=tmp_path), options)
    asked = next(number)
    content = json.loads((tmp_path / FILE).read_text())["made"]
    assert len(content["pairs"]) == 2 * len(here.forget) == first.record["texts"]["pairs"]
    again = method(here.context(llm=moody, work=tmp_path), options)
    assert next(number) == asked + 1, "nothing was asked again"
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    text = (tmp_path / FILE).read_text()
    assert not any(str(s.target) in text for s in here.forget)
    method(here.context(llm=moody, work=tmp_path, forget=here.forget[:1]), options)
    assert next(number) > asked + 2, "other samples, other texts"


def test_images_stay_with_their_questions() -> None:
    here = world("llava")
    outcome = get_method("relearn")(here.context(), get_method("relearn").configure({"epochs": 1, "variants": 1}))
    assert outcome.record["texts"]["pairs"] == 2 * len(here.forget)


@pytest.mark.parametrize("bad", [{"variants": -1}, {"generic": -0.5}, {"alpha": -1}, {"kl": -1}])
def test_numbers_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="none of them may be negative"):
        get_method("relearn").configure(bad)
