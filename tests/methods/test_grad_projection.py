"""Projected gradients: directions against a dense singular value decomposition, what may not move, the loss."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.cluster.layers import linear_layers
from expunge.methods.grad_projection import bases_of, energies, main_directions, scrub_C, without
from expunge.methods.registry import Outcome, get_method

PLAIN = {
    "batch_size": 99, "optimizer": "sgd", "learning_rate": 0.05, "clip": 0.0, "epochs": 3, "schedule": "constant",
    "variance": 0.99,
}  # fmt: skip
METHOD = get_method("grad-projection")


def run(where: str = "text", **values: Any) -> Outcome:
    return METHOD(world(where).context(seed=1), METHOD.configure(PLAIN | values))


def seen_inputs(where: str, name: str) -> np.ndarray:
    """Every input of one layer on the retain samples, one sample at a time (so nothing is padded): (tokens, I)."""
    here = world(where)
    model: Any = copy.deepcopy(here.original).eval()
    module = model.get_submodule(name)
    rows: list[Tensor] = []

    def keep(_: nn.Module, inputs: Any) -> None:
        x = inputs[0]
        if isinstance(module, nn.Conv2d):
            x = nn.functional.unfold(x, module.kernel_size, 1, module.padding, module.stride).transpose(1, 2)
        rows.append(x.flatten(0, -2).detach())

    handle = module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for sample in here.retain:
            batch = here.adapter.collate([sample])
            model(**batch.inputs)
            if name == "lm_head":  # the model asks its head for every token, training for the targets' alone
                rows[-1] = rows[-1][batch.cols_N]
    handle.remove()
    return torch.cat(rows).double().numpy()


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("text", "model.layers.1.mlp.down_proj"),
        ("text", "model.layers.0.self_attn.q_proj"),
        ("resnet", "resnet.encoder.stages.0.layers.0.layer.1.convolution"),
        ("vit", "vit.layers.2.mlp.fc1"),
        ("llava", "lm_head"),
    ],
)
def test_energies_and_directions_are_those_of_all_inputs(where: str, name: str) -> None:
    here = world(where)
    layers = {name: linear_layers(here.original, head=True)[0][name]}
    x = seen_inputs(where, name)
    energy = energies(here.original, here.adapter, here.retain, layers)[name]
    assert np.allclose(energy.numpy(), x.T @ x, rtol=1e-4, atol=1e-4 * np.abs(x.T @ x).max())
    basis = main_directions(energy, 0.95).double().numpy()
    _, singular, vectors = np.linalg.svd(x, full_matrices=False)
    share = np.cumsum(singular**2) / np.sum(singular**2)
    assert basis.shape[1] == int(np.searchsorted(share, 0.95)) + 1
    assert np.allclose(basis @ basis.T, vectors[: basis.shape[1]].T @ vectors[: basis.shape[1]], atol=1e-3)


def test_the_fewest_directions_that_hold_the_share() -> None:
    energy = torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.0], dtype=torch.float64))
    assert [main_directions(energy, v).shape[1] for v in (0.5, 0.6, 0.61, 0.9, 0.95, 0.999)] == [1, 1, 2, 2, 3, 3]
    assert float(main_directions(energy, 0.5)[0].abs()) == pytest.approx(1)
    assert main_directions(0 * energy, 0.9).shape == (4, 0), "what retain never uses may move"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("where", ["text", "resnet", "llava"])
def test_nothing_moves_along_the_directions_of_retain(where: str, optimizer: str) -> None:
    """Adam and weight decay included; embeddings, norms, biases stay bit for bit."""
    here = world(where)
    outcome = run(where, optimizer=optimizer, learning_rate=0.01, weight_decay=0.2)
    layers, _ = linear_layers(here.original, head=True)
    bases = bases_of(here.context(model=here.original), layers, 0.99)
    old = dict(here.original.named_parameters())
    by_weight = {id(layer.weight): name for name, layer in layers.items()}
    far = 0.0
    for n, p in outcome.model.named_parameters():
        name = by_weight.get(id(old[n]))
        if name is None or name not in bases:
            assert torch.equal(p, old[n]), n
            continue
        change = layers[name].matrix((p - old[n]).detach())
        far = max(far, float(change.norm()))
        assert float((change @ bases[name]).norm()) < 1e-4
    assert far > 1e-2


def test_one_step_is_the_projected_gradient() -> None:
    here = world("text")
    outcome = run(epochs=1, entropy=0.5, offset=0.1)
    model: Any = copy.deepcopy(here.original)
    total, count = torch.zeros(()), 0
    for sample in here.forget:
        batch = here.adapter.collate([sample])
        p = model(**batch.inputs).logits[0][batch.cols_N].softmax(1)
        own = p.gather(1, batch.targets_N[:, None])[:, 0]
        total = total - torch.log(1 + 0.1 - own).sum() + 0.5 * (p * p.log()).sum()
        count += len(batch.targets_N)
    (total / count).backward()
    layers, _ = linear_layers(model, head=True)
    bases = bases_of(here.context(model=model), layers, 0.99)
    got = dict(outcome.model.named_parameters())
    for name, basis in bases.items():
        layer = layers[name]
        gradient = layer.matrix(layer.weight.grad)
        wanted = layer.weight.detach() - 0.05 * (gradient - gradient @ basis @ basis.T)
        assert torch.allclose(got[f"{name}.weight"], wanted, atol=1e-5), name


def test_a_projected_change_leaves_the_answers_to_those_inputs() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 3)
    layer = linear_layers(nn.Sequential(linear))[0]["0"]
    x = torch.randn(20, 2) @ torch.randn(2, 6)  # inputs of rank 2
    basis = main_directions((x.T @ x).double(), 0.999999)
    change = without(layer, torch.randn(3, 6), basis)
    assert basis.shape == (6, 2) and torch.allclose(x @ change.T, torch.zeros(20, 3), atol=1e-3)
    assert float(change.abs().max()) > 0.1


def test_the_loss_falls_from_certainty_to_uniform_over_the_others() -> None:
    sure, even = torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([[-40.0, 0.0, 0.0]])
    y = torch.tensor([0])
    assert float(scrub_C(sure, y, 0.05, 0.2)) == pytest.approx(-np.log(0.05), rel=1e-4)
    assert float(scrub_C(even, y, 0.05, 0.2)) == pytest.approx(-np.log(1.05) - 0.2 * np.log(2), rel=1e-4)


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match="retain samples use every direction of every layer: lower variance"):
        identity = linear_layers(world("text").original)[0]
        first = {n: layer for n, layer in identity.items() if n.endswith("q_proj")}
        bases_of(world("text").context(model=world("text").original), first, 1 - 1e-15)
    for values in ({"variance": 1.0}, {"offset": 0.0}, {"entropy": -1.0}):
        with pytest.raises(UserError, match="cannot be"):
            METHOD.configure(values)
    with pytest.raises(UserError, match="needs retain data"):
        METHOD(world("text").context(retain=()))
