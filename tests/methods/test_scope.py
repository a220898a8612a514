"""Scopes, chains, helper models: what any method may be combined with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.matrix.worlds import world
from torch import nn

from expunge.bench.plan import parse_methods
from expunge.errors import UserError
from expunge.methods.helpers import Helpers
from expunge.methods.scope import get_scope, held, top_share


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_masked_entries_stay_under_momentum_and_weight_decay(make: type[torch.optim.Optimizer]) -> None:
    model = two_layers()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    mask = torch.rand(4, 4) > 0.5
    with held(model, {"0.weight": mask, "0.bias": torch.ones(4, dtype=torch.bool)}):
        optimizer = make(model.parameters(), lr=0.1, weight_decay=0.3)  # type: ignore[call-arg]
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            assert torch.equal(model.get_parameter("0.weight")[~mask], before["0.weight"][~mask])
    after = model.state_dict()
    assert not torch.equal(after["0.weight"][mask], before["0.weight"][mask])
    assert not torch.equal(after["0.bias"], before["0.bias"])
    frozen = [n for n in before if not n.startswith("0.")]
    assert all(torch.equal(after[n], before[n]) for n in frozen), "batch statistics of a frozen module included"
    assert all(p.requires_grad for p in model.parameters())
    optimizer.step()  # the hook is gone with the block
    assert not torch.equal(model.get_parameter("0.weight")[~mask], before["0.weight"][~mask])


def test_top_share_takes_exactly_the_largest() -> None:
    scores = {"a": torch.tensor([[3.0, 1.0], [1.0, 1.0]]), "b": torch.tensor([2.0])}
    chosen = top_share(scores, 0.6)
    assert chosen["a"].tolist() == [[True, True], [False, False]] and chosen["b"].tolist() == [True]
    with pytest.raises(UserError, match="share 0"):
        top_share(scores, 0)


def test_scopes_by_name_say_what_is_wrong() -> None:
    with pytest.raises(UserError, match="did you mean 'layers'"):
        get_scope("layer", {})
    with pytest.raises(UserError, match="scope 'all' has no option 'share'"):
        get_scope("all", {"share": 1})
    context = world("text").context(scope=get_scope("layers", {"names": "*.nothing.*"}))
    with pytest.raises(UserError, match=r"no trainable parameter is called '\*\.nothing\.\*': names of this model are"):
        context.scope.masks(context)  # type: ignore[union-attr]
    only = get_scope("layers", {"names": "*.mlp.*+*norm*"})
    assert only is not None
    assert all(".mlp." in n or "norm" in n for n in only.masks(world("text").context()))


def test_a_chain_runs_one_after_another_and_promises_what_all_promise() -> None:
    chained, alone = parse_methods("npo:epochs=1>finetune:epochs=1,npo:epochs=1")
    method, options = chained.whole()
    assert method.needs == {"retain"} and method.name == "npo>finetune"
    outcome = method(world("text").context(), options)
    between = alone.method(world("text").context(), alone.configured()).model
    last = chained.then[0]
    by_hand = last.method(world("text").context(model=copy.deepcopy(between)), last.configured()).model
    assert all(torch.equal(a, b) for a, b in zip(outcome.model.parameters(), by_hand.parameters(), strict=True))
    assert set(outcome.record) >= {"1-npo", "2-finetune"}
    with pytest.raises(UserError, match="unknown method 'finetun'"):
        parse_methods("npo>finetun")


def test_helpers_are_destroyed_or_kept_on_purpose(tmp_path: Path) -> None:
    model, result = two_layers(), two_layers()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    helpers = Helpers(keep=tmp_path / "kept")
    helpers.add("expert", model, [], "for the test")
    helpers.add("same", result, [], "becomes the result")
    helpers.finish(result)
    assert not any(t.any() for t in model.state_dict().values())
    assert all(torch.equal(t, state[n]) for n, t in load_file(tmp_path / "kept" / "expert.safetensors").items())
    assert helpers.record[0]["destroyed"] and helpers.record[0]["kept"] == "expert.safetensors"
    assert helpers.record[1]["kept"] == "as the result" and helpers.record[1]["destroyed"] is None
    assert any(bool(t.any()) for t in result.state_dict().values())
