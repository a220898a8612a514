"""O3: adapters and gate against dense matrices and loops; prompts alone decide, in batches, padding and generation."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.worlds import World, world
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.beside import block_sites
from expunge.methods.families import replacement
from expunge.methods.gated_lora import SHRINK, Gate, GatedLora, adapted_layers
from expunge.methods.o3 import O3Options
from expunge.methods.registry import Outcome, get_method
from expunge.models.attached import ATTACHED, attachments
from expunge.models.load import Loaded, load_model, save_model

METHOD = get_method("o3")
QUICK = {"epochs": 4, "batch_size": 3}


def here() -> World:
    return world("text")


def guarded(where: World | None = None, **changes: Any) -> Outcome:
    return METHOD((where or here()).context(**changes), METHOD.configure(QUICK))


def guard_in(model: nn.Module) -> GatedLora:
    found = attachments(model)
    assert len(found) == 1 and isinstance(found[0], GatedLora)
    return found[0]


def weights_of(model: Any, where: World, samples: Any) -> list[float]:
    """Of the last request, as the pass over prompts and answers together has them."""
    with torch.no_grad():
        where.adapter.positions(model, samples)
    found = guard_in(model)._weights_QB
    assert found is not None
    return found[-1].tolist()


# -- adapters ----------------------------------------------------------------------------------------------------------


def merged(where: World, model: Any, weights: list[float]) -> nn.Module:
    """The original with Σ w (α/r) B A added to every weight: what each layer must amount to."""
    guard, plain = guard_in(model), copy.deepcopy(where.original)
    with torch.no_grad():
        for number, name in enumerate(guard.layers):
            for w, request in zip(weights, guard.requests, strict=True):
                change = request.B[number] @ request.A[number] * request.alpha / request.rank
                weight = plain.get_submodule(name).weight
                weight += w * change.reshape(weight.shape)
    return plain


@pytest.mark.parametrize("name", ["text", "resnet", "vit", "llava"])
def test_a_weight_per_sample_is_a_dense_update_for_that_sample(name: str) -> None:
    where = world(name)
    model = guarded(where).model
    samples = [*where.forget[:2], *where.retain[:2]]
    weights = weights_of(model, where, samples)
    assert max(weights) - min(weights) > 0.3
    together = where.losses(model, tuple(samples))
    for sample, w, loss in zip(samples, weights, together, strict=True):
        assert where.losses(merged(where, model, [w]), (sample,))[0] == pytest.approx(loss, rel=2e-3, abs=1e-4)


def test_all_linear_layers_of_the_blocks_have_one() -> None:
    where = here()
    layers = adapted_layers(where.original, block_sites(where.original, where.adapter, where.forget[0]))
    inside = [n for n, m in where.original.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    assert sorted(layers) == sorted(inside) and len(inside) == 14
    wrapped = where.context(lora=True).model
    assert adapted_layers(wrapped.get_base_model(), block_sites(wrapped, where.adapter, where.forget[0])) == layers  # type: ignore[operator]


def test_overlap_is_the_frobenius_norm_over_all_earlier_requests_and_the_penalty_lowers_it() -> None:
    where = here()
    first = guarded(forget=where.forget[:2]).model
    second = METHOD(where.context(model=first, forget=where.forget[2:4]), METHOD.configure(QUICK)).model
    found = {}
    for weight in (0.0, 3.0):
        model = copy.deepcopy(second)
        options = METHOD.configure({**QUICK, "orthogonal": weight, "epochs": 15})
        found[weight] = METHOD(where.context(model=model, forget=where.forget[4:]), options)
    guard = guard_in(found[3.0].model)
    total = 0.0
    for number in range(len(guard.layers)):
        for earlier in (0, 1):
            a, b = guard.requests[earlier].A[number].tolist(), guard.requests[2].A[number].tolist()
            total += sum(sum(x * y for x, y in zip(u, v, strict=True)) ** 2 for u in a for v in b)
    assert found[3.0].record["overlap"] == pytest.approx(total, rel=1e-4)
    assert found[3.0].record["overlap"] < 0.7 * found[0.0].record["overlap"]
    assert found[3.0].record["requests"] == 3


def test_the_penalty_in_the_objective_is_lambda_times_the_overlap() -> None:
    """In the first step's log, and as the gradient of A_new: 2 λ A_new A_earlierᵀ A_earlier."""
    where = here()
    model = guarded(forget=where.forget[:3]).model
    guard = guard_in(model)
    guard.add(4, 8.0, 1).begin(7)
    (slope,) = torch.autograd.grad(guard.overlap(1), [guard.requests[1].A[0]])
    old, new = guard.requests[0].A[0].detach(), guard.requests[1].A[0].detach()
    assert torch.allclose(slope, 2 * new @ old.T @ old, atol=1e-5)
    assert guard.overlap(0).item() == 0.0


# -- the gate ----------------------------------------------------------------------------------------------------------


