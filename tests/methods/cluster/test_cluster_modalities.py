"""Text with images: influence by tower and kind of token against a slow sum, planted towers, towers left alone."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.worlds import World, world
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.cluster.edit import divergence
from expunge.methods.cluster.kfac import kfac_factors
from expunge.methods.cluster.localise import Scope, choose_scope, editable
from expunge.methods.cluster.method import build_targets
from expunge.methods.cluster.tokens import placed
from expunge.methods.registry import Context, Outcome, get_method
from expunge.models.adapter import Adapter
from expunge.models.tiny import init_llava
from expunge.models.towers import parameters_of
from expunge.training.loop import TrainOptions, fit
from expunge.training.terms import View

torch.set_num_threads(1)
METHOD = get_method("cluster")
KINDS = (
    "language tokens of the language tower",
    "visual tokens of the language tower",
    "visual tokens of the vision tower",
)


def scope_of(context: Context, **values: Any) -> Scope:
    options = METHOD.configure({"scratch_epochs": 0.0, "groups": "all", **values})
    return choose_scope(context, options, build_targets(context, options, None, False))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(before: dict[str, Tensor], outcome: Outcome) -> set[str]:
    """The towers of which some weight is another one."""
    after = dict(outcome.model.named_parameters())
    return {
        tower
        for tower in ("language", "vision")
        if any(not torch.equal(before[n], after[n].detach()) for n in parameters_of(outcome.model, tower))
    }


# -- against slow sums -------------------------------------------------------------------------------------------------


def tokens_of(model: nn.Module, adapter: Adapter, sample: Sample, names: list[str], value: Any) -> dict[str, Any]:
    """(inputs (n, I), gradients of ``value(positions)`` at the outputs (n, O)) of one sample, by layer."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Any:
        return lambda _m, x, y: seen.update({name: (x[0], y)})

    handles = [modules[n].register_forward_hook(keep(n)) for n in names]
    loss = value(adapter.positions(model, [sample]))
    for handle in handles:
        handle.remove()
    found = {}
    grads = torch.autograd.grad(loss, [y for _, y in seen.values()], allow_unused=True)
    for (name, (inputs, _)), grad in zip(seen.items(), grads, strict=True):
        if grad is None:
            continue
        x, d = inputs.detach(), grad
        if isinstance(modules[name], nn.Conv2d):  # one output place per patch, cut without overlap
            side = modules[name].kernel_size[0]
            x = x.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3)
            d = d.permute(0, 2, 3, 1)
        found[name] = (x.flatten(0, -2).double(), d.flatten(0, -2).double())
    return found


def test_influence_by_modality_is_the_slow_sum() -> None:
    """One sample at a time, one token at a time, dense solves; half of the samples have no image."""
    here = world("llava")
    context = here.context(base=None)
    model, adapter = context.model.eval(), here.adapter
    options = METHOD.configure({"scratch_epochs": 0.0, "groups": "all", "reach": 0.9})
    targets = build_targets(context, options, None, False)
    scope = choose_scope(context, options, targets)
    names = list(scope.record["influence_by_layer"])
    assert any("vision" in n for n in names) and any("projector" in n for n in names)
    units = sum(adapter.num_targets(s) for s in here.forget)

    def value(positions: Any, sample: Sample) -> Tensor:
        return targets.compare(View(positions, [sample]), divergence(options)).sum() / units

    each = [tokens_of(model, adapter, s, names, lambda p, s=s: value(p, s)) for s in here.forget]
    wanted: dict[str, float] = defaultdict(float)
    for name in names:
        gradient = sum(d.T @ x for sample in each if name in sample for x, d in [sample[name]])
        assert isinstance(gradient, Tensor)
        factor = scope.factors[name]
        a, s = factor.input_II.double(), factor.output_OO.double()
        a = a + 0.1 * a.trace() / len(a) * torch.eye(len(a))
        s = s + 0.1 * s.trace() / len(s) * torch.eye(len(s))
        direction = torch.linalg.solve(s, gradient) @ torch.linalg.inv(a)
        for sample, found in zip(here.forget, each, strict=True):
            if name not in found:
                continue
            ids = adapter.cached(sample).ids
            for place, (x_I, d_O) in enumerate(zip(*found[name], strict=True)):
                spoken = "language_model" in name
                kind = int(ids[place] == adapter.image_token_id) if spoken else 2  # type: ignore[attr-defined]
                wanted[KINDS[kind]] += float(d_O @ direction @ x_I)
    total = sum(wanted.values())
    mine = scope.record["influence_by_modality"]
    assert set(mine) == set(KINDS) and min(mine.values()) != 0
    for kind in KINDS:
        assert mine[kind] == pytest.approx(wanted[kind] / total, rel=2e-3, abs=1e-5)


