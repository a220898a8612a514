"""Every registered method through the same behaviours, on every kind of model that it declares.

A new method is picked up from the registry; it needs one row in ``rows.py`` with options that make it fast.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.rows import TABLE, Row
from tests.matrix.worlds import MODALITIES, WORLDS, World, world
from torch import Tensor, nn

from expunge.bench.cost import measure
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, Method, Outcome, all_methods, get_method
from expunge.methods.scope import get_scope
from expunge.models.attached import attachments, own_parameters
from expunge.models.load import Loaded, load_model, save_model
from expunge.models.lora import is_lora
from expunge.progress import Progress
from expunge.zones.build import build_zone
from expunge.zones.model import ZonedModel
from expunge.zones.zone import Zone

ABSENT = {"retain": (), "unseen": (), "base": None, "llm": None}


METHODS = {name: found for name, found in all_methods().items() if not name.startswith("zone-")}
ZONES = {name: found for name, found in all_methods().items() if name.startswith("zone-")}  # their rows stand below
CELLS = [(name, where) for name in METHODS for where in WORLDS if MODALITIES[where] in METHODS[name].modalities]
HOME = {name: next(where for n, where in CELLS if n == name) for name in METHODS}  # texts, where the method takes them
cells = pytest.mark.parametrize(("name", "where"), CELLS)
methods = pytest.mark.parametrize("name", METHODS)


def options_of(name: str, where: str, **more: Any) -> Any:
    row = TABLE.get(name, Row())
    return METHODS[name].configure({**row.options, **row.of.get(where, {}), **more})


def with_option(option: str) -> list[str]:
    return [n for n, m in METHODS.items() if option in {f.name for f in fields(m.options)}]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = state_of(a), state_of(b)
    return first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())


def seen(samples: tuple[Sample, ...]) -> list[Any]:
    """Everything of the samples, pixels included."""
    plain = [{f.name: getattr(s, f.name) for f in fields(s) if f.name != "image"} for s in samples]
    return [*plain, *(s.image.tobytes() for s in samples if isinstance(s.image, np.ndarray))]


def hooks_of(module: nn.Module) -> dict[str, int]:
    """Number of hooks by kind; transformers itself puts some on LLaVA's towers at the first pass."""
    return {k: len(v) for k, v in vars(module).items() if k.endswith("hooks") and isinstance(v, dict)}


@dataclass
class Cell:
    world: World
    outcome: Outcome
    before: dict[str, float]
    after: dict[str, float]
    parameters_changed: int | None
    untouched: bool  # samples, and everything that the world lends


@cache
def cell(name: str, where: str) -> Cell:
    """The method run once in that world; kept for all behaviours."""
    here = world(where)
    roles = (here.forget, here.retain, here.unseen)
    before, original = copy.deepcopy([seen(r) for r in roles]), copy.deepcopy(here.original)
    context = here.context()
    with measure(here.adapter, context.model) as cost:
        outcome = METHODS[name](context, options_of(name, where))
        cost.model = outcome.model
    untouched = [seen(r) for r in roles] == before and same(original, here.original)

    def losses(model: nn.Module) -> dict[str, float]:
        return {"forget": here.loss(model, here.forget), "retain": here.loss(model, here.retain)}

    return Cell(here, outcome, losses(original), losses(outcome.model), cost.parameters_changed, untouched)


def test_every_method_has_a_row() -> None:
    missing, extra = set(METHODS) - set(TABLE), set(TABLE) - set(METHODS)
    assert not missing and not extra, f"add a row to TABLE for {missing}; take out {extra}"


# -- what every cell does ----------------------------------------------------------------------------------------------


@cells
def test_runs_with_finite_losses_and_a_readable_record(name: str, where: str) -> None:
    done = cell(name, where)
    assert all(math.isfinite(v) for v in done.after.values())
    assert all(bool(t.isfinite().all()) for t in done.outcome.model.parameters())
    steps = done.outcome.record.get("log", [])
    assert all(math.isfinite(v) for step in steps for v in step.values())
    assert all(isinstance(note, str) and note and "\n" not in note for note in done.outcome.notes)


