"""Additivity, shares, choice, and whether predicted influence ranks what leaving clusters out really does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from cluster_cases import ALL, Case, images, llamas, text_samples

from expunge.errors import UserError
from expunge.methods.cluster.influence import (
    Influence,
    choose,
    cluster_shares,
    group_masks,
    layer_gradients,
    leave_cluster_out,
    objective,
    random_choice,
    token_influence,
)
from expunge.methods.cluster.kfac import Factor, kfac_factors
from expunge.methods.cluster.layers import linear_layers, restricted_gradient
from expunge.methods.cluster.tokens import forward
from expunge.training.terms import Term, View, training_term

TERM = training_term()


def retain_factors(case: Case) -> tuple[dict, dict[str, Factor]]:
    layers, _ = linear_layers(case.model)
    retain = text_samples(12, 7) if case.adapter.modality == "text" else case.samples
    return layers, kfac_factors(case.model, case.adapter, retain, layers, seed=1)


def labels_of(influence: Influence, clusters: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = {len(t): rng.integers(clusters, size=len(t)) for t in influence.tables.values()}
    return {n: drawn[len(t)] for n, t in influence.tables.items()}


@pytest.mark.parametrize("make", ALL)
def test_influence_is_additive_and_shares_sum_to_one(make: Callable[[], Case]) -> None:
    case = make()
    layers, factors = retain_factors(case)
    found = token_influence(case.model, case.adapter, case.samples, layers, factors, TERM, max_tokens=24)
    gradients = layer_gradients(case.model, case.adapter, case.samples, layers, TERM)
    for name, grad in gradients.items():
        expected = float((grad * factors[name].precondition(grad)).sum())
        assert found.values[name].sum() == pytest.approx(expected, rel=1e-4)
        assert found.totals[name] > 0
    shares = cluster_shares(found, labels_of(found, 5), 5)
    assert sum(s.sum() for s in shares.values()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("make", ALL)
def test_a_clusters_influence_is_its_own_gradient_in_the_metric(make: Callable[[], Case]) -> None:
    """I_k from token scores = <G_k, P> with G_k from a backward pass restricted to the cluster."""
    case = make()
    layers, factors = retain_factors(case)
    found = token_influence(case.model, case.adapter, case.samples, layers, factors, TERM)
    labels = labels_of(found, 3)
    gradients = layer_gradients(case.model, case.adapter, case.samples, layers, TERM)
    units = sum(case.adapter.num_targets(s) for s in case.samples)
    order = list(range(len(case.samples)))
    batch = case.adapter.collate(case.samples)
    whole = {n: torch.zeros(layer.shape) for n, layer in layers.items()}
    for k in range(3):
        masks = {}
        for n, table in found.tables.items():
            width = batch.inputs["input_ids"].shape[1] if "input_ids" in batch.inputs else int(table.col_N.max()) + 1
            masks[n] = table.grid(labels[n], order, width) == k
        case.model.zero_grad()
        with restricted_gradient(layers, masks):
            (-forward(case.model, case.adapter, batch).log_prob_N().sum() / units).backward()
        for n, layer in layers.items():
            assert layer.weight.grad is not None
            part = layer.matrix(layer.weight.grad)
            whole[n] += part
            expected = float((part * factors[n].precondition(gradients[n])).sum())
            mine = found.values[n][labels[n] == k].sum()
            assert mine == pytest.approx(expected, rel=1e-3, abs=1e-4 * found.totals[n])
    for n in layers:
        torch.testing.assert_close(whole[n], gradients[n], rtol=1e-4, atol=1e-5)


def test_padding_is_absent_and_what_follows_the_last_target_has_no_influence() -> None:
    case = llamas()
    layers, factors = retain_factors(case)
    found = token_influence(case.model, case.adapter, case.samples, layers, factors, TERM)
    table = found.table
    assert len(table) == sum(case.adapter.num_tokens(s) for s in case.samples)
    for i, sample in enumerate(case.samples):
        last = (table.sample_N == i) & (table.col_N == case.adapter.num_tokens(sample) - 1)
        assert last.sum() == 1
        assert all(value[last] == 0 for value in found.values.values())


def test_batching_and_sign_of_the_objective_do_not_matter() -> None:
    case = llamas()
    layers, factors = retain_factors(case)
    ascent = Term("ascent", "forget", "token", TERM.values, weight=-1.0)
    found = [
        token_influence(case.model, case.adapter, case.samples, layers, factors, term, max_tokens=size)
        for term, size in ((TERM, 10), (ascent, 4096))
    ]
    for name in layers:
        np.testing.assert_allclose(found[0].values[name], found[1].values[name], rtol=1e-3, atol=1e-5)


def test_output_head_is_traced_to_target_positions() -> None:
    case = llamas()
    layers, _ = linear_layers(case.model, lambda name: name == "lm_head", head=True)
    factors = kfac_factors(case.model, case.adapter, case.samples, layers)
    found = token_influence(case.model, case.adapter, case.samples, layers, factors, TERM, max_tokens=24)
    batch = case.adapter.collate(case.samples)
    expected = {(int(s), int(c)) for s, c in zip(batch.sample_N, batch.cols_N, strict=True)}
    table = found.table
    assert {(int(s), int(c)) for s, c in zip(table.sample_N, table.col_N, strict=True)} == expected


def test_the_choice_is_the_smallest_set() -> None:
    shares = {"a": np.array([0.4, -0.1, 0.15]), "b": np.array([0.3, 0.2, 0.05])}
    everything = [(n, k) for n in shares for k in range(3)]
    for reach in (0.2, 0.5, 0.8, 0.95, 1.0):
        chosen = choose(shares, reach)
        assert sum(shares[n][k] for n, k in chosen) >= reach - 1e-9
        smaller = combinations(everything, len(chosen) - 1)
        assert not any(sum(shares[n][k] for n, k in group) >= reach for group in smaller)
    with pytest.raises(UserError, match="reach"):
        choose(shares, 1.5)
    with pytest.raises(UserError, match="lower the reach"):
        choose({"a": np.array([0.3])}, 0.9)
    arm = random_choice(shares, 3, 0)
    assert len(set(arm)) == 3 and arm == random_choice(shares, 3, 0)


def test_group_masks() -> None:
    case = llamas()
    layers, _ = linear_layers(case.model)
    names = list(layers)
    labels_BT = torch.tensor([[0, 1, 2, -1], [2, 2, 0, 1]])
    masks = group_masks([(names[0], 2), (names[0], 0), (names[1], 1)], layers, labels_BT)
    assert torch.equal(masks[names[0]], (labels_BT == 0) | (labels_BT == 2))
    assert torch.equal(masks[names[1]], labels_BT == 1)
    assert not masks[names[2]].any()


@pytest.mark.parametrize("make", [llamas])
def test_predicted_influence_ranks_leaving_clusters_out(make: Callable[[], Case]) -> None:
    case = make()
    layers, factors = retain_factors(case)
    found = token_influence(case.model, case.adapter, case.samples, layers, factors, TERM)
    labels = found.table.sample_N % 8
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    gate = leave_cluster_out(case.model, case.adapter, case.samples, layers, factors, TERM, labels, 8, clip=1e-5)
    assert gate.rank_correlation > 0.9
    np.testing.assert_allclose(gate.true_K.sum(), gate.predicted_K.sum(), rtol=0.5)
    assert all(torch.equal(p, before[n]) for n, p in case.model.named_parameters())
    # In the limit of small steps prediction and truth are one number.
    small = leave_cluster_out(
        case.model.double(), case.adapter, case.samples, layers, factors, TERM, labels, 8, clip=1e-9
    )
    np.testing.assert_allclose(small.true_K, small.predicted_K, rtol=0.05, atol=0.02 * abs(small.predicted_K).max())


def test_no_gradient_and_no_samples_are_refused() -> None:
    case = images()
    layers, factors = retain_factors(case)
    with pytest.raises(UserError, match="none were given"):
        token_influence(case.model, case.adapter, [], layers, factors, TERM)

    def nothing(view: View) -> torch.Tensor:
        return 0.0 * view.log_prob_N()

    with pytest.raises(UserError, match="no gradient"):
        token_influence(
            case.model, case.adapter, case.samples, layers, factors, Term("zero", "forget", "token", nothing)
        )


def test_objective_is_the_mean_over_all_samples() -> None:
    case = llamas()
    whole = -forward(case.model, case.adapter, case.adapter.collate(case.samples)).log_prob_N().mean()
    assert objective(case.model, case.adapter, case.samples, TERM, max_tokens=24) == pytest.approx(
        float(whole.detach()), rel=1e-5
    )
