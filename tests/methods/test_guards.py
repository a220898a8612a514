"""Guards of the families: each on what it is for, against the same run without it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from expunge.errors import UserError
from expunge.methods.forget_terms import unlikelihood_C
from expunge.methods.guards import LOOKED_AT, spread
from expunge.methods.registry import Context, Outcome, get_method
from expunge.models.losses import mean_losses
from expunge.training import loop
from family_cases import DATA, FORGET, LOADED, RETAIN, fresh, logits

UNSEEN = DATA["holdout"]


def run(name: str, epochs: float = 1, *, unseen: Any = UNSEEN, work: Path | None = None, **values: Any) -> Outcome:
    method = get_method(name)
    settings = {"epochs": epochs, "batch_size": 2, "retain_batch": 2, "learning_rate": 1e-2, **values}
    context = Context(fresh(), LOADED.adapter, FORGET, RETAIN, unseen, seed=1, work=work)
    return method(context, method.configure(settings))


def losses(model: torch.nn.Module, samples: Any) -> list[float]:
    return mean_losses(model, LOADED.adapter, samples)


# -- bounded objectives ------------------------------------------------------------------------------------------------


def test_unlikelihood_is_minus_log_one_minus_p_and_exact_at_certainty() -> None:
    z = torch.tensor([[2.0, -1.0, 0.5], [60.0, 0.0, -3.0]], dtype=torch.float32, requires_grad=True)
    y = torch.tensor([0, 0])
    values = unlikelihood_C(z, y)
    p = log_softmax(z.detach().double(), 1).exp()[:, 0]
    assert float(values[0].detach()) == pytest.approx(-math.log(1 - float(p[0].detach())), rel=1e-6)
    assert float(values[1].detach()) == pytest.approx(60 - math.log(1 + math.exp(-3)), rel=1e-6), (
        "1 − p is 0 in float32"
    )
    values.sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad[:, 0].double(), p, rtol=1e-5, atol=0)  # d/dz_y = p: it fades


def test_unlikelihood_through_the_row() -> None:
    parts = []
    with torch.no_grad():
        for sample in FORGET:
            z, y = logits(fresh(), sample)
            parts += [-math.log(1 - float(torch.softmax(row, 0)[t])) for row, t in zip(z, y, strict=True)]
    first = run("ga", ascent="unlikelihood", batch_size=99).record["log"][0]
    assert first["forget"] == pytest.approx(np.mean(parts), rel=1e-4)
    assert first["forget_nll"] == pytest.approx(np.mean(losses(fresh(), FORGET)), rel=1e-4)


def test_a_bounded_ascent_ends_where_the_plain_one_runs_away() -> None:
    plain, bounded = run("ga", 60).model, run("ga", 60, ascent="unlikelihood").model
    assert np.mean(losses(plain, FORGET)) > 30
    assert 3 < np.mean(losses(bounded, FORGET)) < 0.5 * np.mean(losses(plain, FORGET))


@pytest.mark.parametrize("name", ["ga", "npo", "undial", "entropy"])
def test_samples_above_the_bound_move_nothing(name: str) -> None:
    """With a bound between their losses, the gradient is that of the samples below it alone, out of all of them."""
    before = losses(fresh(), FORGET)
    bound = float(np.median(before))
    below = [s for s, loss in zip(FORGET, before, strict=True) if loss <= bound]
    assert 0 < len(below) < len(FORGET)
    plain = {"optimizer": "sgd", "clip": 0.0, "warmup": 0.0, "schedule": "constant", "batch_size": 99, "retain": "none"}
    method = get_method(name)

    def step(samples: Any, **values: Any) -> torch.Tensor:
        model = fresh()
        options = method.configure({**plain, "epochs": 1, "learning_rate": 1e-3, **values})
        method(Context(model, LOADED.adapter, samples, seed=1), options)
        return torch.cat(
            [(p - q).detach().flatten() for p, q in zip(model.parameters(), fresh().parameters(), strict=True)]
        )

    counts = [sum(LOADED.adapter.num_targets(s) for s in samples) for samples in (below, FORGET)]
    share = len(below) / len(FORGET) if name == "npo" else counts[0] / counts[1]
    for micro_tokens in (20, 10_000):
        torch.testing.assert_close(
            step(FORGET, bound=bound, micro_tokens=micro_tokens), share * step(below), rtol=2e-3, atol=1e-6
        )
    assert not bool(step(FORGET, bound=1e-6).any())
    torch.testing.assert_close(step(FORGET, bound=1e6), step(FORGET))


def test_with_a_bound_the_ascent_stops_by_itself() -> None:
    found = losses(run("graddiff", 60, bound=4.0).model, FORGET)
    assert min(found) > 3 and np.mean(found) < 0.5 * np.mean(losses(run("graddiff", 60).model, FORGET))


# -- stopping rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ga", "npo", "entropy", "idk", "random-labels", "pdu"])
def test_it_stops_at_the_level_of_never_seen_texts(name: str) -> None:
    level = float(np.mean(losses(fresh(), UNSEEN)))
    outcome = run(name, 80, stop="unseen", look_every=3)
    log = outcome.record["log"]
    looks = [s["forget_measured"] for s in log if "forget_measured" in s]
    assert len(log) < 160 and len(log) % 3 == 0 and len(looks) == len(log) / 3
    assert looks[-1] >= level > max(looks[:-1], default=0.0)
    assert float(np.mean(losses(outcome.model, FORGET))) == pytest.approx(looks[-1], rel=1e-5)
    wanted = f"forget loss {looks[-1]:.3g} has reached that of never-seen texts, {level:.3g}"
    assert outcome.record["stopped"] == wanted
    assert f"stopped after {len(log)} of 160 steps: {wanted}" in outcome.notes


def test_one_look_per_pass_by_default_and_none_without_the_rule() -> None:
    log = run("npo", 3, stop="unseen", learning_rate=1e-6).record["log"]
    assert ["forget_measured" in s for s in log] == [False, True] * 3
    outcome = run("npo", 3)
    assert not any("forget_measured" in s for s in outcome.record["log"]) and "stopped" not in outcome.record


@pytest.mark.parametrize("name", ["npo", "undial", "entropy", "altpo"])
def test_the_loss_guard_stops_every_row_that_meets_the_answers(name: str) -> None:
    start = float(np.mean(losses(fresh(), FORGET)))
    outcome = run(name, 60, stop_loss=start + 0.5)
    log = outcome.record["log"]
    assert outcome.record["stopped"] == f"forget loss above {start + 0.5}" and len(log) < 120
    seen = [s["forget_nll"] for s in log]
    assert np.mean(seen[-3:]) > start + 0.5 >= np.mean(seen[-4:-1])


def test_a_large_set_is_looked_at_in_part() -> None:
    many = list(range(1000))
    assert len(spread(many)) == LOOKED_AT and spread(many)[0] == 0 and spread(many)[-1] == 999  # type: ignore[arg-type]
    assert spread(many[:5]) == many[:5]  # type: ignore[arg-type]


# -- the learning rate -------------------------------------------------------------------------------------------------


def test_the_rate_is_halved_while_retain_suffers() -> None:
    """Not for five steps at the beginning nor after each halving; the rise is that over the first five steps' mean."""
    outcome = run("graddiff", 30, ease=0.3, learning_rate=3e-2)
    log = outcome.record["log"]
    retain, halved = [s["retain"] for s in log], [i for i, s in enumerate(log) if "rate_factor" in s]
    assert halved and [log[i]["rate_factor"] for i in halved] == [0.5 ** (k + 1) for k in range(len(halved))]
    since = 5
    for i in range(len(log)):
        due = i + 1 >= since + 5 and np.mean(retain[i - 4 : i + 1]) > np.mean(retain[:5]) + 0.3
        assert due == (i in halved), i
        since = i + 1 if due else since
    assert not any("rate_factor" in s for s in run("graddiff", 30, ease=1e9).record["log"])


