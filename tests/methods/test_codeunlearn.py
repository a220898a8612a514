"""CodeUnlearn: the bottleneck in loops, its gradients by hand, Fisher's exact test, deletion and what comes after."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.worlds import World, world
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.codebook import Codebook
from expunge.methods.codeunlearn import book_of, enrichment
from expunge.methods.registry import get_method
from expunge.models.attached import attach
from expunge.models.load import Loaded, load_model, save_model

METHOD = get_method("codeunlearn")
QUICK = {"epochs": 2, "codes": 64, "batch_size": 6, "learning_rate": 1e-2}
BLOCK = "model.layers.0"


def here() -> World:
    return world("text")


def book(codes: int = 12, top: int = 3, width: int = 5, seed: int = 0) -> Codebook:
    """A codebook in which everything is random."""
    made = Codebook(block=BLOCK, width=width, codes=codes, top=top)
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=chance))
    return made


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def slowly(made: Codebook, h: Tensor) -> tuple[list[int], Tensor]:
    """The chosen codes of one state, best first, and what the state becomes."""
    z = (h @ made.encode).detach()
    left = [k for k in range(len(made.codes)) if not bool(made.get_buffer("deleted")[k])]
    best = sorted(left, key=lambda k: -cosine(z, made.codes[k].detach()))[: made.top]
    total = torch.zeros(made.width)
    for k in best:
        total = total + made.codes[k]
    return best, total @ made.decode + made.bias


def test_states_become_the_sum_of_the_nearest_codes_one_by_one() -> None:
    made = book()
    made.get_buffer("deleted")[torch.tensor([2, 7])] = True
    states = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3))
    out = made._replaced(nn.Identity(), (), states)
    tupled = made._replaced(nn.Identity(), (), (states, "cache"))
    assert tupled[1] == "cache" and torch.equal(tupled[0], out)
    maps = made._replaced(nn.Identity(), (), states.movedim(-1, 1)[..., None])  # (B, C, H, W)
    assert torch.allclose(maps[..., 0].movedim(1, -1), out, atol=1e-6)
    for b in range(2):
        for t in range(4):
            best, wanted = slowly(made, states[b, t])
            assert not {2, 7} & set(best)
            assert made.choose(states[b, t] @ made.encode).tolist() == best
            assert torch.allclose(out[b, t], wanted, atol=1e-5)


def test_scale_of_a_state_does_not_choose_its_codes() -> None:
    made, z = book(), torch.randn(7, 5, generator=torch.Generator().manual_seed(4))
    assert torch.equal(made.choose(z), made.choose(1000 * z))


def test_gradients_go_straight_through() -> None:
    """Codes, D and b: the true gradient for this choice of codes. E: as if z itself had been decoded."""
    made = book()
    h = torch.randn(5, generator=torch.Generator().manual_seed(6))
    towards = torch.randn(5, generator=torch.Generator().manual_seed(7))
    best, wanted = slowly(made, h)
    parameters = [made.codes, made.decode, made.bias]
    slow = torch.autograd.grad(wanted @ towards, parameters)
    loss = made._replaced(nn.Identity(), (), h) @ towards
    fast = torch.autograd.grad(loss, [*parameters, made.encode])
    for a, b in zip(fast, slow, strict=False):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(fast[-1], torch.outer(h, made.decode.detach() @ towards), atol=1e-5)
    assert {int(k) for k in fast[0].abs().sum(1).nonzero()} == set(best)


def test_penalty_is_the_stated_one_and_leaves_padding_out() -> None:
    made = book()
    made.commitment, made.lengths = 0.25, [4, 2]
    states = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3))
    out = made._replaced(nn.Identity(), (), states)
    assert made.penalty_B is not None
    for b, length in enumerate(made.lengths):
        total = 0.0
        for t in range(length):
            h, z = states[b, t], (states[b, t] @ made.encode).detach()
            codes = sum((made.codes[k] for k in slowly(made, h)[0]), torch.zeros(5)).detach()
            total += ((out[b, t] - h).square().sum() / h.square().sum()).item()
            total += 1.25 * float((z - codes).square().sum() / z.square().sum())
        assert made.penalty_B[b].item() == pytest.approx(total / length, rel=1e-5)
    # The codebook part moves the codes alone, the commitment moves E alone, by the ratio β.
    states_1 = states[:1, :1]
    grads = []
    for beta in (0.0, 0.5):
        made.commitment, made.lengths = beta, None
        made._replaced(nn.Identity(), (), states_1)
        grads.append(torch.autograd.grad(made.penalty_B.sum(), [made.encode, made.codes]))
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-6) and not torch.allclose(grads[0][0], grads[1][0])


# -- the test of enrichment --------------------------------------------------------------------------------------------


def test_enrichment_is_fishers_exact_test_by_counting() -> None:
    rng = np.random.default_rng(0)
    forget, control = rng.random((6, 9)) < 0.6, rng.random((15, 9)) < 0.3
    for k, p in enumerate(enrichment(forget, control)):
        inside, users = int(forget[:, k].sum()), int(forget[:, k].sum() + control[:, k].sum())
        ways = sum(math.comb(users, i) * math.comb(21 - users, 6 - i) for i in range(inside, min(users, 6) + 1))
        assert p == pytest.approx(ways / math.comb(21, 6), rel=1e-9)


def test_a_code_that_nobody_or_everybody_uses_says_nothing() -> None:
    assert enrichment(np.array([[True, False]] * 5), np.array([[True, False]] * 8)).tolist() == [1.0, 1.0]


def test_near_duplicates_by_cosine() -> None:
    made = book()
    with torch.no_grad():
        made.codes[4] = 3 * made.codes[1] + 0.01
        made.codes[5] = -made.codes[1]
    only = torch.zeros(12, dtype=torch.bool)
    only[1] = True
    for limit in (0.3, 0.9, 0.999):
        wanted = [k for k in range(12) if k == 1 or cosine(made.codes[k].detach(), made.codes[1].detach()) >= limit]
        assert made.near(only, limit).nonzero().flatten().tolist() == wanted
        assert 4 in wanted and 5 not in wanted
    assert not bool(made.near(torch.zeros(12, dtype=torch.bool), 0.1).any())


# -- the method --------------------------------------------------------------------------------------------------------


def planted() -> tuple[Any, tuple[Sample, ...], tuple[Sample, ...]]:
    """Forget samples of one subject that many texts share: its name stands in each prompt and in no other."""
    where = here()
    forget = tuple(
        replace(s, id=f"topic/{i}", prompt=f"{s.prompt} gus hazel gus", subject="topic")
        for i, s in enumerate((*where.forget, *where.unseen))
    )
    return where, forget, where.retain


def test_codes_of_a_topic_are_found_and_deleted_and_the_others_stay() -> None:
    where, forget, retain = planted()
    context = where.context(forget=forget, retain=retain, unseen=())
    outcome = METHOD(context, METHOD.configure({**QUICK, "epochs": 8, "top": 2, "codes": 128, "neighbour": 0.999}))
    made, codes = book_of(outcome.model), outcome.record["codes"]
    assert made is not None and codes["enriched"] > 0 and codes["smallest_p"] < 1e-4
    gone = made.get_buffer("deleted").clone()
    assert codes["deleted"] == int(gone.sum()) == codes["enriched"] + codes["near_duplicates"]
    used = made.usage(outcome.model, where.adapter, [*forget, *retain])
    assert not bool(used[:, gone].any())
    # Undeleted again, the codes are used on the topic far more often than elsewhere.
    made.get_buffer("deleted").zero_()
    used = made.usage(outcome.model, where.adapter, [*forget, *retain])[:, gone].float()
    assert float(used[: len(forget)].mean()) > 3 * float(used[len(forget) :].mean())


def test_quality_before_and_after_is_reported_apart() -> None:
    where = here()
    outcome = METHOD(where.context(), METHOD.configure(QUICK))
    quality = outcome.record["quality"]
    assert quality["original"]["retain"] == pytest.approx(where.loss(where.original, where.retain), rel=1e-5)
    assert quality["deleted"]["forget"] == pytest.approx(where.loss(outcome.model, where.forget), rel=1e-5)
    assert quality["bottlenecked"]["retain"] > quality["original"]["retain"]
    assert any("original" in n and "bottlenecked" in n and "deleted" in n for n in outcome.notes)


def test_a_second_request_trains_nothing_and_deletes_more() -> None:
    where, forget, retain = planted()
    options = METHOD.configure({**QUICK, "epochs": 8, "top": 2, "codes": 128, "neighbour": 0.999})
    first = METHOD(where.context(unseen=()), options).model
    made = book_of(first)
    assert made is not None
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    gone = made.get_buffer("deleted").clone()
    outcome = METHOD(where.context(model=first, forget=forget, retain=retain), options)
    assert book_of(outcome.model) is made and outcome.record["steps"] == 0
    assert all(torch.equal(p, before[n]) for n, p in made.named_parameters())
    now = made.get_buffer("deleted")
    assert bool((now | ~gone).all()) and int(now.sum()) > int(gone.sum())
    assert any("was used again" in n for n in outcome.notes)


def test_nothing_goes_past_the_bottleneck() -> None:
    """With one code left to choose, every prompt gives the same states behind it."""
    where = here()
    model = copy.deepcopy(where.original)
    made = book(codes=4, top=1, width=16)
    attach(model, made)
    made.get_buffer("deleted")[1:] = True
    with torch.no_grad():
        first, second = (model(torch.tensor([ids])).logits[0, -1] for ids in ([1, 5, 9], [1, 22, 40]))  # type: ignore[operator]
        with made.opened():
            third, fourth = (model(torch.tensor([ids])).logits[0, -1] for ids in ([1, 5, 9], [1, 22, 40]))  # type: ignore[operator]
            plain = where.original(torch.tensor([[1, 5, 9]])).logits[0, -1]
    assert torch.allclose(first, second, atol=1e-5) and not torch.allclose(third, fourth, atol=1e-2)
    assert torch.equal(third, plain)


def test_generation_with_a_cache_and_files(tmp_path: Path) -> None:
    where = here()
    model = METHOD(where.context(), METHOD.configure({**QUICK, "fdr": 0.5})).model
    answers = where.adapter.generate(model, where.retain[:4], 6)
    alone = [where.adapter.generate(model, [s], 6)[0] for s in where.retain[:4]]
    assert answers == alone
    again = load_model(save_model(Loaded(model, where.adapter, ""), tmp_path / "model"), device="cpu")
    assert again.adapter.generate(again.model, where.retain[:4], 6) == answers
    mine, loaded = book_of(model), book_of(again.model)
    assert mine is not None and loaded is not None
    assert torch.equal(mine.get_buffer("deleted"), loaded.get_buffer("deleted"))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"top = 9 cannot be: there are 8 codes to choose from\."):
        METHOD.configure({"top": 9, "codes": 8})
    for name, value in (("fdr", 0), ("neighbour", 1.5), ("codes", 0), ("layer", -1)):
        with pytest.raises(UserError, match=f"{name} = {value}"):
            METHOD.configure({name: value})
    with pytest.raises(UserError, match=r"layer = 2 cannot be: the model has blocks 0 to 1\."):
        METHOD(here().context(), METHOD.configure({**QUICK, "layer": 2}))
    monkeypatch.setattr(Codebook, "near", lambda self, codes_K, cosine: torch.arange(64) > 5)
    with pytest.raises(UserError, match="deleting 58 of 64 codes would leave fewer than the 8"):
        METHOD(here().context(), METHOD.configure(QUICK))