def test_score_is_the_largest_whitened_cosine_averaged_over_blocks() -> None:
    chance = torch.Generator().manual_seed(0)
    known = [torch.randn(4, width, generator=chance) for width in (5, 3)]
    other = [torch.randn(9, width, generator=chance) for width in (5, 3)]
    gate = Gate([5, 3], 4)
    gate.learn(known, other)
    asked = [torch.randn(2, width, generator=chance) for width in (5, 3)]
    for row in range(2):
        best = []
        for k, o, q in zip(known, other, asked, strict=True):
            both = np.concatenate([k.numpy(), o.numpy()]).astype(float)
            centred = both - both.mean(0)
            covariance = centred.T @ centred / len(both)
            covariance += SHRINK * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
            inverse = np.linalg.inv(covariance)  # cosine after whitening = Mahalanobis inner product
            z = q[row].numpy() - both.mean(0)
            cosines = []
            for point in k.numpy():
                p = point - both.mean(0)
                cosines.append(z @ inverse @ p / math.sqrt((z @ inverse @ z) * (p @ inverse @ p)))
            best.append(max(cosines))
        assert gate.score(asked)[row].item() == pytest.approx(np.mean(best), abs=1e-4)
    assert torch.allclose(gate.score(known), torch.ones(4), atol=1e-5)
    left_out = gate.score(known, without_itself=True)
    fewer = Gate([5, 3], 3)
    fewer.load_state_dict({n: t[1:] if n.startswith("known") else t for n, t in gate.state_dict().items()})
    assert left_out[0].item() == pytest.approx(fewer.score([k[:1] for k in known]).item(), abs=1e-5)


def test_calibration_holds_on_the_prompts_it_was_made_of() -> None:
    where = here()
    outcome = guarded()
    gate = guard_in(outcome.model).requests[0].gate
    known = weights_of(outcome.model, where, where.forget)
    others = weights_of(outcome.model, where, [*where.retain, *where.unseen])
    assert min(known) >= 0.98 and float(np.median(others)) <= 0.011
    assert float(np.mean(np.array(others) > 0.5)) == pytest.approx(outcome.record["gate"]["false_alarms"])
    assert outcome.record["gate"]["false_alarms"] <= 0.05 + 1 / len(others)
    assert gate.get_buffer("threshold").item() == pytest.approx(outcome.record["gate"]["threshold"])


def test_without_other_prompts_the_forget_prompts_choose_the_threshold() -> None:
    outcome = guarded(retain=(), unseen=())
    known = guard_in(outcome.model)
    states = known.prompt_states(outcome.model, here().adapter, here().forget)
    left_out = known.requests[0].gate.score(states, without_itself=True)
    wanted = min(float(np.quantile(left_out.double().numpy(), 0.1)), 0.98)
    assert outcome.record["gate"]["threshold"] == pytest.approx(wanted)
    assert sum("no never-seen" in n or "no retain" in n for n in outcome.notes) == 2


def test_only_the_prompt_decides() -> None:
    where = here()
    model = guarded().model
    long, short = (replace(where.forget[0], id=i, target=t) for i, t in (("a", "red " * 9), ("b", "no")))
    (first,) = weights_of(model, where, [long])
    (second,) = weights_of(model, where, [short])
    assert first == pytest.approx(second, abs=1e-5)
    # The same tokens as one text without a known boundary read otherwise, unless the prompt is all there is.
    ids: list[int] = where.adapter.tokenizer(where.forget[0].prompt).input_ids  # type: ignore[attr-defined]
    with torch.no_grad():
        model(torch.tensor([ids]))  # type: ignore[operator]
    seen = guard_in(model)._weights_QB
    assert seen is not None and seen[0, 0].item() == pytest.approx(first, abs=1e-4)


def test_batches_and_padding_do_not_matter() -> None:
    where = here()
    model = guarded().model
    samples = [*where.forget[:3], *where.retain[:3]]
    alone = [weights_of(model, where, [s])[0] for s in samples]
    assert weights_of(model, where, samples) == pytest.approx(alone, abs=1e-4)
    longer = replace(where.forget[0], id="longer", prompt="who is " * 20)
    assert weights_of(model, where, [*samples, longer])[:-1] == pytest.approx(alone, abs=1e-4)


def test_generation_with_a_cache_keeps_the_weight_of_the_prompt() -> None:
    where = here()
    model = guarded().model
    samples = [where.forget[0], where.retain[0], where.retain[1]]
    weights = weights_of(model, where, samples)
    answers = where.adapter.generate(model, samples, 8)
    after = guard_in(model)._weights_QB
    assert after is not None and sorted(after[0].tolist()) == pytest.approx(sorted(weights), abs=1e-4)
    for sample, w, answer in zip(samples, weights, answers, strict=True):
        assert where.adapter.generate(merged(where, model, [w]), [sample], 8) == [answer]
    assert answers[0] != where.adapter.generate(where.original, samples[:1], 8)[0]
    assert answers[1:] == where.adapter.generate(where.original, samples[1:], 8)
    prompt = torch.tensor([where.adapter.tokenizer(samples[0].prompt).input_ids])  # type: ignore[attr-defined]
    beams = model.generate(prompt, num_beams=3, do_sample=False, max_new_tokens=4)  # type: ignore[operator]
    assert beams.shape[1] > prompt.shape[1]


