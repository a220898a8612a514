"""EUL: the objective from full logits and autograd, fusion against least squares, sequences, what is kept and said."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.matrix.worlds import World, world
from torch import Tensor, nn
from torch.nn.functional import gelu

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.eul import EulOptions, Turns, layers_of, new_layers, objective
from expunge.methods.eul_layers import fuse
from expunge.methods.registry import get_method
from expunge.models.attached import ATTACHED, attach
from expunge.models.load import Loaded, load_model, save_model
from expunge.training.terms import Teacher, View

EUL = get_method("eul")
QUICK = {"epochs": 2, "batch_size": 3, "learning_rate": 2e-2}


def here() -> World:
    return world("text")


def log_probs(model: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    """(n, V) log-probabilities and the n target tokens, from the model's own logits of one sample."""
    tokenizer: Any = here().adapter.tokenizer  # type: ignore[attr-defined]
    before = tokenizer(sample.prompt).input_ids
    ids = tokenizer(f"{sample.prompt} {sample.target}{tokenizer.eos_token}").input_ids
    logits = model(input_ids=torch.tensor([ids])).logits[0, len(before) - 1 : -1]
    return logits - logits.exp().sum(1, keepdim=True).log(), torch.tensor(ids[len(before) :])


def layered(rank: int = 4) -> tuple[nn.Module, Any]:
    """The world's original with unlearning layers that do something."""
    context = here().context()
    layers = new_layers(context, rank)
    attach(context.model, layers)
    chance = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for up in layers.up:
            up.copy_(0.1 * torch.randn(up.shape, generator=chance))
    return context.model, layers


@pytest.mark.parametrize("bound", [None, 0.5])
def test_objective_and_gradient_against_the_definition(bound: float | None) -> None:
    where, options = here(), EulOptions(alpha=0.7, task=1.1, gamma=0.3, bound=bound)
    model, layers = layered()
    terms = objective(Teacher.of(where.original, where.adapter, [*where.forget, *where.retain]), options)

    def ours() -> Tensor:
        total = torch.zeros(())
        for role, samples in (("retain", where.retain), ("forget", where.forget)):
            view = View(where.adapter.positions(model, samples), samples)
            total = total + sum(t.weight * t.values(view).mean() for t in terms if t.role == role)
        return total

    def theirs() -> Tensor:
        parts: dict[str, list[Tensor]] = {"kl_r": [], "nll_r": [], "kl_f": [], "nll_f": []}
        for role, samples in (("r", where.retain), ("f", where.forget)):
            for sample in samples:
                new, targets = log_probs(model, sample)
                with torch.no_grad():
                    old, _ = log_probs(where.original, sample)
                for t, y in enumerate(targets):
                    kl = (old[t].exp() * (old[t] - new[t])).sum()
                    limit = bound or math.log(new.shape[1])
                    parts[f"kl_{role}"].append(kl if role == "r" else kl.clamp(max=limit))
                    parts[f"nll_{role}"].append(-new[t, y] if role == "r" else (-new[t, y]).clamp(max=limit))
        mean = {name: torch.stack(values).mean() for name, values in parts.items()}
        return 0.7 * mean["kl_r"] + 1.1 * mean["nll_r"] - mean["kl_f"] - 0.3 * mean["nll_f"]

    parameters = list(layers.parameters())
    mine, slow = ours(), theirs()
    assert mine.item() == pytest.approx(slow.item(), rel=1e-4)
    for a, b in zip(torch.autograd.grad(mine, parameters), torch.autograd.grad(slow, parameters), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_no_pull_beyond_the_bound() -> None:
    """Where forget tokens are as unlikely as a uniform guess, the forget terms have no gradient at all."""
    where = here()
    model, layers = layered()
    teacher = Teacher.of(where.original, where.adapter, [*where.forget, *where.retain])
    terms = [t for t in objective(teacher, EulOptions(bound=1e-9)) if t.role == "forget"]
    view = View(where.adapter.positions(model, where.forget), where.forget)
    loss = sum((t.weight * t.values(view).mean() for t in terms), torch.zeros(()))
    assert all(not bool(g.any()) for g in torch.autograd.grad(loss, list(layers.parameters())))


def test_layers_are_bottlenecks_after_each_block_and_nothing_at_first() -> None:
    where = here()
    context = where.context()
    layers = new_layers(context, 4)
    attach(context.model, layers)
    assert where.losses(context.model, where.forget) == where.losses(where.original, where.forget)
    model, layers = layered()
    given: list[Tensor] = []
    plain = copy.deepcopy(where.original)
    for number, block in enumerate(plain.model.layers):

        def add(_m: nn.Module, _i: Any, out: Tensor, number: int = number) -> Tensor:
            given.append(out)
            return out + gelu(out @ layers.down[number]) @ layers.up[number]

        block.register_forward_hook(add)
    ids = torch.tensor([[1, 7, 9, 30, 4]])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-6)  # type: ignore[operator]
    assert len(given) == len(layers.blocks) == 2


