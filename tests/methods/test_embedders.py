"""Every method that takes classifiers, on a face embedder: what its angles and its margin do to them."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from tests.matrix.rows import TABLE
from tests.matrix.worlds import pictures, terse
from torch import nn

from expunge.data.samples import Sample
from expunge.methods.registry import Context, all_methods
from expunge.models.am_softmax import CosineHead
from expunge.models.attached import own_parameters
from expunge.models.load import Loaded
from expunge.models.losses import mean_losses
from expunge.models.tiny import init_classifier
from expunge.training.loop import TrainOptions, fit

torch.set_num_threads(1)
CROWD = pictures(30, 3, 0)
FORGET, RETAIN, UNSEEN = CROWD[:6], CROWD[6:24], CROWD[24:]
METHODS = {n: m for n, m in all_methods().items() if "classifier" in m.modalities and not n.startswith("zone-")}
# A margin of 12 nats leaves probabilities of 1 to the last bit. What asks for these, and not for the loss that is
# learnt, has no gradient there; UNDIAL lowers the logit by 10, which such a gap does not feel.
SATURATED = {"entropy", "undial", "grad-projection", "whp"}


@cache
def world() -> tuple[Loaded, nn.Module]:
    """The face embedder that has learnt forget and retain, and the one that has learnt nothing."""
    made = init_classifier(3, 16, arch="resnet-am-softmax")
    start = copy.deepcopy(made.model)
    fit(made.model, made.adapter, [*FORGET, *RETAIN], TrainOptions(epochs=25, batch_size=8, learning_rate=5e-3))
    return made, start


def loss(model: nn.Module, samples: list[Sample]) -> float:
    return float(np.mean(mean_losses(model, world()[0].adapter, samples)))


@pytest.mark.parametrize("name", METHODS)
def test_it_forgets_and_keeps_on_embedders_what_it_does_elsewhere(name: str) -> None:
    made, start = world()
    method, row = METHODS[name], TABLE[name]
    assert loss(made.model, FORGET) < 1e-6
    context = Context(
        copy.deepcopy(made.model), made.adapter, FORGET, RETAIN, UNSEEN, base=lambda: copy.deepcopy(start), llm=terse
    )
    model = method(context, method.configure({**row.options, **row.of.get("resnet", {})})).model
    old = dict(made.model.named_parameters())
    assert any(not torch.equal(p, old[n]) for n, p in own_parameters(model).items()) != (method.changes == "beside")
    assert sum(isinstance(m, CosineHead) for m in model.modules()) == 1
    assert (loss(model, FORGET) > 0.2) == (row.forgets and name not in SATURATED)
    assert np.isfinite(loss(model, RETAIN))
    if row.keeps:
        assert loss(model, RETAIN) < 0.5 * loss(start, RETAIN)
