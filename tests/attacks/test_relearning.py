"""Relearning learns what it is shown, on a copy, and never sees what is measured."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.attacks.relearning import relearn, split
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Batch
from expunge.models.lora import LoraOptions, apply_lora
from expunge.models.text import TextAdapter
from expunge.signals.forward import collect
from tiny_text import learned, tiny_adapter, tiny_dataset, tiny_model, tiny_tokenizer

FORGET = tiny_dataset(forget=6)["forget"]


def loss(model: torch.nn.Module, samples: Sequence[Sample]) -> float:
    return sum(s.loss for s in collect(model, tiny_adapter(), samples)) / len(samples)


@dataclass
class Watching(TextAdapter):
    """Remembers which samples went through with gradients on."""

    trained: set[str] = field(default_factory=set)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        if torch.is_grad_enabled():
            self.trained |= {s.id for s in samples}
        return super().collate(samples)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_is_a_partition_with_both_sides(count: int, share: float, seed: int) -> None:
    samples = [Sample(id=str(i), subject="s", target=f"t{i}") for i in range(count)]
    shown, kept = split(samples, share, seed)
    assert shown and kept
    assert sorted([*shown, *kept], key=lambda s: int(s.id)) == samples
    assert abs(len(shown) - share * count) <= 1
    again, _ = split(samples[::-1], share, seed)
    assert {s.id for s in again} == {s.id for s in shown}


def test_split_takes_a_fifth_and_depends_on_the_seed() -> None:
    samples = [Sample(id=str(i), subject="s", target=f"t{i}") for i in range(60)]
    drawn = [{s.id for s in split(samples, seed=seed)[0]} for seed in (0, 0, 1)]
    assert len(drawn[0]) == 12 and drawn[0] == drawn[1] != drawn[2]


def test_equal_contents_stay_on_one_side() -> None:
    samples = [Sample(id=f"{i}/{turn}", subject="s", target=f"t{i}") for i in range(6) for turn in range(3)]
    for seed in range(10):
        shown, kept = split(samples, 0.3, seed)
        assert not {s.target for s in shown} & {s.target for s in kept}


def test_never_trains_on_the_measured_samples() -> None:
    adapter = Watching(tokenizer=tiny_tokenizer(), context=64)
    shown, kept = split(FORGET)
    relearn(tiny_model(), adapter, shown, steps=3)
    assert adapter.trained == {s.id for s in shown}
    assert not adapter.trained & {s.id for s in kept}


def test_equals_adamw_on_the_whole_batch() -> None:
    model, adapter = tiny_model(), tiny_adapter()
    slow = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(slow.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(4):
        optimizer.zero_grad()
        (-adapter.positions(slow, FORGET).log_prob_N().mean()).backward()
        optimizer.step()
    fast = relearn(model, adapter, FORGET, steps=4, learning_rate=2e-3, micro_tokens=30)
    for (name, mine), theirs in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5), name


def test_learns_what_it_is_shown_and_leaves_the_model_alone() -> None:
    model = learned(tiny_dataset(forget=6)["retain"], epochs=10)
    before = copy.deepcopy(model.state_dict())
    for parameter in list(model.parameters())[1:]:
        parameter.requires_grad_(False)  # as an unlearning method may have left it
    shown, _ = split(FORGET)
    attacked = relearn(model, tiny_adapter(), shown, steps=30, learning_rate=5e-3)
    assert loss(attacked, shown) < 0.5 * loss(model, shown)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert sum(p.requires_grad for p in model.parameters()) == 1
    moved = [not torch.equal(before[n], t) for n, t in attacked.state_dict().items()]
    assert all(moved)  # what was frozen is free for the attacker


def test_is_deterministic_and_follows_the_number_of_steps() -> None:
    shown, _ = split(FORGET)
    first, again, longer = (relearn(tiny_model(), tiny_adapter(), shown, steps=n) for n in (5, 5, 6))
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, again, longer)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_adapter_is_merged_and_everything_is_trained() -> None:
    wrapped = apply_lora(tiny_model(), LoraOptions(r=2))
    attacked = relearn(wrapped, tiny_adapter(), FORGET, steps=1)
    assert not hasattr(attacked, "peft_config") and hasattr(wrapped, "peft_config")
    fresh = tiny_model().state_dict()
    assert all(not torch.equal(t, fresh[n]) for n, t in attacked.state_dict().items())


def test_mistakes_are_refused() -> None:
    model, adapter = tiny_model(), tiny_adapter()
    with pytest.raises(UserError, match="at least one sample"):
        relearn(model, adapter, [])
    with pytest.raises(UserError, match="at least 1"):
        relearn(model, adapter, FORGET, steps=0)
    with pytest.raises(UserError, match="between 0 and 1"):
        split(FORGET, 1.0)
    with pytest.raises(UserError, match="two different"):
        split([FORGET[0], replace(FORGET[0], id="again")])
