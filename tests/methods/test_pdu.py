"""PDU against a slow primal-dual loop with whole logits; when the weight moves and when it does not."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from expunge.errors import UserError
from expunge.methods.pdu import token_mean_loss
from expunge.methods.registry import Context, Outcome, get_method
from family_cases import FORGET, LOADED, RETAIN, fresh, logits, mean_over_tokens, token_log_probs

PLAIN = {
    "batch_size": 99, "retain_batch": 99, "optimizer": "sgd", "learning_rate": 1e-3, "clip": 0.0,
    "schedule": "constant", "warmup": 0.0,
}  # fmt: skip


def run(model: torch.nn.Module, **values: Any) -> Outcome:
    method = get_method("pdu")
    return method(Context(model, LOADED.adapter, FORGET, RETAIN), method.configure({**PLAIN, "epochs": 4, **values}))


@pytest.mark.parametrize("limit", [0.05, 50.0])
def test_steps_are_those_of_a_slow_primal_dual_loop(limit: float) -> None:
    """Two warm-up steps, then λ moves by η times the violation: up when it is there, down to 0 when it is not."""
    model, slow = fresh(), fresh()
    outcome = run(model, limit=limit, alpha=2.0, dual_rate=3.0, dual_warmup=2)
    weight, momentum = 2.0, {n: torch.zeros_like(p) for n, p in slow.named_parameters()}
    for step in range(4):
        margins = []
        for sample in FORGET:
            z = logits(slow, sample)[0]
            margins.append(torch.stack([(row.max() - row.mean()) ** 2 for row in z]))
        flat, kept = mean_over_tokens(margins), -mean_over_tokens([token_log_probs(slow, s) for s in RETAIN])
        logged = outcome.record["log"][step]
        assert logged["dual"] == pytest.approx(weight, rel=1e-4)
        assert (logged["forget"], logged["retain"]) == pytest.approx(
            (float(flat.detach()), float(kept.detach())), rel=1e-4
        )
        slow.zero_grad()
        (flat + weight * kept).backward()
        with torch.no_grad():
            for n, p in slow.named_parameters():
                assert p.grad is not None
                momentum[n] = p.grad.clone() if step == 0 else 0.9 * momentum[n] + p.grad
                p.sub_(1e-3 * momentum[n])
        if step >= 2:
            weight = max(0.0, weight + 3.0 * (float(kept.detach()) - limit))
    assert weight > 2.0 if limit < 1 else weight == 0.0
    for p, q in zip(model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-5)


def test_the_limit_is_the_original_loss_and_some_slack() -> None:
    model = fresh()
    with torch.no_grad():
        own = -float(mean_over_tokens([token_log_probs(model, s) for s in RETAIN]))
    assert token_mean_loss(Context(model, LOADED.adapter, FORGET, RETAIN)) == pytest.approx(own, rel=1e-5)
    assert run(fresh(), epochs=1, slack=0.5).record["limit"] == pytest.approx(1.5 * own, rel=1e-5)
    assert run(fresh(), epochs=1, limit=0.7).record["limit"] == 0.7


def test_the_constraint_holds_where_a_fixed_weight_breaks_it() -> None:
    settings = {"optimizer": "adamw", "learning_rate": 5e-3, "epochs": 60, "alpha": 0.1, "limit": 0.6, "dual_warmup": 0}
    free = run(fresh(), **settings, dual_rate=1e-9).record["log"]
    bound = run(fresh(), **settings, dual_rate=20.0).record["log"]
    assert np.mean([s["retain"] for s in free[-5:]]) > 1.2
    assert np.mean([s["retain"] for s in bound[-5:]]) < 0.8
    assert bound[-1]["forget"] < 0.5 * bound[0]["forget"]


def test_the_weight_survives_a_restart(tmp_path: Any) -> None:
    from expunge.training import loop

    plain = run(fresh(), dual_warmup=1, limit=0.05).model
    stopped, calls = fresh(), []
    save = loop._checkpoint

    def killed(*arguments: Any) -> None:
        save(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_checkpoint", killed)
        method = get_method("pdu")
        options = method.configure({**PLAIN, "epochs": 4, "dual_warmup": 1, "limit": 0.05, "checkpoint_every": 1})
        with pytest.raises(KeyboardInterrupt):
            method(Context(stopped, LOADED.adapter, FORGET, RETAIN, work=tmp_path), options)
    again = method(Context(fresh(), LOADED.adapter, FORGET, RETAIN, work=tmp_path), options)
    assert len(again.record["log"]) == 4
    for p, q in zip(again.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_is_refused_and_what_is_said() -> None:
    with pytest.raises(UserError, match="retain = kl cannot be, give nll"):
        run(fresh(), retain="kl")
    with pytest.raises(UserError, match=r"limit = 0\.0 cannot be: give a number above 0"):
        get_method("pdu").configure({"limit": 0.0})
    method = get_method("pdu")
    options = method.configure({**PLAIN, "epochs": 1})
    assert any("no retain samples" in n for n in method(Context(fresh(), LOADED.adapter, FORGET), options).notes)
    assert copy.copy(options) == options