def test_a_halved_rate_halves_the_step() -> None:
    model = torch.nn.Linear(1, 1)

    def halve(trainer: loop.Trainer) -> None:
        trainer.rate *= 0.5
        trainer.log.steps[-1]["weight"] = float(model.weight.detach())

    def compute(trainer: loop.Trainer, picks: Any) -> dict[str, float]:
        model.weight.grad = torch.ones(1, 1)
        return {"loss": 0.0}

    options = loop.TrainOptions(optimizer="sgd", learning_rate=0.1, schedule="constant", warmup=0.0, clip=0.0, epochs=3)
    plan = loop.EpochPlan({"train": [1]}, {"train": 1}, 3, "train")
    with torch.no_grad():
        model.weight.zero_()
    log = loop.train(
        model, LOADED.adapter, {"train": loop.Feed(FORGET[:1])}, [], plan, options, compute=compute, on_step=halve
    )
    momentum, weight = 0.0, 0.0
    for step, found in enumerate(log.steps):
        momentum = 0.9 * momentum + 1.0
        weight -= 0.1 * 0.5**step * momentum
        assert found["weight"] == pytest.approx(weight, rel=1e-6)


# -- restarts and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [{"ease": 0.3}, {"stop": "unseen", "look_every": 2}, {"stop_loss": 6.0}])
def test_guards_go_on_where_they_were(guard: dict[str, Any], tmp_path: Path) -> None:
    settings = {**guard, "learning_rate": 3e-2, "checkpoint_every": 3}
    plain = run("graddiff", 12, **settings)
    for kill_at in (2, 4):
        calls = []
        save = loop._checkpoint

        def killed(*arguments: Any, limit: int = kill_at, seen: list[int] = calls, save: Any = save) -> None:
            save(*arguments)
            seen.append(1)
            if len(seen) == limit:
                raise KeyboardInterrupt

        work = tmp_path / str(kill_at)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "_checkpoint", killed)
            if len(plain.record["log"]) > 3 * kill_at:
                with pytest.raises(KeyboardInterrupt):
                    run("graddiff", 12, work=work, **settings)
        again = run("graddiff", 12, work=work, **settings)
        assert again.record["log"] == plain.record["log"] and again.notes == plain.notes
        for p, q in zip(again.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_run_that_has_stopped_leaves_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_checkpoint", lambda trainer, *_: saved.append(trainer.step))
        log = run("ga", 50, stop_loss=6.0, checkpoint_every=1, work=tmp_path).record["log"]
    assert saved == list(range(1, len(log)))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("idk", {"bound": 3.0}, r"idk trains on refusals and never meets the answers: use stop=unseen"),
        ("idk-nll", {"stop_loss": 3.0}, r"never meets the answers"),
        ("ga", {"stop": "unseen", "unseen": ()}, r"stop=unseen needs unseen data, .*--holdout FILE"),
        ("ga", {"ease": 1.0}, r"ease looks at the retain term: give retain data"),
        ("ga", {"bound": -1.0}, r"bound = -1\.0 cannot be: give a number above 0"),
        ("npo", {"look_every": 0}, r"look_every = 0 cannot be: give 1 or more"),
        ("npo", {"gamma": -1.0}, r"gamma = -1\.0 cannot be: give 0 or more"),
        ("npo", {"beta": 0.0}, r"beta = 0\.0 cannot be"),
        ("simnpo", {"delta": math.nan}, r"delta = nan cannot be: give a finite number"),
        ("ga", {"stop": "later"}, r"'stop' = later: allowed are never, unseen"),
        ("ga", {"ascent": "sin"}, r"'ascent' = sin: allowed are log, unlikelihood"),
    ],
)
def test_one_sentence_for_what_cannot_be(name: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        run(name, **values)
    text = str(raised.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text
