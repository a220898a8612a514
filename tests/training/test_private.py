"""Private training against autograd record by record, dp-accounting, and what adding or removing records may do."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from tests.matrix.worlds import world
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.load import Loaded
from expunge.models.tiny import init_classifier
from expunge.noise import derived, gaussian_noise
from expunge.options import configure
from expunge.privacy_accounting import gaussian_epsilon
from expunge.training.private import PrivateOptions, clipped_sum, train_private

torch.set_num_threads(1)
SEED = bytes(range(32))


@cache
def fresh() -> Loaded:
    return init_classifier(3, (1, 6), 1, "mlp", 0, mean=(0.0,), std=(1.0,))


def records(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, 1, 6), dtype=np.uint8)
    labels = [int(row.sum()) % 3 for row in rows]
    return [
        Sample(id=f"r{i}", subject=str(i), target=y, image=x) for i, (x, y) in enumerate(zip(rows, labels, strict=True))
    ]


def total(loaded: Loaded, samples: list[Sample], clip: float) -> list[Tensor]:
    return clipped_sum(loaded.model.eval(), loaded.adapter, samples, list(loaded.model.parameters()), clip)[0]


@pytest.mark.parametrize("clip", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("where", ["mlp", "text"])
def test_the_clipped_sum_is_the_sum_of_clipped_gradients(clip: float, where: str) -> None:
    """Reference: plain ``backward`` per record on a fresh graph, norms and sums by numpy."""
    if where == "mlp":
        model, adapter, samples = fresh().model.eval(), fresh().adapter, records(7)
    else:
        model, adapter, samples = world("text").start, world("text").adapter, list(world("text").forget[:5])
    slow = [np.zeros(p.shape) for p in model.parameters()]
    for sample in samples:
        twin = copy.deepcopy(model)
        batch = adapter.collate([sample])
        hidden, head = adapter.hidden_and_head(twin, batch)
        torch.nn.functional.cross_entropy(head(hidden), batch.targets_N).backward()
        own = [np.zeros(p.shape) if p.grad is None else p.grad.double().numpy() for p in twin.parameters()]
        norm = math.sqrt(sum((g**2).sum() for g in own))
        slow = [a + g * min(1.0, clip / norm) for a, g in zip(slow, own, strict=True)]
    found, loss = clipped_sum(model, adapter, samples, list(model.parameters()), clip)
    assert math.isfinite(loss) and all(t.dtype == torch.float64 for t in found)
    for a, b in zip(found, slow, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-4, atol=2e-6 * max(1.0, clip))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_group_moves_the_sum_by_at_most_its_size_times_the_clip(count: int) -> None:
    everybody = records(20, seed=count)
    clip = 0.01  # below every gradient: the bound is nearly reached by one record
    whole, part = total(fresh(), everybody, clip), total(fresh(), everybody[count:], clip)
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(whole, part, strict=True)))
    assert moved <= count * clip
    if count == 1:
        assert moved == pytest.approx(clip, rel=1e-9)


def test_a_record_counts_alike_beside_whomever_it_stands() -> None:
    """Bit for bit: no batch, so no kernel that rounds otherwise in other company."""
    crowd, own = records(20), records(1, seed=9)
    alone = total(fresh(), own, 1.0)
    before, after = total(fresh(), crowd, 1.0), total(fresh(), crowd + own, 1.0)
    for a, b, c in zip(before, after, alone, strict=True):
        assert torch.equal(b, a + c)


def test_a_record_without_a_finite_gradient_counts_as_none() -> None:
    model, adapter, samples = copy.deepcopy(fresh().model), fresh().adapter, records(2)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    sums, _ = clipped_sum(model, adapter, samples, list(model.parameters()), 1.0)
    assert all(not bool(t.any()) for t in sums)


@pytest.mark.parametrize(
    ("epsilon", "delta", "group", "steps"), [(8, 1e-5, 1, 100), (1, 1e-6, 10, 40), (3, 1e-4, 4, 7)]
)
def test_the_noise_is_what_dp_accounting_asks_for(epsilon: float, delta: float, group: int, steps: int) -> None:
    options = PrivateOptions(epsilon=epsilon, delta=delta, group=group, steps=steps)
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(options.multiplier / group), steps)
    theirs = PLDAccountant(value_discretization_interval=1e-4).compose(event).get_epsilon(delta)
    assert theirs == pytest.approx(epsilon, abs=1e-6)
    exact = dp_accounting.get_epsilon_gaussian(options.multiplier / group / math.sqrt(steps), delta)
    assert exact == pytest.approx(epsilon, abs=1e-6)
    assert gaussian_epsilon(options.mu * group, delta) == pytest.approx(epsilon, abs=1e-9)
    assert gaussian_epsilon(options.mu, delta) <= epsilon + 1e-9


def test_a_step_is_the_update_of_the_formula() -> None:
    """One and two steps against numpy: w − rate/n0 · (Σ clipped + noise of the step)."""
    options = PrivateOptions(epsilon=5, steps=2, learning_rate=3.0, records=50, clip=0.5)
    samples, twin, model = records(12), copy.deepcopy(fresh().model), copy.deepcopy(fresh().model)
    losses = train_private(model, fresh().adapter, samples, options, SEED)
    assert len(losses) == 2
    for step in range(2):
        sums, _ = clipped_sum(twin.eval(), fresh().adapter, samples, list(twin.parameters()), 0.5)
        with torch.no_grad():
            for (name, p), s in zip(twin.named_parameters(), sums, strict=True):
                noise = gaussian_noise(tuple(p.shape), options.multiplier * 0.5, derived(SEED, f"{step}/{name}"))
                p.copy_(torch.from_numpy(p.numpy().astype(np.float64) - 3.0 / 50 * (s.numpy() + noise)))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_seed_decides_and_nothing_else_does() -> None:
    options, samples = PrivateOptions(steps=3), records(10)

    def trained(seed: bytes) -> Tensor:
        model = copy.deepcopy(fresh().model)
        train_private(model, fresh().adapter, samples, options, seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = trained(SEED)
    torch.manual_seed(5)
    assert torch.equal(first, trained(SEED)) and not torch.equal(first, trained(bytes(32)))


def test_it_learns_where_there_are_records_enough_and_moves_no_buffer() -> None:
    samples = [replace(s, image=np.full((1, 6), 80 * int(s.target), np.uint8)) for s in records(60)]
    model = copy.deepcopy(fresh().model)
    losses = train_private(model, fresh().adapter, samples, PrivateOptions(epsilon=500, steps=15, records=60), SEED)
    assert losses[-1] < losses[0] - 0.1
    here = world("resnet")
    net = copy.deepcopy(here.start)
    state = {n: b.clone() for n, b in net.named_buffers()}
    train_private(net, here.adapter, here.forget[:2], PrivateOptions(steps=1), SEED)
    assert state and all(torch.equal(b, state[n]) for n, b in net.named_buffers()) and not net.training


def test_frozen_weights_stay() -> None:
    context = world("text").context(lora=True)
    before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
    train_private(context.model, context.adapter, context.forget[:2], PrivateOptions(steps=1), SEED)
    moved = {n for n, p in context.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n for n in moved)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epsilon": "0"}, "epsilon = 0.0 cannot be"),
        ({"epsilon": "inf"}, "epsilon = inf cannot be"),
        ({"delta": "1"}, "delta = 1.0 cannot be: give a number between 0 and 1"),
        ({"group": "0"}, "group = 0 cannot be: give 1 or more"),
        ({"clip": "-1"}, "clip = -1.0 cannot be"),
        ({"epsilonn": "1"}, "did you mean 'epsilon'"),
    ],
)
def test_bad_numbers_are_refused_in_one_sentence(given: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        configure(PrivateOptions, given, "option of --private")


def test_divergence_is_said() -> None:
    with pytest.raises(UserError, match="private training diverged"):
        train_private(
            copy.deepcopy(fresh().model),
            fresh().adapter,
            records(3),
            PrivateOptions(steps=1, learning_rate=1e300),
            SEED,
        )