@cells
def test_forgets_where_it_promises_to(name: str, where: str) -> None:
    done = cell(name, where)
    if not TABLE.get(name, Row()).forgets:
        pytest.skip(f"{name} promises nothing about the forget samples themselves")
    assert done.after["forget"] > done.before["forget"] + 0.2
    here = done.world
    before, after = (np.exp(-np.asarray(here.losses(m, here.forget))) for m in (here.original, done.outcome.model))
    assert after.mean() < before.mean() - 0.1


@cells
def test_keeps_what_it_is_told_to_keep(name: str, where: str) -> None:
    done = cell(name, where)
    if not TABLE.get(name, Row()).keeps:
        pytest.skip(f"{name} has no retain term by default")
    untrained = done.world.loss(done.world.start, done.world.retain)
    assert done.after["retain"] < 0.5 * untrained
    assert done.after["retain"] - done.before["retain"] < max(0.05, done.after["forget"] - done.before["forget"])


@cells
def test_leaves_samples_and_lent_models_as_they_were(name: str, where: str) -> None:
    assert cell(name, where).untouched


@cells
def test_counts_the_parameters_that_it_changed(name: str, where: str) -> None:
    done = cell(name, where)
    old, new = state_of(done.world.original), own_parameters(done.outcome.model)
    moved = sum(int((p.detach() != old[n]).sum()) for n, p in new.items())
    if METHODS[name].changes == "beside":
        assert moved == 0 and attachments(done.outcome.model) and not METHODS[name].removes_from_weights
    else:
        assert done.parameters_changed == moved > 0 and METHODS[name].removes_from_weights
    if METHODS[name].changes == "some":
        assert moved < sum(p.numel() for p in new.values())


