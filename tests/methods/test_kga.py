"""KGA against section 3 of the paper by hand: two helper models, their gaps to the original, the aligned gap."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.helpers import Helpers
from expunge.methods.kga import gaps, paired
from expunge.methods.registry import Outcome, get_method
from expunge.methods.retrain import from_scratch
from expunge.training.terms import Teacher
from slow_steps import FORGET, PLAIN, RETAIN, UNSEEN, assert_moved_alike, context, fresh, kl, loaded, nll, sgd

KGA = get_method("kga")
OPTIONS: dict[str, Any] = {**PLAIN, "epochs": 3, "learning_rate": 0.02, "helper_rate": 0.02, "stop_gap": 0.0}
QUICK: dict[str, Any] = {"epochs": 1, "helper_rate": 1e-2}


def run(model: nn.Module, keep: Path | None = None, optimizer: str = "sgd", **changes: Any) -> Outcome:
    there = context(model, **{"unseen": UNSEEN, "helpers": Helpers(keep=keep), **changes.pop("roles", {})})
    return KGA(there, KGA.configure({**OPTIONS, "optimizer": optimizer, **changes}))


def helper(folder: Path, name: str) -> nn.Module:
    """The kept helper model: its parameters, shared ones under one name."""
    model, weights = fresh(), load_file(folder / f"{name}.safetensors")
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(weights[n])
    return model


def test_steps_follow_the_paper(tmp_path: Path) -> None:
    model, slow = fresh(), fresh()
    old = copy.deepcopy(slow)
    outcome = run(model, tmp_path, alpha=0.4)
    f, n = helper(tmp_path, "forget"), helper(tmp_path, "unseen")
    partners = paired(FORGET, UNSEEN, 3)
    wanted = [float(kl(n, old, [z]).detach()) for z in partners]

    def objective() -> Tensor:
        apart = [abs(kl(f, slow, [y]) - c) for y, c in zip(FORGET, wanted, strict=True)]
        return torch.stack(apart).mean() + 0.4 * kl(old, slow, RETAIN)

    values = sgd(slow, [objective] * 3, 0.02)
    for step, value in zip(outcome.record["log"], values, strict=True):
        assert step["forget"] + 0.4 * step["retain"] == pytest.approx(value, rel=2e-3)
    assert_moved_alike(model, slow, old)
    assert outcome.record["aim"] == pytest.approx(np.mean(wanted), rel=1e-3)
    before = np.mean([float(kl(f, old, [y]).detach()) for y in FORGET])
    assert outcome.record["gap_before"] == pytest.approx(before, rel=1e-3)


def test_the_helpers_know_only_their_own_as_well_as_the_original_knows_forget(tmp_path: Path) -> None:
    run(fresh(), tmp_path, "adamw", epochs=1, helper_rate=1e-2)
    f, n = helper(tmp_path, "forget"), helper(tmp_path, "unseen")
    partners = paired(FORGET, UNSEEN, 3)
    level = float(nll(loaded().model, FORGET).detach())
    for model, own, other in ((f, FORGET, UNSEEN), (n, partners, FORGET)):
        assert 0.5 * level < float(nll(model, own).detach()) < 1.1 * level < float(nll(model, other).detach()) - 0.5


def test_the_gap_ends_at_the_never_seen_one() -> None:
    model = fresh()
    outcome = run(
        model, optimizer="adamw", epochs=80, learning_rate=5e-3, schedule="cosine", helper_rate=1e-2, clip=1.0
    )
    found = outcome.record
    assert found["aim"] > 2 * found["gap_before"]
    assert found["gap"] == pytest.approx(found["aim"], rel=0.1)
    assert float((nll(model, FORGET) - nll(loaded().model, FORGET)).detach()) > 0.5
    assert [e["name"] for e in found["helpers"]] == ["forget", "unseen"]
    assert all(e["destroyed"] and e["samples"] == len(FORGET) for e in found["helpers"])


def test_a_sample_that_is_its_own_never_seen_twin_has_nothing_to_lose() -> None:
    """Both helpers are the same model then, both gaps the same number: the original is the answer."""
    model = fresh()
    roles = {"forget": FORGET[:1], "unseen": FORGET[:1], "retain": ()}
    outcome = run(model, optimizer="sgd", roles=roles, stop_gap=1e-4, epochs=5)
    assert outcome.record["aim"] == pytest.approx(outcome.record["gap_before"], rel=1e-4)
    assert len(outcome.record["log"]) == 1, "aligned before it began"
    for p, q in zip(model.parameters(), loaded().model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-2 * 0.02)


def test_gaps_are_means_over_each_samples_tokens() -> None:
    first, second = fresh(), from_scratch(fresh(), 1)
    found = gaps(Teacher.of(first, loaded().adapter, UNSEEN), second, loaded().adapter, UNSEEN)
    assert found == pytest.approx({s.id: float(kl(first, second, [s]).detach()) for s in UNSEEN}, rel=1e-4)


def test_partners_are_used_evenly_and_what_is_missing_is_said() -> None:
    few = UNSEEN[:2]
    twice = paired(FORGET, few, 0)
    assert len(twice) == len(FORGET) and {twice.count(s) for s in few} == {len(FORGET) // 2}
    assert len({s.id for s in paired(FORGET, UNSEEN, 0)}) == len(FORGET)
    notes = run(fresh(), optimizer="adamw", roles={"retain": ()}, **QUICK).notes
    assert any("no base" in n for n in notes) and any("no retain samples" in n for n in notes)
    with pytest.raises(UserError, match="needs unseen data"):
        run(fresh(), roles={"unseen": ()})


def test_refuses_what_is_no_weight() -> None:
    for wrong in ({"alpha": -1}, {"helper_epochs": 0}, {"helper_rate": -1}):
        with pytest.raises(UserError, match="cannot be: give numbers of 0 or more"):
            KGA.configure(wrong)