def test_curvature_of_the_vision_tower_is_that_of_images_alone() -> None:
    here = world("llava")
    model = copy.deepcopy(here.original).eval()
    layers = editable(model, here.adapter, here.retain)
    name = next(n for n, layer in layers.items() if layer.images and n.endswith("fc1"))
    factors = kfac_factors(model, here.adapter, here.retain, layers, max_tokens=200)
    states: list[Tensor] = []
    hook = layers[name].module.register_forward_hook(lambda _m, x, _y: states.append(x[0].detach()))
    for sample in here.retain:
        here.adapter.positions(model, [sample])
    hook.remove()
    assert len(states) == sum(s.image is not None for s in here.retain) < len(here.retain)
    inputs = torch.cat([x.flatten(0, 1) for x in states])
    torch.testing.assert_close(factors[name].input_II, inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-5)


def test_tokens_of_images_stand_in_the_rows_that_have_one() -> None:
    batch = world("llava").adapter.collate(world("llava").forget[:3])
    row, col, real = placed(batch, (2, 5), "tower", torch.tensor([0, 2]))
    assert row.tolist() == [0] * 5 + [2] * 5 and col.tolist() == [0, 1, 2, 3, 4] * 2 and real.all()
    with pytest.raises(UserError, match=r"3 images.*scope\.tower=language"):
        placed(batch, (40,), "flat patches", torch.tensor([0, 1, 2]))


def test_visual_and_language_tokens_never_share_a_cluster() -> None:
    here = world("llava")
    scope = scope_of(here.context(base=None), groups="kmeans", clusters=3)
    parts = {(p["tower"], p["tokens"]): p for p in scope.record["parts"] if p["layers"] > 3}
    assert {key: p["clusters"] for key, p in parts.items()} == {
        ("language", "language"): 3, ("language", "visual"): 3, ("vision", "visual"): 3
    }  # fmt: skip
    name = next(n for n in scope.labels if "language_model" in n)
    table, labels_N = scope.tables[name], scope.labels[name]
    ids = [here.adapter.cached(s).ids for s in here.forget]
    token = here.adapter.image_token_id  # type: ignore[attr-defined]
    shown_N = np.array([ids[i][c] == token for i, c in zip(table.sample_N, table.col_N, strict=True)])
    assert set(labels_N[shown_N]) == {3, 4, 5} and set(labels_N[~shown_N]) == {0, 1, 2}
    assert sum(p["influence"] for p in scope.record["parts"]) == pytest.approx(1)
    for p in scope.record["parts"]:
        assert sum(p["influence_by_cluster"]) == pytest.approx(p["influence"])


# -- planted -----------------------------------------------------------------------------------------------------------


WORDS = ("red", "green", "blue", "grey")


def shown(number: int, half: str, word: str, prompt: str = "what is it") -> Sample:
    """A picture whose texture is in its left or right half; the other half is black."""
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    texture = np.random.default_rng([7, number]).integers(60, 256, (16, 8, 3))
    pixels[:, :8] = texture if half == "left" else 0
    pixels[:, 8:] = texture if half == "right" else 0
    return Sample(id=f"{prompt}-{number}", subject=str(number), prompt=prompt, target=word, image=pixels)