@cells
def test_nothing_is_left_on_the_model(name: str, where: str) -> None:
    """No hook, replaced forward, extra module or frozen weight: what it forgot is in the weights alone."""
    done = cell(name, where)
    model, plain = done.outcome.model, done.world.original
    if not METHODS[name].removes_from_weights:
        pytest.skip(f"{name} declares that it works beside the weights")
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    for module, twin in zip(model.modules(), plain.modules(), strict=True):
        assert hooks_of(module) == hooks_of(twin) and "forward" not in vars(module)
    wanted = {n: p.requires_grad for n, p in plain.named_parameters()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert not model.training and all(p.grad is None for p in model.parameters())


@cells
def test_what_is_saved_is_what_was_measured(name: str, where: str, tmp_path: Path) -> None:
    done = cell(name, where)
    here = done.world
    folder = save_model(Loaded(done.outcome.model, here.adapter, ""), tmp_path / "model")
    again = load_model(folder, device="cpu")
    assert same(again.model, done.outcome.model)
    assert again.adapter.modality == here.modality
    few = here.forget[:3]
    got = World(where, again.adapter, (), (), (), again.model, again.model).losses(again.model, few)
    assert got == pytest.approx(here.losses(done.outcome.model, few), rel=1e-4, abs=1e-5)


# -- declared properties -----------------------------------------------------------------------------------------------


def refused(name: str, context: Any) -> str:
    with pytest.raises(UserError) as raised:
        METHODS[name](context)
    text = str(raised.value)
    assert text.count(". ") == 0 and text.endswith(".") and "\n" not in text, "one sentence"
    return text


@methods
def test_what_it_needs_is_asked_for(name: str) -> None:
    here = world(HOME[name])
    for need in METHODS[name].needs:
        assert need in refused(name, here.context(**{need: ABSENT[need]}))
    assert "no forget samples" in refused(name, here.context(forget=()))


@methods
def test_what_it_wants_is_missed_aloud(name: str) -> None:
    method = METHODS[name]
    here = world(HOME[name])
    full = set(cell(name, HOME[name]).outcome.notes)
    for want in method.wants:
        notes = method(here.context(**{want: ABSENT[want]}), options_of(name, HOME[name], **quick(method))).notes
        word = {"unseen": "never-seen", "llm": "language model"}.get(want, want)
        assert any(word in note and "no " in note for note in set(notes) - full), f"{name} is silent without {want}"


@methods
def test_it_does_without_what_it_does_not_declare(name: str) -> None:
    method = METHODS[name]
    away = {k: v for k, v in ABSENT.items() if k not in method.needs}
    outcome = method(world(HOME[name]).context(**away), options_of(name, HOME[name], **quick(method)))
    assert all(bool(p.isfinite().all()) for p in outcome.model.parameters())


@methods
def test_modalities_are_honest(name: str) -> None:
    method = METHODS[name]
    assert method.modalities and method.modalities <= set(MODALITIES.values())
    for where in ("text", "resnet", "llava"):
        if MODALITIES[where] not in method.modalities:
            assert MODALITIES[where] in refused(name, world(where).context())


@methods
def test_helpers_that_hold_data_are_declared_and_destroyed(name: str) -> None:
    """A method that asks for the base and trains it has had a second model with private data in it."""
    method = METHODS[name]
    made: list[nn.Module] = []
    here = world(HOME[name])

    def base() -> nn.Module:
        made.append(here.base())
        return made[-1]

    context = here.context(base=base)
    outcome = method(context, options_of(name, HOME[name], **quick(method)))
    trained = [m for m in made if m is not outcome.model and not same(m, here.start)]
    registered = outcome.record.get("helpers", [])
    assert bool(registered) == method.helpers_hold_data
    assert bool(trained) <= method.helpers_hold_data
    assert all(e["destroyed"] or e["kept"] == "as the result" for e in registered) and not context.helpers._models
    assert all(not bool(p.detach().any()) for m in trained for p in m.parameters()), "not registered, so not destroyed"


@methods
def test_what_it_says_about_itself(name: str) -> None:
    method = METHODS[name]
    assert method.summary and method.paper and method.formula
    for f in fields(method.options):
        assert f.metadata.get("meaning"), f"{name}: option {f.name} has no meaning"
    some = next(f.name for f in fields(method.options) if f.type in ("int", "float"))
    with pytest.raises(UserError, match=rf"unknown option of method .* '{some}x': did you mean '{some}'\?"):
        method.configure({f"{some}x": 3})
    with pytest.raises(UserError, match=f"'{some}' = 'many' is not a"):
        method.configure({some: "many"})


# -- seeds, restarts, adapters -----------------------------------------------------------------------------------------


def quick(method: Method) -> dict[str, Any]:
    """Options that end after a few steps."""
    has = {f.name for f in fields(method.options)}
    few = {"epochs": 1} if "epochs" in has else {}
    return few | ({"steps": 3, "groups": "all"} if "groups" in has else {}) | TABLE[method.name].quick


@pytest.mark.parametrize(("name", "where"), [c for c in CELLS if c[1] in ("text", "resnet")])
def test_the_seed_decides(name: str, where: str) -> None:
    method, here = METHODS[name], world(where)
    options = options_of(name, where, **quick(method))
    first, again, other = (method(here.context(seed=s), options).model for s in (1, 1, 2))
    assert same(first, again)
    assert TABLE[name].seedless or not same(first, other)
    assert all(bool(p.isfinite().all()) for p in other.parameters())


@methods
def test_the_world_outside_keeps_its_random_numbers(name: str) -> None:
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    METHODS[name](world(HOME[name]).context(), options_of(name, HOME[name], **quick(METHODS[name])))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == numbers  # type: ignore[index, union-attr]


@methods
def test_a_work_folder_changes_nothing(name: str, tmp_path: Path) -> None:
    method, here = METHODS[name], world(HOME[name])
    often = {"checkpoint_every": 1} if "checkpoint_every" in {f.name for f in fields(method.options)} else {}
    options = options_of(name, HOME[name], **quick(method), **often)
    plain = method(here.context(), options).model
    assert same(plain, method(here.context(work=tmp_path / "new" / "folder"), options).model)
    assert not list((tmp_path / "new" / "folder").glob("checkpoint*"))


@pytest.mark.parametrize(("name", "where"), [c for c in CELLS if c[1] in ("text", "resnet")])
def test_lora_changes_the_adapter_alone(name: str, where: str) -> None:
    method, here = METHODS[name], world(where)
    context = here.context(lora=True)
    before = state_of(context.model)
    model = method(context, options_of(name, where, **quick(method))).model
    assert math.isfinite(here.loss(model, here.forget))
    if METHODS[name].changes == "new":
        assert not is_lora(model), "a whole model, not an adapter on what it leaves behind"
        return
    after = state_of(model)
    if METHODS[name].changes == "beside":
        assert all(torch.equal(t, after[n]) for n, t in before.items())
        return
    moved = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert moved and all("lora_" in n or "running_" in n or "num_batches" in n for n in moved)


def test_lora_forgets_too() -> None:
    here = world("text")
    for name in ("npo", "cluster"):
        settings = {"epochs": 12.0, "learning_rate": 2e-2, "batch_size": 3} if name == "npo" else {"steps": 40}
        model = METHODS[name](here.context(lora=True), METHODS[name].configure(settings)).model
        assert here.loss(model, here.forget) > here.loss(here.original, here.forget) + 0.2
        assert here.loss(model, here.retain) < 0.5 * here.loss(here.start, here.retain)


def test_names_and_aliases() -> None:
    assert get_method("cluster_driven") is get_method("cluster")
    with pytest.raises(UserError, match=r"unknown method 'nop': did you mean 'npo'\?"):
        get_method("nop")


def test_the_nearest_option_for_misspelt_ones_of_its_own() -> None:
    with pytest.raises(UserError, match="did you mean 'negations'"):
        METHODS["cluster"].configure({"negation": 3})
    with pytest.raises(UserError, match="allowed are spectral, kmeans, random, all"):
        METHODS["cluster"].configure({"groups": "ward"})


def test_nothing_of_this_needs_torchvision() -> None:
    for where in WORLDS:
        assert math.isfinite(world(where).loss(world(where).original, world(where).unseen))
    assert "torchvision" not in sys.modules


@methods
def test_one_sample_of_each_role_is_enough(name: str) -> None:
    here = world(HOME[name])
    few = here.context(forget=here.forget[:1], retain=here.retain[:1], unseen=here.unseen[:1])
    model = METHODS[name](few, options_of(name, HOME[name], **quick(METHODS[name]))).model
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@methods
def test_the_order_in_a_file_does_not_decide_what_is_forgotten(name: str) -> None:
    """Reversed samples, in other words other batches, may not turn forgetting into remembering."""
    if not TABLE.get(name, Row()).forgets:
        pytest.skip(f"{name} promises nothing about the forget samples themselves")
    here = world(HOME[name])
    context = here.context(forget=here.forget[::-1], retain=here.retain[::-1])
    model = METHODS[name](context, options_of(name, HOME[name])).model
    assert here.loss(model, here.forget) > here.loss(here.original, here.forget) + 0.2


def test_a_base_of_another_shape_is_refused() -> None:
    here = world("text")

    def other() -> nn.Module:
        config = copy.deepcopy(here.original.config)
        config.intermediate_size = 40
        model: nn.Module = type(here.original)(config)
        return model

    context = replace(here.context(), base=other)
    assert "does not have the original's shape" in refused("cluster", context)


# -- scope, restart, batches -------------------------------------------------------------------------------------------

EDITS = [n for n, m in METHODS.items() if m.changes in ("all", "some")]


@pytest.mark.parametrize("name", EDITS)
def test_a_scope_holds_bit_for_bit(name: str) -> None:
    """Momentum and weight decay included: what the mask forbids is what it was."""
    method, here = METHODS[name], world(HOME[name])
    has = {f.name for f in fields(method.options)}
    options = options_of(name, HOME[name], **quick(method), **({"weight_decay": 0.1} if "weight_decay" in has else {}))
    context = here.context(scope=get_scope("random", {"share": 0.3}))
    masks, before = context.scope.masks(context), state_of(context.model)
    outcome = method(context, options)
    after = state_of(outcome.model)
    assert all(torch.equal(after[n][~masks[n]], t[~masks[n]]) for n, t in before.items() if n in masks)
    moved = sum(int((after[n] != t).sum()) for n, t in before.items())
    assert 0 < moved <= sum(int(m.sum()) for m in masks.values())
    assert any("scope random" in note for note in outcome.notes)
    assert all(p.requires_grad for p in outcome.model.parameters())


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if "checkpoint_every" in {f.name for f in fields(m.options)}]
)
def test_a_killed_run_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    method, here = METHODS[name], world(HOME[name])
    options = options_of(name, HOME[name], **quick(method), checkpoint_every=1)
    plain = method(here.context(), options).model

    class Deadly(Progress):
        left = 1

        def step(self, done: int, text: str = "") -> None:
            if done > 0:
                self.left -= 1
                if self.left < 0:
                    raise Killed

    with pytest.raises(Killed):
        method(here.context(work=tmp_path, progress=Deadly(quiet=True)), options)
    assert same(plain, method(here.context(work=tmp_path), options).model)


