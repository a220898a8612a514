"""Towers of a vision-language model: which weights are whose, LoRA on one of them, freezing that holds bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.matrix.worlds import world
from torch import nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import get_method
from expunge.methods.scope import get_scope
from expunge.models.adapter import evaluating
from expunge.models.lora import LoraOptions, apply_lora
from expunge.models.tiny import init_classifier, init_llava, init_qwen2vl, init_text
from expunge.models.towers import TOWERS, parameters_of

torch.set_num_threads(1)
TEXTS = [Sample(id=str(i), subject="x", prompt=f"Question {i}?", target="an answer of words") for i in range(4)]
SEES = ("vision_tower", "multi_modal_projector", "visual.")  # parts of names, by hand


@pytest.mark.parametrize("build", [init_llava, init_qwen2vl])
def test_every_weight_stands_in_one_tower(build: Any) -> None:
    model = build(TEXTS).model
    seen, spoken = (parameters_of(model, tower) for tower in ("vision", "language"))
    assert seen == {n for n, _ in model.named_parameters() if any(part in n for part in SEES)}
    assert seen and spoken == {n for n, _ in model.named_parameters()} - seen


@pytest.mark.parametrize("build", [init_llava, init_qwen2vl])
def test_lora_on_one_tower_or_on_both(build: Any) -> None:
    adapted: dict[str, set[str]] = {}
    for targets in (*TOWERS, "all-linear"):
        model = apply_lora(build(TEXTS).model, LoraOptions(r=2, targets=targets))
        adapted[targets] = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
        if targets in TOWERS:
            free = {n for n, p in model.named_parameters() if p.requires_grad}
            assert free == {n for n in parameters_of(model, targets) if "lora_" in n}
    assert adapted["language"] | adapted["vision"] == adapted["all-linear"]
    assert adapted["language"] and adapted["vision"] and not adapted["language"] & adapted["vision"]
    assert all(any(part in n for part in SEES) for n in adapted["vision"])
    assert not any(any(part in n for part in SEES) or "lm_head" in n for n in adapted["language"])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("tower", TOWERS)
def test_the_other_tower_holds_bit_for_bit(tower: str, optimizer: str) -> None:
    """Under momentum and weight decay: CLEAR's switch for it never froze anything."""
    here = world("llava")
    method = get_method("graddiff")
    scope = get_scope("layers", {"tower": tower})
    options = {"epochs": 2, "optimizer": optimizer, "weight_decay": 0.1, "learning_rate": 1e-2}
    context = here.context(scope=scope)
    free = parameters_of(context.model, tower)
    before = state(here.original)
    after = state(method(context, method.configure(options)).model)
    moved = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert moved and moved <= free
    # What the tower shows of an image moves if it is free, and is the same to the last bit if it is not.
    batch = here.adapter.collate([s for s in here.forget if s.image is not None])
    features = []
    for model in (here.original, context.model):
        with evaluating(model):
            inner: Any = model
            features.append(inner.model.get_image_features(pixel_values=batch.inputs["pixel_values"]).pooler_output[0])
    assert torch.equal(*features) == (tower == "language")


def test_a_pattern_within_a_tower() -> None:
    context = world("llava").context(scope=get_scope("layers", {"tower": "vision", "names": "*.fc1.*+*projector*"}))
    assert context.scope is not None
    masks = context.scope.masks(context)
    assert masks and all(("vision_tower" in n and ".fc1." in n) or "projector" in n for n in masks)
    with pytest.raises(UserError, match="no trainable parameter is called"):
        scope = get_scope("layers", {"tower": "vision", "names": "*lm_head*"})
        assert scope is not None
        scope.masks(context)


def test_models_without_towers_say_so() -> None:
    for loaded in (init_text(TEXTS, "tiny-test"), init_classifier(3, 16)):
        with pytest.raises(UserError, match=r"'vision' is a tower of vision-language models, and this .* has none"):
            apply_lora(loaded.model, LoraOptions(targets="vision"))
    with pytest.raises(UserError, match="allowed are both, language, vision"):
        get_scope("layers", {"tower": "image"})
    tuned = world("llava").context()
    tuned.model = apply_lora(tuned.model, LoraOptions(r=2, targets="language"))
    scope = get_scope("layers", {"tower": "vision"})
    assert scope is not None
    with pytest.raises(UserError, match="the vision tower has no trainable weight here"):
        scope.masks(tuned)
