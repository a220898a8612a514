"""Token-wise gradients and restriction, against autograd and explicit sums."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cluster_cases import ALL, Case, gpt2, gpt2s, images, llama, llamas
from torch import nn

from expunge.errors import UserError
from expunge.methods.cluster.influence import layer_gradients
from expunge.methods.cluster.layers import linear_layers, output_gradients, recorded, restricted_gradient
from expunge.methods.cluster.tokens import forward, placed, token_states
from expunge.models.adapter import evaluating
from expunge.training.terms import training_term

TERM = training_term()


def batch_loss(case: Case, batch: object) -> torch.Tensor:
    return -forward(case.model, case.adapter, batch).log_prob_N().sum()  # type: ignore[arg-type]


@pytest.mark.parametrize("make", ALL)
def test_layer_gradients_are_autograds(make: Callable[[], Case]) -> None:
    case = make()
    layers, _ = linear_layers(case.model)
    found = layer_gradients(case.model, case.adapter, case.samples, layers, TERM, max_tokens=24)
    assert all(layer.weight.grad is None for layer in layers.values())
    units = sum(case.adapter.num_targets(s) for s in case.samples)
    (batch_loss(case, case.adapter.collate(case.samples)) / units).backward()
    assert len(layers) > 3
    for name, layer in layers.items():
        assert layer.weight.grad is not None
        torch.testing.assert_close(found[name], layer.matrix(layer.weight.grad), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.unmatrix(layer.matrix(layer.weight)), layer.weight)


@pytest.mark.parametrize("make", ALL)
def test_restricted_gradient_is_the_explicit_sum(make: Callable[[], Case]) -> None:
    case = make()
    layers, _ = linear_layers(case.model)
    batch = case.adapter.collate(case.samples)
    with recorded(layers) as calls:
        loss = batch_loss(case, batch)
    found = output_gradients(loss, calls)
    rng = torch.Generator().manual_seed(0)
    masks = {c.layer.name: (torch.rand(d.shape[:-1], generator=rng) < 0.4) for c, _, d in found}
    chosen = dict(list(masks.items())[1:])  # the first layer has no mask: no token

    free = {n: p.requires_grad for n, p in case.model.named_parameters()}
    values = {}
    with restricted_gradient(layers, chosen):
        values["restricted"] = batch_loss(case, batch)
        values["restricted"].backward()
    restricted = {n: p.grad for n, p in case.model.named_parameters()}
    case.model.zero_grad(set_to_none=True)
    values["plain"] = batch_loss(case, batch)
    values["plain"].backward()
    torch.testing.assert_close(values["restricted"], values["plain"])

    inside = {id(p) for layer in layers.values() for p in layer.module.parameters()}
    for i, (call, x, d) in enumerate(found):
        layer = call.layer
        explicit = torch.zeros(layer.shape)
        bias = torch.zeros(layer.shape[0])
        mask = masks[layer.name] & (i > 0)
        for x_t, d_t, m in zip(x.flatten(0, -2), d.flatten(0, -2), mask.flatten(), strict=True):
            if m:
                explicit += torch.outer(d_t, x_t)
                bias += d_t
        grad = restricted[f"{layer.name}.weight"]
        assert grad is not None
        torch.testing.assert_close(layer.matrix(grad), explicit, rtol=1e-4, atol=1e-4)
        if layer.module.bias is not None:
            torch.testing.assert_close(restricted[f"{layer.name}.bias"], bias, rtol=1e-4, atol=1e-4)
    for name, p in case.model.named_parameters():  # norms, embeddings and head see no difference
        assert p.requires_grad == free[name]
        if id(p) not in inside and p.grad is not None:
            torch.testing.assert_close(restricted[name], p.grad, rtol=1e-4, atol=1e-5)
    assert all("forward" not in layer.module.__dict__ for layer in layers.values())


def test_restriction_works_with_checkpointing_and_bf16() -> None:
    case = llamas()
    layers, _ = linear_layers(case.model)
    batch = case.adapter.collate(case.samples)
    masks = {n: torch.rand(batch.inputs["input_ids"].shape) < 0.5 for n in layers}
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            case.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            case.model.train()
        case.model.zero_grad()
        with restricted_gradient(layers, masks):
            batch_loss(case, batch).backward()
        grads.append({n: layer.weight.grad.clone() for n, layer in layers.items()})  # type: ignore[union-attr]
    for name in layers:
        torch.testing.assert_close(grads[0][name], grads[1][name])
    case.model.zero_grad()
    with restricted_gradient(layers, masks), torch.autocast("cpu", torch.bfloat16):
        batch_loss(case, batch).backward()
    for name, layer in layers.items():
        assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(layer.weight.grad.flatten(), grads[0][name].flatten(), dim=0)
        assert cosine > 0.98


def test_a_mask_of_the_wrong_shape_is_refused_and_the_model_left_whole() -> None:
    case = llamas()
    layers, _ = linear_layers(case.model)
    with (
        pytest.raises(UserError, match="one entry per sample"),
        restricted_gradient(layers, dict.fromkeys(layers, torch.ones(3))),
    ):
        batch_loss(case, case.adapter.collate(case.samples))
    assert all("forward" not in layer.module.__dict__ for layer in layers.values())


def test_a_frozen_first_layer_still_gives_its_output_gradients() -> None:
    case = images()
    layers, _ = linear_layers(case.model)
    batch = case.adapter.collate(case.samples)
    with recorded(layers) as calls:
        loss = batch_loss(case, batch)
    expected = {c.layer.name: d for c, _, d in output_gradients(loss, calls)}
    case.model.requires_grad_(False)
    with recorded(layers) as calls:
        loss = batch_loss(case, batch)
    for call, _, d in output_gradients(loss, calls):
        torch.testing.assert_close(d, expected[call.layer.name])


def test_selection_says_what_it_leaves_out() -> None:
    layers, skipped = linear_layers(gpt2())
    assert "transformer.h.0.attn.c_attn" in layers and layers["transformer.h.0.attn.c_attn"].shape == (48, 16)
    assert skipped == {"lm_head": "shares its weight with another module"}
    _, skipped = linear_layers(llama())
    assert skipped == {"lm_head": "output head"}
    layers, _ = linear_layers(llama(), head=True)
    assert "lm_head" in layers
    net = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2), nn.Linear(2, 2), nn.Conv2d(4, 4, 1, groups=2))
    net[2].requires_grad_(False)
    layers, skipped = linear_layers(net)
    assert list(layers) == ["1"]
    assert skipped == {"0": "Conv1d is not supported", "2": "frozen", "3": "Conv2d is not supported"}
    with pytest.raises(UserError, match="no linear layer"):
        linear_layers(net, lambda name: name == "2")


@pytest.mark.parametrize("make", [llamas, gpt2s])
def test_token_states_are_those_of_single_samples(make: Callable[[], Case]) -> None:
    case = make()
    blocks = {str(i): b for i, b in enumerate(case.adapter.blocks(case.model))}
    table, states = token_states(case.model, case.adapter, case.samples, blocks, max_tokens=24)
    assert len(table) == sum(case.adapter.num_tokens(s) for s in case.samples)
    assert (np.diff(table.sample_N * 1000 + table.col_N) > 0).all()
    for i, sample in enumerate(case.samples):
        with evaluating(case.model):
            batch = case.adapter.collate([sample])
            hidden = case.model(**batch.inputs, output_hidden_states=True).hidden_states[1][0]
        mine = table.sample_N == i
        np.testing.assert_array_equal(table.col_N[mine], np.arange(len(hidden)))
        np.testing.assert_allclose(states["0"][mine], hidden.numpy(), atol=1e-4)


def test_grid_puts_labels_back_where_the_batch_sees_them() -> None:
    case = llamas()
    blocks = {"0": case.adapter.blocks(case.model)[0]}
    table, _ = token_states(case.model, case.adapter, case.samples, blocks)
    labels = np.arange(len(table))
    batch = case.adapter.collate([case.samples[i] for i in (4, 2, 7)])
    width = batch.inputs["input_ids"].shape[1]
    grid = table.grid(labels, [4, 2, -1], width)
    for row, sample in ((0, 4), (1, 2)):
        for col in range(width):
            hit = np.flatnonzero((table.sample_N == sample) & (table.col_N == col))
            assert int(grid[row, col]) == (int(hit[0]) if len(hit) else -1)
    assert (grid[2] == -1).all()
    np.testing.assert_array_equal(grid[:2].numpy() >= 0, batch.inputs["attention_mask"][:2].numpy() == 1)


def test_tokens_that_cannot_be_traced_are_refused() -> None:
    case = llamas()
    batch = case.adapter.collate(case.samples)
    rows, cols, real = placed(batch, (batch.num_tokens,), "flat")  # (B·T,) layout
    again = placed(batch, tuple(batch.inputs["input_ids"].shape), "grid")
    assert torch.equal(rows, again[0]) and torch.equal(cols, again[1]) and torch.equal(real, again[2])
    with pytest.raises(UserError, match="cannot be traced"):
        placed(batch, (7,), "experts")