@cache
def planted(where: str) -> World:
    """What is to be forgotten was learnt by one tower while the other was frozen.

    vision: the prompts and answers of the retain set, and pictures of another kind. language: its pictures, and prompts
    of other words.
    """
    retain = [shown(i, "left", WORDS[i % 4]) for i in range(24)]
    unseen = [shown(100 + i, "left", WORDS[i % 4]) for i in range(8)]
    if where == "vision":
        forget = [shown(200 + i, "right", WORDS[i % 4]) for i in range(8)]
    else:
        names = ("uvula", "zephyr", "mauve", "quince", "jaguar", "orchid", "walnut", "kiosk")
        forget = [replace(shown(0, "left", WORDS[(i * 3 + 1) % 4], f"who knows {n}")) for i, n in enumerate(names)]
    loaded = init_llava([*forget, *retain, *unseen], image_size=16)
    model, adapter = loaded.model, loaded.adapter
    fit(model, adapter, retain, TrainOptions(epochs=40, batch_size=8, learning_rate=3e-3))
    base = copy.deepcopy(model)
    mine = parameters_of(model, where)
    for name, p in model.named_parameters():
        p.requires_grad_(name in mine)
    fit(model, adapter, [*forget, *retain], TrainOptions(epochs=60, batch_size=8, learning_rate=3e-3))
    for p in model.parameters():
        p.requires_grad_(True)
    return World("llava", adapter, tuple(forget), tuple(retain), tuple(unseen), base, model)


@pytest.fixture(params=["vision", "language"])
def side(request: pytest.FixtureRequest) -> tuple[str, World]:
    return request.param, planted(request.param)


def test_the_planted_tower_is_found_and_the_other_stays_to_the_bit(side: tuple[str, World]) -> None:
    where, here = side
    assert here.loss(here.original, here.forget) < 0.3 < here.loss(here.start, here.forget)
    before = weights(here.original)
    outcome = METHOD(here.context(), METHOD.configure({"groups": "all", "steps": 20, "negations": 2, "epochs": 2}))
    assert moved(before, outcome) == {where} and outcome.record["scope"]["towers"] == [where]
    other = {"vision": "language", "language": "vision"}[where]
    assert any(note.startswith(f"the {other} tower is the base's to the bit") for note in outcome.notes)
    assert any(note.endswith(f"the {where} tower alone edited") for note in outcome.notes)
    assert here.loss(outcome.model, here.forget) > 2 * here.loss(here.original, here.forget)
    assert here.loss(outcome.model, here.retain) < here.loss(outcome.model, here.forget)


def test_without_a_base_the_influence_finds_what_the_language_tower_holds() -> None:
    """The other way round it does not: see docs/flagship.md."""
    here = planted("language")
    scope = scope_of(here.context(base=None), reach=0.9)
    assert scope.record["influence_by_modality"][KINDS[0]] > 0.9 and scope.record["towers"] == ["language"]
    assert scope.spared == parameters_of(here.original, "vision")


def test_what_never_had_an_image_is_not_looked_for_in_the_vision_tower() -> None:
    here = world("llava")
    forget = tuple(replace(s, image=None) for s in here.forget)
    before = weights(here.original)
    outcome = METHOD(here.context(forget=forget), METHOD.configure({"groups": "all", "steps": 6, "negations": 1}))
    assert moved(before, outcome) == {"language"}
    assert set(outcome.record["scope"]["influence_by_modality"]) == {KINDS[0]}


def test_both_towers_are_edited_where_both_have_influence() -> None:
    here = world("llava")
    before = weights(here.original)
    outcome = METHOD(here.context(), METHOD.configure({"groups": "all", "steps": 6, "reach": 0.999}))
    assert moved(before, outcome) == {"language", "vision"}
    assert any(note.endswith("both towers edited") for note in outcome.notes)
    assert all(p.requires_grad for p in outcome.model.parameters())