def test_rank_is_half_a_percent_of_the_parameters_and_no_less_than_eight() -> None:
    context = here().context()
    assert new_layers(context, None).rank == 8
    width, own = 2 * sum(new_layers(context, 1).widths), sum(p.numel() for p in context.model.parameters())
    assert width * 8 > 0.005 * own  # so it was the least that was taken


# -- fusion ------------------------------------------------------------------------------------------------------------


def parts(rows: tuple[int, int], width: int = 6, out: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    chance = torch.Generator().manual_seed(1)
    inputs = [torch.randn(n, width, generator=chance, dtype=torch.float64) for n in rows]
    return inputs, [torch.randn(width, out, generator=chance, dtype=torch.float64) for _ in rows]


def test_fusion_is_the_least_squares_solution() -> None:
    """Of the stacked system X_i W = X_i W_i, solved from the inputs themselves and not from Gram matrices."""
    inputs, weights = parts((40, 25))
    fused = fuse(weights, [x.T @ x for x in inputs], ridge=1e-12)
    answers = torch.cat([x @ w for x, w in zip(inputs, weights, strict=True)])
    assert torch.allclose(fused, torch.linalg.lstsq(torch.cat(inputs), answers).solution, atol=1e-8)


def test_ridge_holds_a_singular_sum_and_is_a_pull_towards_each_layer() -> None:
    inputs, weights = parts((2, 1))
    grams = [x.T @ x for x in inputs]
    fused = fuse(weights, grams, ridge=1e-2)
    epsilon = 1e-2 * float((grams[0] + grams[1]).diagonal().mean()) / 2
    rows = torch.cat([*inputs, *(math.sqrt(epsilon) * torch.eye(6, dtype=torch.float64),) * 2])
    answers = torch.cat([x @ w for x, w in zip(inputs, weights, strict=True)])
    answers = torch.cat([answers, *(math.sqrt(epsilon) * w for w in weights)])
    assert torch.allclose(fused, torch.linalg.lstsq(rows, answers).solution, atol=1e-8)
    assert torch.allclose(fuse([weights[0]] * 2, grams, 1e-3), weights[0])
    assert torch.allclose(fuse(weights, [torch.zeros(6, 6)] * 2, 1e-3), (weights[0] + weights[1]) / 2)


def test_inputs_that_do_not_overlap_give_each_request_its_own_layer() -> None:
    _, weights = parts((1, 1))
    chance = torch.Generator().manual_seed(2)
    x, z = torch.zeros(9, 6, dtype=torch.float64), torch.zeros(9, 6, dtype=torch.float64)
    x[:, :3], z[:, 3:] = (torch.randn(9, 3, generator=chance, dtype=torch.float64) for _ in range(2))
    fused = fuse(weights, [x.T @ x, z.T @ z], 1e-12)
    assert torch.allclose(x @ fused, x @ weights[0], atol=1e-8)
    assert torch.allclose(z @ fused, z @ weights[1], atol=1e-8)


def test_gram_matrices_are_of_the_inputs_of_each_map_without_padding() -> None:
    where = here()
    model, layers = layered()
    samples = where.forget[:3]
    seen: list[Tensor] = []
    block = model.get_submodule(layers.blocks[0])
    handle = block.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()), prepend=True)
    found = layers.grams(model, where.adapter, samples)
    handle.remove()
    tokens = sum(where.adapter.num_tokens(s) for s in samples)
    x = torch.cat([out[0] for out in seen]).double()
    assert len(x) == tokens
    inside = gelu((x.float() @ layers.down[0]).detach()).double()
    assert torch.allclose(found["down.0"], x.T @ x, rtol=1e-5)
    assert torch.allclose(found["up.0"], inside.T @ inside, rtol=1e-4, atol=1e-6)


# -- requests one after another ----------------------------------------------------------------------------------------