@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if "micro_tokens" in {f.name for f in fields(m.options)}]
)
def test_accumulation_equals_the_large_batch(name: str) -> None:
    method, here = METHODS[name], world(HOME[name])
    large = method(here.context(), options_of(name, HOME[name], **quick(method), micro_tokens=1 << 20)).model
    small = method(here.context(), options_of(name, HOME[name], **quick(method), micro_tokens=32)).model
    twin, start = dict(small.named_parameters()), dict(here.original.named_parameters())
    for n, a in large.named_parameters():
        b, p = twin[n], start.get(n, torch.zeros(()))  # an attachment has no start
        moved = float((a - p).detach().norm())
        assert float((a - b).detach().norm()) <= 0.02 * moved + 1e-5, n


# -- who is looked at --------------------------------------------------------------------------------------------------

ROLES = ("forget", "retain", "unseen")


def altered(sample: Sample) -> Sample:
    """Another text; of a classifier's sample another picture."""
    if isinstance(sample.image, np.ndarray):
        return replace(sample, image=255 - sample.image)
    return replace(sample, prompt=f"{sample.prompt} zyx", target=f"{sample.target} zyx", names=())


@methods
def test_a_role_reaches_the_method_exactly_when_it_is_declared(name: str) -> None:
    """Other texts in one role alone change the result if the role is needed, and never if it is not declared."""
    method, here = METHODS[name], world(HOME[name])
    options = options_of(name, HOME[name], **quick(method))
    plain = method(here.context(), options).model
    for role in ("retain", "unseen"):
        marked = tuple(altered(s) for s in getattr(here, role))
        other = method(here.context(**{role: marked}), options).model
        if role in method.needs:
            assert not same(plain, other), f"{role} is not looked at"
        elif role not in method.wants:
            assert same(plain, other), f"{role} is looked at, undeclared"


