"""The flagship whole: options do what they say, earlier requests stay forgotten, notes say what it is blind to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tests.matrix.worlds import World, world
from torch import Tensor, nn

from expunge.data.samples import Modality, Sample
from expunge.errors import UserError
from expunge.methods.cluster import edit as edit_module
from expunge.methods.cluster.edit import EditPlan, divergence
from expunge.methods.cluster.labels import layer_states
from expunge.methods.cluster.layers import linear_layers, output_gradients, recorded
from expunge.methods.cluster.localise import choose_scope
from expunge.methods.cluster.method import anchor_of, build_targets, chosen_members
from expunge.methods.cluster.options import ClusterOptions
from expunge.methods.cluster.targets import Targets
from expunge.methods.registry import Context, Outcome, get_method
from expunge.training.loop import Feed, Trainer, TrainOptions
from expunge.training.terms import Term, View, nll_N

torch.set_num_threads(1)
METHOD = get_method("cluster")
FAST = {"steps": 12, "groups": "all", "negations": 2}


def run(context: Context, **values: Any) -> Outcome:
    return METHOD(context, METHOD.configure(FAST | values))


def text() -> World:
    return world("text")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def rise(outcome: Outcome, here: World | None = None) -> float:
    here = here or text()
    return here.loss(outcome.model, here.forget) - here.loss(here.original, here.forget)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["spectral", "kmeans", "random", "all"])
@pytest.mark.parametrize("random_choice", [False, True])
def test_groups(groups: str, random_choice: bool) -> None:
    clusters = None if groups == "all" else 3
    outcome = run(text().context(), groups=groups, clusters=clusters, random_choice=random_choice, steps=20)
    scope = outcome.record["scope"]
    assert scope["groups"] == groups and scope["clusters"] == (1 if groups == "all" else 3)
    assert 0 < scope["groups_chosen"] < scope["groups_possible"] <= scope["clusters"] * scope["layers"]
    assert 0 < scope["share_of_token_places"] < 1
    assert rise(outcome) > 0.05 and all(bool(p.isfinite().all()) for p in outcome.model.parameters())
    assert any("layer × cluster groups" in note for note in outcome.notes)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "kfac"])
def test_optimizers(optimizer: str) -> None:
    more = {"learning_rate": 3e-3} if optimizer == "adamw" else {"kl_clip": 1e-2, "refresh": 6}
    outcome = run(text().context(), optimizer=optimizer, steps=24, **more)
    assert rise(outcome) > 0.05
    here = text()
    assert here.loss(outcome.model, here.retain) < 0.5 * here.loss(here.start, here.retain)


@pytest.mark.parametrize("where", ["text", "resnet"])
@pytest.mark.parametrize("reach", [0.3, 0.95])
def test_a_layer_outside_the_scope_stays_as_it_is(where: str, reach: float) -> None:
    here = world(where)
    context = here.context(base=None)  # from its own weights, so that nothing but the edit moves them
    options = METHOD.configure(FAST | {"reach": reach, "scratch_epochs": 0.0})
    targets = build_targets(context, options, None, False)
    scope = choose_scope(context, options, targets)
    assert scope.chosen is not None
    free = [n for n in scope.layers if not scope.chosen.get(n)]
    assert bool(free) or reach > 0.9
    after = state(METHOD(context, options).model)
    before = state(here.original)
    assert all(torch.equal(before[f"{n}.weight"], after[f"{n}.weight"]) for n in free)
    assert any(not torch.equal(before[f"{n}.weight"], after[f"{n}.weight"]) for n in scope.layers)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "kfac"])
@pytest.mark.parametrize("more", [{}, {"average": 0.5}, {"steps": 13, "harden": 1e-3}], ids=["plain", "mean", "hard"])
def test_the_change_of_each_matrix_has_the_rank(optimizer: str, more: dict[str, Any]) -> None:
    here = text()
    outcome = run(here.context(base=None), optimizer=optimizer, rank=2, reach=1.0, **{"scratch_epochs": 0.0, **more})
    layers, _ = linear_layers(outcome.model)
    before, moved = state(here.original), 0
    for name in layers:
        change = (dict(outcome.model.named_parameters())[f"{name}.weight"].detach() - before[f"{name}.weight"]).double()
        values = torch.linalg.svdvals(change)
        assert float(values[2]) <= 1e-5 * max(1.0, float(values[0])), name
        moved += int(values[1] > 1e-4)
    assert moved == len(layers), "and it really is an edit of that rank"
    free = run(here.context(base=None), optimizer=optimizer, reach=1.0, scratch_epochs=0.0)
    name = next(iter(layers))
    change = dict(free.model.named_parameters())[f"{name}.weight"].detach() - before[f"{name}.weight"]
    assert float(torch.linalg.svdvals(change)[2]) > 1e-4, "without the limit it has a higher rank"


def test_null_space_leaves_what_retain_inputs_see() -> None:
    """At energy 1 a change of a layer whose inputs fill the space is nothing at all; below, it spares the leading
    directions."""
    here = text()
    before = state(here.original)
    context = here.context(base=None)
    options = METHOD.configure(FAST | {"null_space": 0.9, "reach": 1.0, "scratch_epochs": 0.0, "steps": 4})
    scope = choose_scope(context, options, build_targets(context, options, None, False))
    after = state(METHOD(context, options).model)
    for name in scope.layers:
        change = after[f"{name}.weight"] - before[f"{name}.weight"]
        _, vectors = torch.linalg.eigh(scope.factors[name].input_II.double())
        assert float(change.norm()) > 1e-6
        assert float((change.double() @ vectors[:, -1]).norm()) < 1e-4 * float(change.norm()) + 1e-7
    with pytest.raises(UserError, match="null_space needs retain samples"):
        run(here.context(retain=()), null_space=0.9)
    with pytest.raises(UserError, match="'kfac' needs retain samples"):
        run(here.context(retain=()), optimizer="kfac")


SWITCHES: list[dict[str, Any]] = [
    {"harden": 1e-3},
    {"control": 0.3, "control_every": 3},
    {"rounding": 0},
    {"worst": 0.4},
    {"average": 0.4},
    {"negations": 0},
    {"retain": "kl"},
    {"retain": "both"},
    {"retain": "none"},
    {"precision": "bf16"},
    {"js": 0.0, "forward": 1.0},
    {"start": 0.5},
    {"proxy_epochs": 0.0},
    {"sharpness": 1.5},
    {"micro_tokens": 50},
]


@pytest.mark.parametrize("values", SWITCHES, ids="+".join)
def test_each_switch_does_something_and_it_still_forgets(values: dict[str, Any]) -> None:
    here = text()
    plain, other = _plain(), run(here.context(), **values, steps=20)
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), other.model.parameters(), strict=True))
    assert rise(other) > 0.05 and math.isfinite(here.loss(other.model, here.retain))
    if "control" in values:
        control = other.record["control"]
        assert set(control) == {"forget_loss", "unseen_loss", "shift"} and control["shift"] != 0


_KEPT: list[nn.Module] = []


def _plain() -> nn.Module:
    if not _KEPT:
        _KEPT.append(run(text().context(), steps=20).model)
    return _KEPT[0]


def test_hardening_puts_the_weights_back_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    harden = edit_module.Edit._harden

    def watched(self: Any, trainer: Trainer, picks: Any) -> None:
        before = state(trainer.model)
        harden(self, trainer, picks)
        seen.append(all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters()))

    monkeypatch.setattr(edit_module.Edit, "_harden", watched)
    run(text().context(), harden=1e-2)
    assert seen and all(seen)


def test_negations_take_away_what_a_relearner_would_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving against a relearner's change makes the forget samples harder at once."""
    here, rises = text(), []
    negate = edit_module.Edit._negate

    def watched(self: Any, trainer: Trainer) -> None:
        before = here.loss(trainer.model, here.forget)
        negate(self, trainer)
        rises.append(here.loss(trainer.model, here.forget) - before)

    monkeypatch.setattr(edit_module.Edit, "_negate", watched)
    run(here.context(), negations=5, heal_from=1.0, steps=20)
    assert len(rises) == 4 and min(rises) > 0, "evenly up to the end of forgetting, which has no step of its own"


