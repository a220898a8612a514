"""Whole-weight edits through a LoRA adapter: gradients, rank, and that the weights under it stay."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.matrix.worlds import world
from torch import nn

from expunge.methods.adapter_edit import adapted_layers, effective, whole_weights, write_change
from expunge.methods.curvature import mean_gradient, trainable
from expunge.methods.registry import get_method
from expunge.models.lora import LoraOptions, apply_lora


def adapted(where: str, rank: int) -> nn.Module:
    model = apply_lora(copy.deepcopy(world(where).original), LoraOptions(r=rank))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("where", ["text", "resnet"])
def test_gradients_at_the_frozen_weights_are_those_of_the_effective_ones(where: str) -> None:
    here, model = world(where), adapted(where, 3)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with whole_weights(model) as layers:
        assert set(trainable(model)) == set(layers) and layers
        found = mean_gradient(model, here.adapter, here.forget[:3])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    merged = copy.deepcopy(here.original)
    plain = {n.removeprefix("base_model.model.").replace(".base_layer", ""): n for n in layers}
    with torch.no_grad():
        for name, p in merged.named_parameters():
            if name in plain:
                p.copy_(effective(layers[plain[name]]))
    wanted = mean_gradient(merged, here.adapter, here.forget[:3])
    for name, full in plain.items():
        assert torch.allclose(found[full], wanted[name], atol=1e-3 * float(wanted[name].abs().max()) + 1e-7), name


@pytest.mark.parametrize("where", ["text", "resnet"])
def test_a_change_of_low_rank_is_written_exactly_and_others_as_near_as_can_be(where: str) -> None:
    model = adapted(where, 6)
    for name, layer in adapted_layers(model).items():
        base, before = layer.base_layer.weight.detach().clone(), effective(layer)
        own = layer.get_delta_weight("default").detach()
        one = -own + torch.outer(torch.ones(len(own)), torch.arange(1.0, own[0].numel() + 1)).view_as(own) * 1e-3
        lost, _ = write_change(layer, one)
        assert torch.allclose(effective(layer), before + one, atol=1e-4), name
        assert lost == pytest.approx(0.0, abs=1e-6) and torch.equal(layer.base_layer.weight, base)
        more = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
        wanted = layer.get_delta_weight("default").detach() + more
        lost, size = write_change(layer, more)
        missing = (layer.get_delta_weight("default") - wanted).flatten(1)
        assert float(missing.detach().square().sum()) == pytest.approx(lost, rel=1e-3, abs=1e-4)
        values = torch.linalg.svdvals(wanted.flatten(1))
        assert lost == pytest.approx(float(values[6:].square().sum()), rel=1e-3, abs=1e-4)
        assert size == pytest.approx(float(more.square().sum()), rel=1e-4)


def test_a_bare_model_has_no_such_layers() -> None:
    model = world("text").original
    with whole_weights(model) as layers:
        assert layers == {} and all(p.requires_grad for p in model.parameters())


def test_dampening_through_a_fresh_adapter_forgets() -> None:
    here, ssd = world("text"), get_method("ssd")
    context = here.context(lora=True)
    outcome = ssd(context, ssd.configure({"alpha": 1.2}))
    assert here.loss(outcome.model, here.forget) > here.loss(here.original, here.forget) + 0.2
    assert any("adapter's rank holds" in note for note in outcome.notes)