def test_every_request_has_its_own_gate_and_adapter(tmp_path: Path) -> None:
    where = here()
    first, second = where.forget[:2], where.forget[4:]  # of two people
    model = guarded(forget=first).model
    kept = {n: t.detach().clone() for n, t in guard_in(model).state_dict().items()}
    once = where.losses(model, first)
    outcome = METHOD(where.context(model=model, forget=second, earlier=first), METHOD.configure(QUICK))
    guard = guard_in(outcome.model)
    assert outcome.record["requests"] == 2
    assert all(torch.equal(t, guard.state_dict()[n]) for n, t in kept.items())
    weights_of(outcome.model, where, [first[0], second[0], where.retain[0]])
    matrix = guard._weights_QB
    assert matrix is not None and matrix[0, 0] > 0.9 and matrix[1, 1] > 0.9
    assert float(matrix[:, 2].max()) < 0.5 and matrix[0, 1] < 0.9
    assert np.mean(where.losses(outcome.model, first)) > 0.5 * np.mean(once)
    assert where.loss(outcome.model, second) > where.loss(where.original, second) + 1
    folder = save_model(Loaded(outcome.model, where.adapter, ""), tmp_path / "model")
    again = load_model(folder, device="cpu")
    assert guard_in(again.model).arguments() == guard.arguments()
    answers = where.adapter.generate(outcome.model, where.forget, 6)
    assert again.adapter.generate(again.model, where.forget, 6) == answers
    (folder / ATTACHED).unlink()  # a guard: without it everything is back
    bare = load_model(folder, device="cpu").model
    assert where.losses(bare, where.forget) == pytest.approx(where.losses(where.original, where.forget), rel=1e-5)


def test_copies_have_gates_of_their_own() -> None:
    where = here()
    model = guarded().model
    twin = copy.deepcopy(model)
    with torch.no_grad():
        guard_in(twin).requests[0].gate.get_buffer("threshold").fill_(9.0)
    assert where.losses(twin, where.forget) == pytest.approx(where.losses(where.original, where.forget), abs=1e-3)
    assert where.loss(model, where.forget) > where.loss(twin, where.forget) + 1


def test_it_says_what_it_keeps_and_refuses_what_it_cannot_read() -> None:
    assert any("personal data" in n for n in guarded().notes)
    assert any("a guard" in n for n in guarded().notes) and not METHOD.removes_from_weights
    where = here()
    documents = (replace(where.forget[0], prompt=""), *where.forget[1:])
    with pytest.raises(UserError, match="1 of 6 forget samples have no prompt, which is what o3's gate reads"):
        METHOD(where.context(forget=documents))
    for name, value in (("rank", 0), ("alpha", 0), ("orthogonal", -1), ("false_alarms", 1), ("missed", 0)):
        with pytest.raises(UserError, match=f"{name} = {value}"):
            METHOD.configure({name: value})
    assert O3Options().orthogonal == 0.1


def test_training_is_on_other_answers_with_the_adapter_wholly_on() -> None:
    """First step: B is zero, so the loss is the original's on the replaced answers."""
    where = here()
    rng = np.random.default_rng(0)
    replaced = tuple(replacement(s, where.adapter, rng) for s in where.forget)
    outcome = METHOD(where.context(), METHOD.configure({"epochs": 1, "batch_size": 99}))
    total, tokens = 0.0, 0
    for sample, loss in zip(replaced, where.losses(where.original, replaced), strict=True):
        total, tokens = total + loss * where.adapter.num_targets(sample), tokens + where.adapter.num_targets(sample)
    assert outcome.record["log"][0]["other_answer"] == pytest.approx(total / tokens, rel=1e-4)
    assert outcome.record["log"][0]["overlap"] == 0.0


def test_gradients_of_a_and_b_against_finite_differences() -> None:
    where = here()
    model = guarded().model
    guard = guard_in(model)
    guard.forced = [1.0]
    a: Tensor = guard.requests[0].A[3].requires_grad_(True)

    def loss() -> Tensor:
        return -where.adapter.positions(model, where.forget[:2]).log_prob_N().mean()

    (gradient,) = torch.autograd.grad(loss(), [a])
    place = divmod(int(gradient.abs().argmax()), a.shape[1])
    values = []
    with torch.no_grad():
        for step in (1e-2, -1e-2):
            a[place] += step
            values.append(loss().item())
            a[place] -= step
    assert gradient[place].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.05)