def test_rounding_does_not_stay_in_the_weights() -> None:
    model = run(text().context(), rounding=4, rounding_from=0.0).model
    weight: Tensor = dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert len(weight.detach().unique()) > 0.9 * weight.numel()


@pytest.mark.parametrize("where", ["text", "resnet", "llava"])
def test_forgetting_reaches_the_weights_through_the_chosen_tokens_only(where: str) -> None:
    """Mixed micro-batches against sums of d xᵀ over the chosen tokens, sample by sample, and plain retain gradients."""
    here = world(where)
    context = here.context(base=None)
    context.model.eval()  # batch normalisation would tie the samples of a batch together
    options = METHOD.configure({"groups": "kmeans", "clusters": 3, "reach": 0.6, "scratch_epochs": 0.0})
    targets = build_targets(context, options, None, False)
    scope = choose_scope(context, options, targets)
    assert scope.chosen is not None and any(0 < len(c) < 3 for c in scope.chosen.values())
    forget_term = Term("forget", "forget", "token", lambda view: targets.compare(view, divergence(options)))
    terms = [forget_term, Term("retain", "retain", "token", nll_N)]
    feeds = {"forget": Feed(here.forget), "retain": Feed(here.retain)}
    picks = {"forget": [1, 3, 2], "retain": [3, 0, 5]}
    active = {n: layer for n, layer in scope.layers.items() if scope.chosen.get(n)}

    def trainer(around: Any = None) -> Trainer:
        for p in context.model.parameters():
            p.grad = None
        settings = TrainOptions(micro_tokens=150)
        return Trainer(context.model, here.adapter, feeds, terms, settings, [], 1, Accelerator(cpu=True), around=around)

    trainer().gradients({"retain": picks["retain"]})
    wanted = {n: layer.weight.grad.clone() for n, layer in active.items() if layer.weight.grad is not None}
    total = sum(here.adapter.num_targets(here.forget[i]) for i in picks["forget"])
    for i in picks["forget"]:
        with recorded(active) as calls:
            positions = here.adapter.positions(context.model, [here.forget[i]])
        loss = forget_term.values(View(positions, [here.forget[i]])).sum() / total
        for call, x, d in output_gradients(loss, calls):
            name = call.layer.name
            mine = scope.tables[name].sample_N == scope.number[here.forget[i].id]
            labels = dict(zip(scope.tables[name].col_N[mine].tolist(), scope.labels[name][mine].tolist(), strict=True))
            for col, (x_I, d_O) in enumerate(zip(x.flatten(0, -2), d.flatten(0, -2), strict=True)):
                if labels.get(col) in scope.chosen[name]:
                    wanted[name] = wanted[name] + call.layer.unmatrix(torch.outer(d_O, x_I))
    trainer(scope.around).gradients(picks)
    for name, layer in active.items():
        assert layer.weight.grad is not None
        torch.testing.assert_close(
            layer.weight.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    restricted = {n: layer.weight.grad.clone() for n, layer in active.items() if layer.weight.grad is not None}
    trainer().gradients(picks)
    assert any(not torch.allclose(layer.weight.grad, restricted[n]) for n, layer in active.items())  # type: ignore[arg-type]


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan_of(**values: Any) -> EditPlan:
    options: ClusterOptions = METHOD.configure(values).settled("text", nn.Identity())
    return EditPlan({"forget": [5] * 10, "retain": [6] * 40, "earlier": [4] * 3}, options, 0, {})


def test_the_forget_passes_are_kept_though_healing_sees_few() -> None:
    for values in ({"forget_epochs": 5.0, "epochs": 0.1}, {"forget_epochs": 3.0, "epochs": 0.1, "heal_from": 0.2}):
        plan = plan_of(**values)
        counts = np.zeros(10, dtype=int)
        for step in range(plan.steps):
            counts[plan.batch(step).get("forget", [])] += 1
        assert counts.sum() >= 10 * values["forget_epochs"] - plan.options.batch_size
        assert counts.max() - counts.min() <= 1, "each forget sample equally often"
    assert plan_of(epochs=3.0, forget_epochs=0.1).steps == math.ceil(3 * 40 / 4)
    assert plan_of(steps=7).steps == 7


def test_healing_dwells_on_the_worst() -> None:
    plan = plan_of(steps=40, heal_from=0.5, heal_every=4)
    plan.memory["worst"] = [3, 4, 5, 6, 7]
    heals = [plan.batch(step) for step in range(20, 40)]
    assert all(set(p["retain"]) <= {3, 4, 5, 6, 7} and len(set(p["retain"])) == 4 for p in heals)
    assert ["forget" in p for p in heals[:8]] == [True, False, False, False] * 2
    assert all("forget" in plan.batch(step) and "earlier" in plan.batch(step) for step in range(20))


# -- members and anchors -----------------------------------------------------------------------------------------------


def test_members_by_what_there_is() -> None:
    here, options = text(), METHOD.configure({})
    assert chosen_members(here.context(), options, True) == ["proxy", "blend"]
    assert chosen_members(here.context(), options, False) == ["base", "counterfactual", "blend"]
    assert chosen_members(here.context(base=None), options, False) == ["counterfactual", "original"]
    nameless = [replace(s, names=()) for s in here.forget]
    assert chosen_members(here.context(base=None, forget=nameless), options, False) == ["original"]
    wrong = {
        "proxy+bse": "unknown target member 'bse': did you mean 'base'",
        "base": "target member 'base' needs the base",
        "blend": "'blend' needs the base",
    }
    for members, message in wrong.items():
        with pytest.raises(UserError, match=message):
            run(here.context(base=None), members=members)


@pytest.mark.parametrize("members", ["base", "proxy", "counterfactual", "blend", "original", "proxy+original+blend"])
def test_every_member_on_its_own(members: str) -> None:
    outcome = run(text().context(), members=members)
    assert outcome.notes[0] == f"targets: {' + '.join(members.split('+'))}" and rise(outcome) > 0.02


def targets_of(context: Context, **values: Any) -> Targets:
    options = METHOD.configure(FAST | values)
    return build_targets(context, options, *anchor_of(context, options))


def test_no_member_knows_the_true_token_better_than_the_anchor_or_the_cap() -> None:
    here = text()
    with_base = targets_of(here.context(), members="original", sharpness=1.0)
    anchor, _ = anchor_of(here.context(), METHOD.configure(FAST))
    assert anchor is not None and with_base.loss >= here.loss(anchor, here.forget) - 1e-3
    without = targets_of(here.context(base=None), members="original", sharpness=1.0, scratch_epochs=0.0)
    assert without.loss >= -math.log(0.02) - 1e-3
    assert here.loss(here.original, here.forget) < 0.5, "though the original knows it"


def test_building_targets_leaves_the_model_alone() -> None:
    context = text().context()
    before = state(context.model)
    targets_of(context, members="proxy+base+counterfactual+original+blend")
    assert all(torch.equal(before[n], p) for n, p in context.model.named_parameters())


# -- what it is blind to -----------------------------------------------------------------------------------------------


def said(outcome: Outcome, words: str) -> bool:
    return any(words in note for note in outcome.notes)


def test_notes_say_in_which_respect_it_is_blind() -> None:
    here = text()
    full, none = run(here.context()), run(here.context(base=None, retain=(), unseen=()))
    for words in ("no base was given", "no retain samples were used", "no never-seen text was given", "capped at"):
        assert said(none, words) and not said(full, words), words
    assert said(run(here.context(base=None), scratch_epochs=0.0), "only never-seen text says how far is far enough")
    assert said(run(here.context(unseen=()), control=0.3), "neither targets nor edit could be calibrated")
    assert said(run(here.context(), retain="none"), "nothing holds the rest of the model in place")
    nameless = [replace(s, names=()) for s in here.forget]
    assert said(
        run(here.context(forget=nameless), members="counterfactual+proxy"), "the counterfactual member is left out"
    )


def test_lora_says_what_it_cannot_mix() -> None:
    assert said(run(text().context(lora=True)), "LoRA adapter's: the blend member is left out")


# -- a sequence of requests --------------------------------------------------------------------------------------------


def test_the_first_request_stays_forgotten_after_the_second() -> None:
    here = text()
    subjects = list(dict.fromkeys(s.subject for s in (*here.forget, *here.retain)))
    first = tuple(s for s in (*here.forget, *here.retain) if s.subject == subjects[0])
    second = tuple(s for s in (*here.forget, *here.retain) if s.subject == subjects[1])
    rest = tuple(s for s in (*here.forget, *here.retain) if s.subject not in subjects[:2])
    options = {"steps": 40, "negations": 3}
    once = run(replace(here.context(), forget=first, retain=(*second, *rest)), **options).model
    gone = here.loss(once, first)
    assert gone > here.loss(here.original, first) + 0.3
    twice = run(replace(here.context(), model=once, forget=second, retain=rest, earlier=first), **options)
    assert here.loss(twice.model, first) > 0.5 * gone, "the first request came back"
    assert here.loss(twice.model, second) > here.loss(here.original, second) + 0.3
    assert here.loss(twice.model, rest) < 0.5 * here.loss(here.start, rest)
    assert all("earlier" in step for step in twice.record["log"])


# -- images ------------------------------------------------------------------------------------------------------------


def test_tokens_of_a_convolution_are_its_places() -> None:
    here = world("resnet")
    layers, _ = linear_layers(here.original)
    name = next(n for n, layer in layers.items() if layer.kind == "conv2d")
    table, states_ND = layer_states(here.original, here.adapter, here.forget, layers[name])
    outputs: list[Tensor] = []
    hook = layers[name].module.register_forward_hook(lambda _m, _i, y: outputs.append(y.detach()))
    with torch.no_grad():
        here.adapter.positions(here.original, [here.forget[2]])
    hook.remove()
    _, channels, height, width = outputs[0].shape
    assert states_ND.shape == (len(here.forget) * height * width, channels)
    mine = states_ND[table.sample_N == 2].reshape(height, width, channels)
    np.testing.assert_allclose(mine, outputs[0][0].permute(1, 2, 0).numpy(), rtol=1e-3, atol=1e-4)


def test_batch_normalisation_keeps_its_statistics() -> None:
    """The edit is made under the statistics that the model is used with, and leaves them, hooks and modes alone."""
    here = world("resnet")
    before = {n: b.clone() for n, b in here.original.named_buffers()}
    outcome = run(here.context(base=None), steps=8, negations=3, scratch_epochs=0.0)
    assert any("running_mean" in n for n in before)
    assert all(torch.equal(b, before[n]) for n, b in outcome.model.named_buffers())
    assert not any(m._forward_pre_hooks for m in outcome.model.modules())
    assert {m.training for m in outcome.model.modules()} == {here.original.training}


def test_known_classes_do_not_calibrate_a_class_that_goes() -> None:
    here = world("resnet")
    stays = tuple(replace(s, target=0) for s in here.retain)
    goes = tuple(replace(s, target=1) for s in here.forget)
    views = tuple(replace(s, target=i % 2) for i, s in enumerate(here.unseen))
    words = "could not be calibrated"
    alone = {"steps": 1, "negations": 0}
    assert said(run(here.context(forget=goes, retain=stays, unseen=views), **alone), words)


def test_what_a_step_sees_depends_on_the_model() -> None:
    def pace(modality: Modality, **values: Any) -> list[float | None]:
        found: ClusterOptions = METHOD.configure(values).settled(modality, nn.Linear(1000, 1000, bias=False))
        return [found.batch_size, found.retain_batch, found.forget_epochs, found.other_learning_rate]

    assert pace("text") == pace("multimodal") == [2, 4, 3.4, 5e-4]
    third = 2e-5 * 1000**0.6 / 3  # a million parameters
    assert pace("classifier") == [8, 16, 20.0, pytest.approx(third)]
    assert pace("classifier", batch_size=3, other_learning_rate=1e-4)[::3] == [3, 1e-4]


@pytest.mark.parametrize("where", ["resnet", "vit", "llava"])
def test_spectral_groups_on_images(where: str) -> None:
    here = world(where)
    settings = {"groups": "spectral", "clusters": 3, "steps": 12, "other_learning_rate": 5e-3, "cluster_tokens": 300}
    outcome = run(here.context(), **settings)
    assert outcome.record["scope"]["clusters"] == 3 and rise(outcome, here) > 0.05
    parts = outcome.record["scope"]["parts"]
    assert sum(part["influence"] for part in parts) == pytest.approx(1)


def test_a_sample_without_an_answer_is_no_obstacle() -> None:
    here = text()
    empty = Sample(id="empty", subject="x", prompt="who", target="")
    assert math.isfinite(here.loss(run(here.context(forget=(*here.forget, empty))).model, here.forget))


def test_targets_in_blocks_are_those_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large requests are built block by block; at one sharpness every distribution is the same."""
    context = text().context(base=None)
    options = METHOD.configure({"sharpness": 1.3})
    whole = build_targets(context, options, None, False)
    monkeypatch.setattr("expunge.methods.cluster.method.BLOCK_ELEMENTS", 1)  # one sample a block
    parts = build_targets(context, options, None, False)
    assert list(parts.kept) == list(whole.kept) and len(whole.kept) > 1
    for sample in context.forget:  # as full distributions: near ties are kept in any order
        (log_nk, index_nk, rest_n), other = whole.kept[sample.id], parts.kept[sample.id]
        any_n = torch.zeros(len(rest_n), dtype=torch.long)
        one_nV = whole.log_q_CV(log_nk, index_nk, rest_n, any_n)
        assert torch.allclose(one_nV, parts.log_q_CV(*other, any_n), atol=1e-3)
