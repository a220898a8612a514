"""SCRUB against algorithm 1 of the paper by hand: passes in turn, the right divergence, the right epoch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.worlds import pictures, world
from torch import nn

from expunge.errors import UserError
from expunge.methods.registry import Context, get_method
from expunge.methods.scrub import AlternatingPlan, tempered_kl
from expunge.models.am_softmax import embeddings
from expunge.models.losses import error_and_loss
from expunge.models.tiny import init_classifier
from slow_steps import FORGET, PLAIN, RETAIN, UNSEEN, assert_moved_alike, context, fresh, kl, loaded, logits, nll, sgd

SCRUB = get_method("scrub")


def run(model: nn.Module, unseen: Any = (), **values: Any) -> Any:
    return SCRUB(context(model, unseen=unseen), SCRUB.configure({**PLAIN, **values}))


def test_steps_follow_the_paper() -> None:
    """Two epochs, of which one ascends: retain (to leave the saddle), forget, retain, retain."""
    model, slow = fresh(), fresh()
    old = copy.deepcopy(slow)
    outcome = run(model, epochs=2, max_epochs=1, learning_rate=0.1, alpha=0.3, gamma=0.9, temperature=2.0)

    def obey() -> torch.Tensor:
        return 0.3 * 4 * kl(old, slow, RETAIN, 2.0) + 0.9 * nll(slow, RETAIN)

    def disobey() -> torch.Tensor:
        return -4 * kl(old, slow, FORGET, 2.0)

    values = sgd(slow, [obey, disobey, obey, obey], 0.1)
    log = outcome.record["log"]
    assert [set(step) & {"forget", "retain"} for step in log] == [{"retain"}, {"forget"}, {"retain"}, {"retain"}]
    assert -log[1]["forget"] == pytest.approx(values[1], rel=1e-3)
    assert 0.3 * log[2]["retain"] + 0.9 * log[2]["retain_loss"] == pytest.approx(values[2], rel=1e-3)
    assert_moved_alike(model, slow, old)


def test_at_the_original_the_divergence_has_no_gradient() -> None:
    """Why a retain step comes first: the max pass starts in a stationary point."""
    slow = fresh()
    kl(copy.deepcopy(slow), slow, FORGET, 2.0).backward()
    own = max(float(p.grad.abs().max()) for p in slow.parameters() if p.grad is not None)
    slow.zero_grad()
    nll(slow, RETAIN).backward()
    other = max(float(p.grad.abs().max()) for p in slow.parameters() if p.grad is not None)
    assert own < 1e-5 and other > 1e-3


def test_a_high_temperature_compares_logits() -> None:
    """Hinton et al. 2015, eq. 4: T² KL → ½ mean of squared differences of centred logits."""
    generator = torch.Generator().manual_seed(0)
    z, o = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    z, o = (x - x.mean(1, keepdim=True) for x in (z, o))
    found = tempered_kl(1000.0)(z.double(), o.double(), torch.zeros(5))
    torch.testing.assert_close(found.float(), 0.5 * (z - o).square().mean(1), rtol=1e-2, atol=1e-3)


def test_the_plan_passes_over_everything_in_turn() -> None:
    plan = AlternatingPlan({"forget": [1] * 5, "retain": [1] * 7}, {"forget": 2, "retain": 3}, 3, 2, seed=1)
    roles = ["".join(plan.batch(i)) for i in range(plan.steps)]
    assert roles == ["retain"] + (["forget"] * 3 + ["retain"] * 3) * 2 + ["retain"] * 3
    assert plan.ends == [7, 13, 16]
    for first, last, role, count in (
        (1, 4, "forget", 5),
        (4, 7, "retain", 7),
        (7, 10, "forget", 5),
        (13, 16, "retain", 7),
    ):
        assert sorted(i for s in range(first, last) for i in plan.batch(s)[role]) == list(range(count))


def test_error_is_the_share_of_wrong_tokens() -> None:
    model = fresh()
    wrong, losses = [], []
    with torch.no_grad():
        for sample in UNSEEN:
            z, y = logits(model, sample)
            wrong += (z.argmax(1) != y).tolist()
            losses.append(float((z.logsumexp(1) - z[range(len(y)), y]).mean()))
    assert error_and_loss(model, loaded().adapter, UNSEEN) == pytest.approx((np.mean(wrong), np.mean(losses)), rel=1e-4)


def test_rewinds_to_the_epoch_that_a_shorter_run_would_have_ended_with() -> None:
    """The chosen weights are those of the run stopped there; the choice is the nearest error of all max epochs."""
    settings: dict[str, Any] = {"epochs": 6, "max_epochs": 5, "learning_rate": 4e-3, "schedule": "constant"}
    settings |= {"batch_size": 2, "retain_batch": 3, "optimizer": "adamw"}
    model = fresh()
    outcome = run(model, UNSEEN, **settings)
    found = outcome.record
    assert set(found["errors"]) == {1, 2, 3, 4, 5, 6}
    gaps = {e: abs(v - found["unseen_error"]) for e, v in found["errors"].items()}
    assert gaps[found["epoch"]] == min(gaps.values()) and len(set(found["errors"].values())) > 2
    assert 1 < found["epoch"] < 6 and any(f"epoch {found['epoch']} of 6" in note for note in outcome.notes)
    shorter, whole = fresh(), fresh()
    run(shorter, **settings | {"epochs": found["epoch"]}, rewind=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), shorter.parameters(), strict=True))
    notes = run(whole, **settings).notes
    assert any("no never-seen samples" in note for note in notes)
    assert error_and_loss(whole, loaded().adapter, UNSEEN)[0] == found["unseen_error"]
    assert error_and_loss(model, loaded().adapter, FORGET)[0] == found["errors"][found["epoch"]]


def test_refuses_what_is_no_temperature_or_pass() -> None:
    options = SCRUB.options()
    for wrong in ({"temperature": 0.0}, {"max_epochs": 0}, {"alpha": -1.0}):
        with pytest.raises(UserError, match="cannot be: give a temperature above 0, 1 or more max epochs"):
            replace(options, **wrong)


# -- on embeddings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet-am-softmax", "vit-am-softmax"])
def test_on_embeddings_it_turns_them_by_angles(arch: Any) -> None:
    """Retain, forget, retain by hand: α(1 − cos) + γ NLL down, max(0, cos) down."""
    made = init_classifier(3, 16, arch=arch, seed=6)
    shown = pictures(6, 3, 8)
    forget, retain = shown[:3], shown[3:]
    start, slow = copy.deepcopy(made.model), copy.deepcopy(made.model)
    adapter: Any = made.adapter

    def seen(model: nn.Module, samples: Any) -> Any:
        return adapter.positions(model, samples)

    def cosines(samples: Any) -> torch.Tensor:
        with torch.no_grad():
            old = seen(start.eval(), samples).hidden_ND
        new = seen(slow, samples).hidden_ND
        return (new * old).sum(1) / new.norm(dim=1) / old.norm(dim=1)

    def obey() -> torch.Tensor:
        positions = seen(slow, retain)
        margin = 12 * torch.nn.functional.one_hot(positions.targets_N, 3)
        logits = positions.head(positions.hidden_ND) - margin
        return 0.4 * (1 - cosines(retain)).mean() + 0.9 * torch.nn.functional.cross_entropy(logits, positions.targets_N)

    def disobey() -> torch.Tensor:
        return cosines(forget).clamp_min(0).mean()

    slow.train()
    values = sgd(slow, [obey, disobey, obey], 0.004)
    settings = {"epochs": 1, "max_epochs": 1, "learning_rate": 0.004, "compare": "embeddings"}
    options = SCRUB.configure({**PLAIN, **settings, "alpha": 0.4, "gamma": 0.9})
    outcome = SCRUB(Context(made.model, adapter, forget, retain), options)
    log = outcome.record["log"]
    assert 1 - log[1]["forget"] == pytest.approx(values[1], rel=1e-3)
    assert 0.4 * log[2]["retain"] + 0.9 * log[2]["retain_loss"] == pytest.approx(values[2], rel=1e-3)
    assert_moved_alike(outcome.model, slow, start)


def test_on_embeddings_forget_ends_at_a_right_angle() -> None:
    here = world("vit")
    settings = {"epochs": 20, "max_epochs": 20, "batch_size": 6, "learning_rate": 3e-3, "compare": "embeddings"}
    context = here.context(unseen=())
    model = SCRUB(context, SCRUB.configure(settings)).model

    def mean_cosine(samples: Any) -> float:
        old, new = (embeddings(m, here.adapter, samples) for m in (here.original, model))
        return float(np.mean((old * new).sum(1) / np.linalg.norm(old, axis=1) / np.linalg.norm(new, axis=1)))

    assert mean_cosine(here.forget) < 0.5
    assert mean_cosine(here.retain) > 0.9
    assert here.loss(model, here.forget) > here.loss(here.original, here.forget) + 0.5
    assert here.loss(model, here.retain) < 0.3
