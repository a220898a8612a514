"""The selector by Fisher importance, against dense curvature."""

from __future__ import annotations

import numpy as np
import pytest
from tests.matrix.worlds import world
from tests.methods.softmax_world import Regression, RegressionAdapter, hessian, points, weight_of

from expunge.errors import UserError
from expunge.methods.registry import Context, get_method
from expunge.methods.scope import get_scope

FORGET, RETAIN = points(4, seed=1), points(12, seed=2)


def masks(samples_retain: tuple, **values: object) -> np.ndarray:  # type: ignore[type-arg]
    scope = get_scope("fisher", values)
    assert scope is not None
    found = scope.masks(Context(Regression(), RegressionAdapter(), FORGET, samples_retain))
    return np.asarray(found["linear.weight"].numpy().reshape(-1))


def test_the_largest_ratios_are_chosen() -> None:
    weight = weight_of(Regression())
    f, r = (np.diag(hessian(weight, s)) / len(s) for s in (FORGET, RETAIN))
    ratio = f / (r + 1e-3 * r.mean())
    chosen = masks(RETAIN, share=0.25, labels="every")
    assert chosen.sum() == 3 and set(np.flatnonzero(chosen)) == set(np.argsort(-ratio)[:3])


def test_without_retain_importance_alone_ranks() -> None:
    f = np.diag(hessian(weight_of(Regression()), FORGET))
    assert set(np.flatnonzero(masks((), share=0.25, labels="every"))) == set(np.argsort(-f)[:3])


def test_it_scopes_another_method_and_keeps_retain_better_than_chance() -> None:
    here = world("text")
    npo = get_method("npo")
    options = npo.configure({"epochs": 6, "batch_size": 3, "learning_rate": 4e-3, "retain": "none"})
    loss = {}
    for name in ("fisher", "random"):
        model = npo(here.context(scope=get_scope(name, {"share": 0.05})), options).model
        loss[name] = here.loss(model, here.forget), here.loss(model, here.retain)
    assert loss["fisher"][0] > loss["random"][0], "more is forgotten by as many weights"


@pytest.mark.parametrize("values", [{"share": 0.0}, {"share": 1.5}, {"damping": 0.0}])
def test_numbers_outside_their_domain(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be"):
        get_scope("fisher", values)


def test_embeddings_of_tokens_that_do_not_occur_are_not_chosen() -> None:
    here = world("text")
    scope = get_scope("fisher", {"share": 0.01})
    assert scope is not None
    table = scope.masks(here.context())["model.embed_tokens.weight"]
    seen = set(here.adapter.collate(here.forget).inputs["input_ids"].flatten().tolist())
    unused = [i for i in range(len(table)) if i not in seen]
    assert unused and bool(table.any()) and not bool(table[unused].any())
