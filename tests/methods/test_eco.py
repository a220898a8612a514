"""Embedding-corrupted prompts: classifier, threshold and corruption by hand; what is guarded and what is not."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from expunge.errors import UserError
from expunge.methods.eco import MODULUS, PRIME, Corruption, EcoOptions, conformal, eco, features_BH, prompts, search
from expunge.methods.registry import Context, get_method
from expunge.models.attached import attach, attachments
from expunge.models.load import Loaded, load_model, save_model
from expunge.training.loop import TrainOptions, fit
from tiny_text import tiny_adapter, tiny_dataset, tiny_model

ECO = get_method("eco")


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


def guarded(model: Any, *, dims: int = 4, threshold: float = -math.inf, rows: int = 5) -> tuple[Any, Corruption]:
    guard = Corruption(50, rows, dims)
    guard.noise_WD.copy_(torch.randn(rows, dims, generator=torch.Generator().manual_seed(1)))
    guard.sigma.fill_(2.0)
    guard.threshold.fill_(threshold)
    return attach(model, guard), guard


def embedded(model: Any, guard: Corruption, ids: list[int], prompt: int) -> Tensor:
    """The embeddings with noise on the first ``prompt`` tokens, one number at a time."""
    rows = [model.get_input_embeddings().weight[i].detach().clone() for i in ids]
    for t in range(prompt):
        for d in range(guard.noise_WD.shape[1]):
            rows[t][d] += float(guard.sigma) * float(guard.noise_WD[t % len(guard.noise_WD), d])
    return torch.stack(rows)[None]


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_a_flagged_prompt_is_corrupted_and_the_answer_is_not(make: Any) -> None:
    plain = make().eval()
    model, guard = guarded(copy.deepcopy(plain))
    samples, adapter = list(tiny_dataset()["forget"]), tiny_adapter()
    with torch.no_grad():
        got = adapter.positions(model, samples).log_prob_N()
        want = []
        for sample in samples:
            coded = adapter.encode(sample)
            states = embedded(plain, guard, list(coded.ids), coded.first)
            rows = plain(inputs_embeds=states).logits[0].log_softmax(1)
            want += [rows[t - 1, coded.ids[t]] for t in range(coded.first, len(coded.ids))]
    assert torch.allclose(got, torch.stack(want), atol=1e-5)
    guard.threshold.fill_(math.inf)
    with torch.no_grad():
        unflagged, own = (adapter.positions(m, samples).log_prob_N() for m in (model, plain))
    assert torch.equal(unflagged, own) and not torch.allclose(got, own, atol=1e-2)


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_generation_sees_the_same_prompt_whatever_the_padding(make: Any) -> None:
    plain = make().eval()
    model, guard = guarded(copy.deepcopy(plain))
    queries, steps = [[6, 8, 20, 12], [31, 14], [9, 9, 30]], 5
    wanted = []
    for query in queries:
        said: list[int] = []
        for _ in range(steps):
            with torch.no_grad():
                logits = plain(inputs_embeds=embedded(plain, guard, [*query, *said], len(query))).logits[0, -1]
            said.append(int(logits.argmax()))
        wanted.append(said)
    ids_BT = torch.tensor([[0] * (4 - len(q)) + q for q in queries])
    mask_BT = torch.tensor([[0] * (4 - len(q)) + [1] * len(q) for q in queries])
    got = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert got[:, 4:].tolist() == wanted


def test_what_is_given_as_embeddings_passes_and_nothing_is_left_after_a_pass() -> None:
    plain = tiny_model().eval()
    model, guard = guarded(copy.deepcopy(plain))
    states = plain.get_input_embeddings()(torch.tensor([[6, 8, 20]]))
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=states).logits, plain(inputs_embeds=states).logits)
        model(input_ids=torch.tensor([[6, 8, 20]]))
        assert torch.equal(model.get_input_embeddings()(torch.tensor([[6, 8, 20]])), states)
    assert guard._shift_BTD is None and guard._prompt_B is None


def test_the_flag_does_not_depend_on_the_answer() -> None:
    here = world("text")
    model = ECO(here.context()).model
    one = here.forget[0]
    other = replace(one, id="other", target=str(here.retain[0].target))
    guard: Any = attachments(model)[0]
    seen: list[Tensor] = []
    handle = model.base_model.register_forward_pre_hook(lambda *_: seen.append(guard._shift_BTD.clone()))  # type: ignore[operator, union-attr]
    for sample in (one, other):
        here.adapter.positions(model, [sample])
    handle.remove()
    first = here.adapter.encode(one).first
    assert torch.equal(seen[0][:, :first], seen[1][:, :first]) and seen[0][:, :first].abs().min() > 0
    assert not seen[0][:, first:].any() and not seen[1][:, first:].any()


# -- the classifier ----------------------------------------------------------------------------------------------------


def test_features_are_the_ngrams_of_the_prompt() -> None:
    rng = np.random.default_rng(0)
    ids_BT = torch.tensor(rng.integers(0, 60, (4, 7)))
    mask_BT = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [0] * 7]).bool()
    got = features_BH(ids_BT, mask_BT, 101)
    for ids, mask, row in zip(ids_BT.tolist(), mask_BT.tolist(), got, strict=True):
        prompt = [i for i, m in zip(ids, mask, strict=True) if m]
        buckets = set()
        for n in (1, 2, 3):
            for start in range(len(prompt) - n + 1):
                code = n
                for token in prompt[start : start + n]:
                    code = (code * PRIME + token + 1) % MODULUS
                buckets.add(code % 101)
        want = [1 / math.sqrt(len(buckets)) if b in buckets else 0.0 for b in range(101)]
        assert row.tolist() == pytest.approx(want, abs=1e-6)
    left, right = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[5, 6, 0, 0]])
    assert torch.equal(features_BH(left, left > 0, 101), features_BH(right, right > 0, 101))


def test_the_threshold_lets_through_no_more_than_it_may() -> None:
    """Of exchangeable scores, the share above the conformal threshold of n others is at most alpha."""
    rng = np.random.default_rng(0)
    above = [rng.normal() > conformal(rng.normal(size=39), 0.1) for _ in range(4000)]
    assert 0.08 < np.mean(above) <= 0.11
    assert conformal(np.array([3.0, 1.0, 2.0]), 0.05) == 3.0, "too few: the largest"
    assert conformal(np.arange(99.0), 0.05) == 94.0


def test_prompts_in_other_words_are_known_and_other_people_are_not() -> None:
    data, adapter = tiny_dataset(people=20, forget=3, holdout=8), tiny_adapter()
    context = Context(tiny_model(), adapter, data["forget"], data["retain"], data["holdout"])
    guard: Any = attachments(eco(context, EcoOptions(steps=0)).model)[0]
    again = [replace(s, id=f"{s.id}/again", prompt=f"who is {s.subject} of rome") for s in data["forget"]]

    def flagged(samples: Any) -> float:
        return float((guard.scores(*prompts(adapter, samples)) > guard.threshold).float().mean())

    assert flagged(data["forget"]) == 1 and flagged(again) == 1
    assert flagged(data["retain"]) == 0 and flagged(data["holdout"]) <= 0.1
    utility = tiny_dataset(people=20, forget=3, holdout=8, utility=6)["utility"]
    assert flagged(utility) <= 0.2, "people in neither the fit nor the calibration"


def test_documents_have_no_prompt_and_are_not_guarded() -> None:
    here = world("text")
    model = ECO(here.context()).model
    page = replace(here.forget[0], id="page", prompt="")
    assert here.losses(model, (page,)) == here.losses(here.original, (page,))


# -- the strength ------------------------------------------------------------------------------------------------------


def test_the_search_finds_where_the_level_is_met() -> None:
    calls: list[float] = []

    def miss(u: float) -> float:
        calls.append(u)
        return abs(4 / (1 + math.exp(-2 * (u - 2.3))) - 1.5)

    found, missed, path = search(miss, 0.0, EcoOptions(steps=40))
    exact = 2.3 - 0.5 * math.log(4 / 1.5 - 1)
    assert found == pytest.approx(exact, abs=0.02) and missed == min(path) < 0.05
    assert len(calls) == 9 + 80
    assert search(lambda u: 1.0, 0.0, EcoOptions(steps=2))[0] == -3.0, "flat everywhere: the weakest noise of the grid"


def test_the_level_is_that_of_never_seen_samples() -> None:
    here = world("text")
    record = ECO(here.context()).record
    assert record["wanted_loss"] == pytest.approx(here.loss(here.original, here.unseen), rel=1e-4)
    alone = ECO(here.context(unseen=())).record
    assert 0 < alone["wanted_loss"] != record["wanted_loss"]


def test_forgets_keeps_exactly_and_comes_back(tmp_path: Path) -> None:
    here = world("text")
    model = ECO(here.context()).model
    assert here.losses(model, here.retain) == here.losses(here.original, here.retain), "no false alarm here"
    assert here.loss(model, here.forget) > here.loss(here.original, here.forget) + 1
    again = load_model(save_model(Loaded(model, here.adapter, ""), tmp_path / "m"), device="cpu")
    assert here.losses(again.model, here.forget) == pytest.approx(here.losses(model, here.forget), rel=1e-4)
    twin = copy.deepcopy(model)
    attachments(twin)[0].sigma.zero_()  # type: ignore[operator, union-attr]
    assert here.losses(twin, here.forget) == pytest.approx(here.losses(here.original, here.forget), rel=1e-4)
    assert here.loss(model, here.forget) > 1, "a copy has noise of its own"


def test_training_goes_through_the_guard() -> None:
    """Relearning attacks train the guarded model: gradients are finite, and buffers stay."""
    here = world("text")
    model = copy.deepcopy(ECO(here.context()).model)
    before = {n: b.clone() for n, b in model.named_buffers()}
    fit(model, here.adapter, here.forget, TrainOptions(epochs=2, learning_rate=1e-2))
    assert here.loss(model, here.forget) < here.loss(ECO(here.context()).model, here.forget)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize(
    "bad", [{"alpha": 0}, {"alpha": 1}, {"rate": 0}, {"difference": 0}, {"buckets": 0}, {"probes": 0}, {"dims": -1}]
)
def test_numbers_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        ECO.configure(bad)
    with pytest.raises(UserError, match="have 16: give at most"):
        ECO(world("text").context(), ECO.configure({"dims": 17}))
