"""Forsaken against autograd on the product of loss and shift; the prior; what it does without its data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.matrix.worlds import world
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.forsaken import mean_prediction
from expunge.methods.registry import get_method

PLAIN = {
    "batch_size": 99, "retain_batch": 99, "optimizer": "sgd", "learning_rate": 0.02, "clip": 0.0, "epochs": 3,
    "schedule": "constant", "warmup": 0.0,
}  # fmt: skip
METHOD = get_method("forsaken")


def log_probs(model: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    """(L, V) and the L targets, from the text world's full logits."""
    batch = world("text").adapter.collate([sample])
    return model(**batch.inputs).logits[0][batch.cols_N].log_softmax(1), batch.targets_N


def prior(samples: tuple[Sample, ...]) -> Tensor:
    with torch.no_grad():
        return torch.cat([log_probs(world("text").original, s)[0].exp() for s in samples]).mean(0)


def slow(penalty: float, steps: int) -> nn.Module:
    here = world("text")
    model: Any = copy.deepcopy(here.original)
    parameters, start = list(model.parameters()), list(here.original.parameters())
    momentum = [torch.zeros_like(p) for p in parameters]
    q = prior(here.unseen)
    for _ in range(steps):
        each = [(q * (q.log() - row)).sum() for s in here.forget for row in log_probs(model, s)[0]]
        nll = torch.cat([-row.gather(1, y[:, None])[:, 0] for row, y in (log_probs(model, s) for s in here.retain)])
        shift = torch.stack([(p - o.detach()).abs().sum() for p, o in zip(parameters, start, strict=True)]).sum()
        loss = torch.stack(each).mean() + penalty * nll.mean() * shift
        with torch.no_grad():
            for p, g, m in zip(parameters, torch.autograd.grad(loss, parameters), momentum, strict=True):
                m.mul_(0.9).add_(g)
                p.sub_(0.02 * m)
    return model


@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_it_is_the_gradient_of_the_product(penalty: float) -> None:
    here = world("text")
    got = METHOD(here.context(), METHOD.configure(PLAIN | {"penalty": penalty})).model
    triples = list(zip(got.parameters(), slow(penalty, 3).parameters(), here.original.parameters(), strict=True))
    far = max(float((o - q).detach().abs().max()) for _, q, o in triples)
    assert far > 1e-3 and max(float((p - q).detach().abs().max()) for p, q, _ in triples) < 2e-3 * far


def test_the_prior_is_the_mean_prediction() -> None:
    here = world("text")
    got = mean_prediction(here.original, here.adapter, here.unseen)
    assert torch.allclose(got, prior(here.unseen), atol=1e-6) and float(got.sum()) == pytest.approx(1, abs=1e-5)


def test_the_first_step_has_no_shift_and_the_divergence_of_the_original() -> None:
    here = world("text")
    first = METHOD(here.context(), METHOD.configure(PLAIN | {"epochs": 1})).record["log"][0]
    q = prior(here.unseen)
    with torch.no_grad():
        wanted = torch.cat([(q * (q.log() - log_probs(here.original, s)[0])).sum(1) for s in here.forget]).mean()
    assert first["shift"] == 0 and first["forget"] == pytest.approx(float(wanted), rel=1e-4)


def test_a_price_keeps_the_shift_small() -> None:
    here = world("text")

    def shift(penalty: float) -> float:
        settings = METHOD.configure(PLAIN | {"epochs": 10, "penalty": penalty})
        return float(METHOD(here.context(retain=()), settings).record["log"][-1]["shift"])

    assert shift(0.1) < 0.5 * shift(0.0)


def test_without_strangers_the_prior_comes_from_retain() -> None:
    here = world("text")
    bare = METHOD(here.context(unseen=(), retain=()), METHOD.configure(PLAIN))
    assert any("no never-seen texts" in note and "forget samples" in note for note in bare.notes)
    assert any("no retain samples" in note for note in bare.notes) and "retain" not in bare.record["log"][0]
    some = METHOD(here.context(unseen=()), METHOD.configure(PLAIN))
    assert any("prediction on retain samples" in note for note in some.notes)


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match=r"penalty = -1\.0 cannot be: give 0 or more"):
        METHOD.configure({"penalty": -1.0})