@pytest.mark.parametrize("name", [n for n in with_option("micro_tokens") if HOME[n] == "text"])
def test_padding_changes_nothing(name: str) -> None:
    """Passes of one sample have no padding; passes of all have much: the same weights come out."""
    method, here = METHODS[name], world(HOME[name])
    uneven = tuple(
        replace(s, target=f"{s.target} " + "and so on " * (i % 3)) for i, s in enumerate((*here.forget, *here.retain))
    )
    roles = {"forget": uneven[: len(here.forget)], "retain": uneven[len(here.forget) :]}
    alone = method(here.context(**roles), options_of(name, HOME[name], **quick(method), micro_tokens=1)).model
    padded = method(here.context(**roles), options_of(name, HOME[name], **quick(method), micro_tokens=1 << 20)).model
    twin, start = dict(padded.named_parameters()), dict(here.original.named_parameters())
    for n, a in alone.named_parameters():
        moved = float((a - start.get(n, torch.zeros(()))).detach().norm())
        assert float((a - twin[n]).detach().norm()) <= 0.03 * moved + 1e-5, n


# -- removal from zones ------------------------------------------------------------------------------------------------

# Options under which each kind is built fast enough for this test.
ZONE_TABLE: dict[str, dict[str, Any]] = {"zone-store": {}}


