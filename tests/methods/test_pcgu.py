"""PCGU: pairs, partition, choice and step, each against loops on the definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world
from tests.methods.softmax_world import Regression, RegressionAdapter, features, points, weight_of

from expunge.errors import UserError
from expunge.methods.pcgu import as_mask, contrast_N, least_similar, surrogates, vectors
from expunge.methods.registry import Context, get_method
from expunge.methods.scope import get_scope
from expunge.training.terms import View

PCGU = get_method("pcgu")


@pytest.mark.parametrize("direction", ["down", "up"])
def test_one_step_moves_the_vectors_that_tell_the_classes_apart(direction: str) -> None:
    """∂z_y/∂W is x in row y: the gradients of both logits are sums of pictures by class."""
    forget = points(8, seed=3)
    model = Regression()
    start = weight_of(model)
    context = Context(model, RegressionAdapter(), forget)
    xs, ys = features(forget)
    others = [int(s.target) for s in surrogates(context)]
    true, other = np.zeros((3, 4)), np.zeros((3, 4))
    for x, y, z in zip(xs, ys, others, strict=True):
        true[y] += x / len(xs)
        other[z] += x / len(xs)
    cosine = [
        float(t @ o / (np.linalg.norm(t) * np.linalg.norm(o))) if t.any() and o.any() else math.inf
        for t, o in zip(true, other, strict=True)
    ]
    row = int(np.argmin(cosine))
    wanted = start.copy()
    wanted[row] += -0.3 * true[row] if direction == "down" else 0.3 * other[row]
    settings = {"epochs": 1, "learning_rate": 0.3, "share": 0.34, "direction": direction}
    PCGU(context, PCGU.configure(settings))
    assert np.allclose(weight_of(model), wanted, atol=1e-5)


@pytest.mark.parametrize("partition", ["input", "output"])
def test_vectors_and_masks_of_every_kind_of_weight(partition: str) -> None:
    for shape in ((4,), (4, 3), (4, 3, 2, 2)):
        tensor = torch.arange(math.prod(shape)).reshape(shape)
        rows = vectors(tensor, partition)
        units = 1 if len(shape) == 1 else shape[0] if partition == "input" else shape[1]
        assert len(rows) == units
        chosen = torch.zeros(units, dtype=torch.bool)
        chosen[-1] = True
        mask = as_mask(chosen, tensor, partition)
        assert mask.shape == tensor.shape and sorted(tensor[mask].tolist()) == sorted(rows[-1].tolist())


def test_the_lowest_cosines_over_all_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 5), "b": (5,), "c": (4, 3, 2, 2)}
    true = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    other = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    true["a"][2] = 0.0  # no gradient: never chosen
    scores = []
    for name, t in true.items():
        pieces = (
            [(0, t.flatten(), other[name].flatten())]
            if t.ndim == 1
            else [(i, t[i].flatten(), other[name][i].flatten()) for i in range(len(t))]
        )
        for i, u, v in pieces:
            if u.any():
                scores.append((float(u @ v / (u.norm() * v.norm())), name, i))
    wanted = {(name, i) for _, name, i in sorted(scores)[:4]}  # 0.36 of 11
    masks = least_similar(true, other, 0.36, "input")
    found = {(name, i) for name, m in masks.items() for i in range(len(m) if m.ndim > 1 else 1) if bool(m[i].any())}
    assert found == wanted
    assert not least_similar(true, other, 1.0, "input")["a"][2].any()


def test_surrogates_answer_the_same_question_in_the_same_name() -> None:
    here = world("text")
    pairs = list(zip(here.forget, surrogates(here.context()), strict=True))
    assert all(s.prompt == o.prompt and s.target != o.target and s.id != o.id for s, o in pairs)
    colour = [o for s, o in pairs if "colour" in s.prompt]
    assert colour and all(f"{o.names[0]} likes" in str(o.target) for o in colour)
    assert surrogates(here.context()) == surrogates(here.context())


def test_surrogates_without_anybody_else() -> None:
    here = world("text")
    own = [s for s in here.forget if s.subject == here.forget[0].subject]
    refusals = surrogates(here.context(forget=own, retain=()))
    assert all("refusal" in o.id for o in refusals)
    pictures = world("resnet")
    other = surrogates(pictures.context())
    assert all(int(o.target) != int(s.target) for s, o in zip(pictures.forget, other, strict=True))


def test_only_tokens_that_the_other_answer_lacks_count() -> None:
    here = world("text")
    one = here.forget[0]
    name, words = one.names[0], str(one.target).split()
    other = replace(one, id="other", target=" ".join([*words[:-1], "gold" if words[-1] != "gold" else "teal"]))
    copies = replace(one, id="copy")
    with torch.no_grad():
        positions = here.adapter.positions(here.original, [one, other, copies])
        own, twin, same = (View(positions.select(i, i + 1), [s]) for i, s in enumerate((one, other, copies)))
        logits = own.positions.per_token(lambda z, y: z.gather(1, y[:, None])[:, 0])
        values = contrast_N(own, twin, "logit")
        lacking = [t not in twin.positions.targets_N.tolist() for t in own.positions.targets_N.tolist()]
        assert any(lacking) and not all(lacking) and name
        assert torch.allclose(values, logits * torch.tensor(lacking))
        assert torch.allclose(contrast_N(own, same, "logit"), logits), "all count where nothing differs"
        assert torch.allclose(contrast_N(own, twin, "log-prob"), own.log_prob_N() * torch.tensor(lacking))


def test_the_same_choice_as_a_scope_for_another_method() -> None:
    here = world("text")
    scope = get_scope("pcgu", {"share": 0.1})
    assert scope is not None
    masks = scope.masks(here.context())
    total = sum(len(vectors(m, "input")) for m in masks.values())
    assert sum(int(vectors(m, "input").any(1).sum()) for m in masks.values()) == round(0.1 * total)
    npo = get_method("npo")
    outcome = npo(here.context(scope=scope), npo.configure({"epochs": 6, "batch_size": 3, "learning_rate": 1e-2}))
    assert here.loss(outcome.model, here.forget) > here.loss(here.original, here.forget) + 0.1


def test_the_guard_stops_and_says_so() -> None:
    here = world("text")
    outcome = PCGU(here.context(), PCGU.configure({"stop_loss": 0.5, "epochs": 40, "learning_rate": 0.02}))
    assert outcome.record["steps"] < 40 and any("forget loss above 0.5" in note for note in outcome.notes)


@pytest.mark.parametrize("values", [{"share": 0.0}, {"share": 2.0}, {"epochs": 0.0}])
def test_numbers_outside_their_domain(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be"):
        PCGU.configure(values)
    if "share" in values:
        with pytest.raises(UserError, match="cannot be"):
            get_scope("pcgu", values)
