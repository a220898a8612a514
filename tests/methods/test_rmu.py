"""RMU and adaptive RMU against a slow loop over tokens; what moves, what is refused, limits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.matrix.worlds import world
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Outcome, get_method
from expunge.methods.rmu import random_direction

PLAIN = {
    "batch_size": 99, "retain_batch": 99, "optimizer": "sgd", "learning_rate": 1e-3, "clip": 0.0, "epochs": 2,
}  # fmt: skip


def run(name: str, where: str = "text", **values: Any) -> Outcome:
    method = get_method(name)
    return method(world(where).context(seed=4), method.configure(PLAIN | values))


def tokens(sample: Sample) -> Tensor:
    """(1, T) ids, by the tokenizer alone: nothing is padded."""
    tokenizer: Any = world("text").adapter.tokenizer  # type: ignore[attr-defined]
    return torch.tensor([tokenizer(f"{sample.prompt} {sample.target}{tokenizer.eos_token}").input_ids])


def states(model: Any, sample: Sample, layer: int) -> list[Tensor]:
    """Each token's state behind block ``layer``; Llama's own list, whose first entry is the embedding."""
    found = model(tokens(sample), output_hidden_states=True, use_cache=False).hidden_states
    return list(found[layer + 1][0]) if layer < len(found) - 2 else list(block_output(model, sample, layer))


def block_output(model: Any, sample: Sample, layer: int) -> Tensor:
    """The last block's, which that list has only behind the final norm."""
    seen: list[Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(tokens(sample), use_cache=False)
    handle.remove()
    return seen[0][0] if seen[0].ndim == 3 else seen[0]


def slow(layer: int, alpha: float, length: Any, steps: int = 2) -> nn.Module:
    """Plain SGD with momentum on the definition, one sample and one token at a time."""
    here = world("text")
    original: Any = here.original
    model: Any = copy.deepcopy(original)
    moving = [model.model.layers[i].mlp.down_proj.weight for i in range(layer + 1)]
    direction = random_direction(model.config.hidden_size, 4)
    momentum = [torch.zeros_like(p) for p in moving]
    for _ in range(steps):
        forget = retain = torch.zeros(())
        for sample in here.forget:
            with torch.no_grad():
                old = states(original, sample, layer)
            new = states(model, sample, layer)
            errors = [(h - length(o) * direction).pow(2).sum() for h, o in zip(new, old, strict=True)]
            forget = forget + sum(errors) / len(errors) / len(here.forget)
        for sample in here.retain:
            with torch.no_grad():
                old = states(original, sample, layer)
            errors = [(h - o).pow(2).sum() for h, o in zip(states(model, sample, layer), old, strict=True)]
            retain = retain + sum(errors) / len(errors) / len(here.retain)
        gradients = torch.autograd.grad(forget + alpha * retain, moving)
        with torch.no_grad():
            for p, g, m in zip(moving, gradients, momentum, strict=True):
                m.mul_(0.9).add_(g)
                p.sub_(1e-3 * m)
    return model


def far(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of two models' weights."""
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("layer", [0, 1])
def test_rmu_is_its_definition(layer: int) -> None:
    got = run("rmu", layer=layer, alpha=30.0, coefficient=2.5).model
    wanted = slow(layer, 30.0, lambda _: 2.5)
    assert far(got, wanted) < 2e-5 and far(got, world("text").original) > 1e-3


def test_adaptive_rmu_is_its_definition() -> None:
    got = run("adaptive-rmu", layer=1, alpha=30.0, beta=1.5).model
    wanted = slow(1, 30.0, lambda old: 1.5 * old.norm())
    assert far(got, wanted) < 5e-5 and far(got, world("text").original) > 1e-3


def test_the_direction_is_a_unit_vector_of_numbers_from_0_to_1() -> None:
    u = random_direction(64, 3)
    assert float(u.norm()) == pytest.approx(1) and float(u.min()) >= 0
    assert torch.equal(u, random_direction(64, 3)) and not torch.equal(u, random_direction(64, 4))


def test_the_first_losses_are_those_of_the_original() -> None:
    """‖h − c·u‖² for c = 0 is ‖h‖², and retain states have not moved."""
    first = run("rmu", coefficient=0.0, layer=0, epochs=1).record["log"][0]
    here = world("text")
    with torch.no_grad():
        squares = [torch.stack(states(here.original, s, 0)).pow(2).sum(1).mean() for s in here.forget]
    assert first["forget"] == pytest.approx(float(torch.stack(squares).mean()), rel=1e-4)
    assert first["retain"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("where", ["text", "resnet", "vit", "llava"])
def test_only_the_last_matrices_of_the_chosen_blocks_move(where: str) -> None:
    here = world(where)
    depth = len(here.adapter.blocks(here.original))
    last = run("rmu", where, layer=depth - 1, layers=1)
    both = run("rmu", where, layer=depth - 1, layers=2)

    def moved(model: nn.Module) -> list[str]:
        old = dict(here.original.named_parameters())
        return [n for n, p in model.named_parameters() if not torch.equal(p, old[n])]

    assert len(moved(last.model)) == 1 and len(moved(both.model)) == 2 and moved(last.model)[0] in moved(both.model)
    buffers = zip(last.model.buffers(), here.original.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers), "batch statistics stay"


def test_the_layer_is_at_the_papers_depth() -> None:
    assert run("rmu", epochs=1).record["layer"] == 0  # 7/31 of the way through two blocks
    assert run("rmu", "resnet", epochs=1).record["layer"] == 0


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match="layer 2 does not exist: this model has the blocks 0 to 1"):
        run("rmu", layer=2)
    for name, values, text in [
        ("rmu", {"layer": -1}, "layer = -1 cannot be"),
        ("rmu", {"layers": 0}, "layers = 0 cannot be"),
        ("rmu", {"alpha": -1.0}, "alpha = -1.0 cannot be"),
        ("rmu", {"coefficient": float("nan")}, "coefficient = nan cannot be"),
        ("adaptive-rmu", {"beta": -2.0}, "beta = -2.0 cannot be"),
    ]:
        with pytest.raises(UserError, match=text):
            get_method(name).configure(values)


def test_without_retain_only_the_push_is_left() -> None:
    method = get_method("rmu")
    outcome = method(world("text").context(retain=()), method.configure({**PLAIN, "layer": 1}))
    assert any("no retain samples" in note for note in outcome.notes) and "retain" not in outcome.record["log"][0]