@cache
def zone_world() -> tuple[World, Context, tuple[Sample, ...]]:
    """The text world's base and people, with the base's training texts as public ones."""
    from zone_cases import private
    from zone_cases import world as zoned_world

    loaded, data = zoned_world()
    forget = tuple(s for s in private() if s.subject == private()[0].subject)
    retain = tuple(s for s in private() if s not in forget)
    here = World("text", loaded.adapter, forget, retain, (), loaded.model, loaded.model)
    return here, Context(loaded.model, loaded.adapter, forget, retain), data["utility"]


def zoned(name: str) -> ZonedModel:
    here, context, public = zone_world()
    loaded = Loaded(context.model, context.adapter, "")
    kind = name.removeprefix("zone-")
    model = build_zone(loaded, [*here.forget, *here.retain], public, kind, options=ZONE_TABLE[name], salt="0f" * 32)
    return model


def without(model: ZonedModel, samples: tuple[Sample, ...]) -> Zone:
    """The zone that is built of these samples alone, with the public artefacts of ``model``."""
    from zone_cases import adapter, base

    zone = type(model.zone)(model.zone.options, model.zone.public, model.zone.base_digest, model.zone.salt)
    zone.add([zone.record(s, adapter()) for s in samples], base())
    return zone


@pytest.mark.parametrize("name", ZONE_TABLE)
def test_zone_methods_remove_exactly_and_touch_no_weight(name: str) -> None:
    here, context, _ = zone_world()
    model = zoned(name)
    knew, bare = here.loss(model, here.forget), here.loss(context.model, here.forget)
    kept, weights = here.loss(model, here.retain), state_of(model)
    with measure(here.adapter, model) as cost:
        outcome = ZONES[name](replace(context, model=model))
        cost.model = outcome.model
    assert outcome.model is model and cost.parameters_changed == 0
    assert all(torch.equal(t, weights[n]) for n, t in state_of(model).items())
    assert model.zone.digest() == without(model, here.retain).digest() == outcome.record["zone_digest"]
    assert here.loss(model, here.forget) == pytest.approx(bare, abs=1e-5) and knew < bare - 0.5
    assert here.loss(model, here.retain) == pytest.approx(kept, abs=0.05)
    assert all(isinstance(note, str) and note and "\n" not in note for note in outcome.notes)


@pytest.mark.parametrize("name", ZONE_TABLE)
def test_zone_methods_take_single_records_and_say_what_they_did_not_find(name: str) -> None:
    here, context, public = zone_world()
    model = zoned(name)
    some = (*here.forget[:1], *here.retain[:2], public[0])
    outcome = ZONES[name](replace(context, model=model, forget=some))
    rest = tuple(s for s in (*here.forget, *here.retain) if s not in some)
    assert model.zone.digest() == without(model, rest).digest()
    assert any("were not in the zone" in note for note in outcome.notes)
    renamed = tuple(replace(s, id=f"other/{i}") for i, s in enumerate(rest[:2]))
    ZONES[name](replace(context, model=model, forget=renamed))  # known by their content
    assert model.zone.digest() == without(model, rest[2:]).digest()
    last = replace(context, model=model, forget=rest[2:3])
    ZONES[name](last, ZONES[name].configure({"scope": "subjects"}))
    assert rest[2].subject not in model.zone.blocks
    with pytest.raises(UserError, match="none of the 1 forget samples is in the zone"):
        ZONES[name](last)


def test_zone_methods_refuse_what_is_no_zone_or_another_kind() -> None:
    _, context, _ = zone_world()
    for found in ZONES.values():
        assert found.summary and found.paper and found.formula and not found.removes_from_weights
        with pytest.raises(UserError, match="has no zone to remove from"):
            found(context)
    for name in set(ZONES) - {"zone-store"}:
        with pytest.raises(UserError, match="use --method zone-store"):
            ZONES[name](replace(context, model=zoned("zone-store")))