def twice(keep: bool, earlier: bool) -> tuple[Any, Any, Any]:
    """(first layers, layers of the second request alone, outcome of the second after the first)."""
    where = here()
    first, second = where.forget[:3], where.forget[3:]
    options = EUL.configure(QUICK)
    one = EUL(where.context(forget=first), EUL.configure({**QUICK, "keep_gram": keep})).model
    alone = EUL(where.context(forget=second), options).model
    weights = [{n: p.detach().clone() for n, p in layers_of(m).maps().items()} for m in (one, alone)]  # type: ignore[union-attr]
    after = EUL(where.context(model=one, forget=second, earlier=first if earlier else ()), options)
    return weights[0], weights[1], after


@pytest.mark.parametrize(("keep", "earlier"), [(True, False), (False, True)])
def test_a_second_request_is_fused_with_the_first(keep: bool, earlier: bool) -> None:
    where = here()
    first, second, after = twice(keep, earlier)
    layers = layers_of(after.model)
    assert layers is not None and layers.requests == after.record["requests"] == 2 and not layers.gram
    grams = []
    for weights, samples in ((first, where.forget[:3]), (second, where.forget[3:])):
        model, own = layered(layers.rank)
        with torch.no_grad():
            for name, weight in own.maps().items():
                weight.copy_(weights[name])
        grams.append(own.grams(model, where.adapter, samples))
    for name, weight in layers.maps().items():
        wanted = fuse([first[name], second[name]], [g[name] for g in grams], 1e-3)
        assert torch.allclose(weight, wanted, atol=1e-4), name
    assert any("fused in closed form with the unlearning layers of 1 earlier" in n for n in after.notes)


def test_without_gram_matrices_the_layers_are_averaged_and_it_is_said() -> None:
    first, second, after = twice(keep=False, earlier=False)
    for name, weight in layers_of(after.model).maps().items():  # type: ignore[union-attr]
        assert torch.allclose(weight, (first[name] + second[name]) / 2, atol=1e-6)
    assert any("no Gram matrices and no earlier forget samples were given" in n for n in after.notes)


def test_gram_matrices_are_stored_only_if_asked_for_and_said_to_be_personal(tmp_path: Path) -> None:
    where = here()
    plain = EUL(where.context(), EUL.configure(QUICK))
    assert not list(layers_of(plain.model).buffers()) and not any("Gram" in n for n in plain.notes)  # type: ignore[union-attr]
    kept = EUL(where.context(), EUL.configure({**QUICK, "keep_gram": True}))
    assert any("personal data" in n for n in kept.notes)
    folder = save_model(Loaded(kept.model, where.adapter, ""), tmp_path / "model")
    again = layers_of(load_model(folder, device="cpu").model)
    mine = layers_of(kept.model)
    assert again is not None and mine is not None and again.arguments() == mine.arguments()
    stored, wanted = again.kept_grams(), mine.kept_grams()
    assert stored is not None and wanted is not None
    assert all(torch.equal(stored[n], g) and bool(g.any()) for n, g in wanted.items())
    (folder / ATTACHED).unlink()  # the layers taken off: what was learnt is back
    bare = load_model(folder, device="cpu").model
    assert where.losses(bare, where.forget) == pytest.approx(where.losses(where.original, where.forget), rel=1e-5)


# -- the plan and the options ------------------------------------------------------------------------------------------


def test_passes_take_turns_and_every_sample_is_seen_once_in_each() -> None:
    plan = Turns({"retain": [3] * 7, "forget": [3] * 4}, {"retain": 3, "forget": 3}, 2, 0)
    batches = [plan.batch(step) for step in range(plan.steps)]
    assert [next(iter(b)) for b in batches] == (["retain"] * 3 + ["forget"] * 2) * 2
    assert all(len(b) == 1 for b in batches)
    for turn in (batches[:5], batches[5:]):
        assert sorted(i for b in turn for i in b.get("retain", [])) == list(range(7))
        assert sorted(i for b in turn for i in b.get("forget", [])) == list(range(4))
    assert [list(Turns({"retain": [], "forget": [3]}, {"retain": 3, "forget": 3}, 2, 0).batch(s)) for s in (0, 1)] == [
        ["forget"]
    ] * 2


def test_refusals() -> None:
    for name, value in (("gamma", -1), ("rank", 0), ("bound", 0), ("ridge", 0)):
        with pytest.raises(UserError, match=f"{name} = {value}"):
            EUL.configure({name: value})
    model = EUL(here().context(), EUL.configure(QUICK)).model
    with pytest.raises(UserError, match=r"rank = 5 cannot be: the model's unlearning layers have rank 8\."):
        EUL(here().context(model=model), replace(EUL.configure(QUICK), rank=5))
