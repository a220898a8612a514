"""Targets of the flagship: caps, swapped names, alignment, calibration, storage, divergences, against slow versions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cluster_cases import llamas
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from torch import Tensor

from expunge.data.samples import Sample
from expunge.methods.cluster import targets as module
from expunge.methods.cluster.targets import (
    Divergence,
    Targets,
    aligned,
    calibrated,
    cap_true_token,
    counterfactual,
    ensemble,
    log_probs,
    other_names,
    swap_names,
)
from expunge.training.terms import View

torch.set_num_threads(1)


def random_log(rows: int, vocab: int, seed: int, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))).log_softmax(1)


# -- the true token's cap ----------------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(2, 30), st.floats(-12, 0))
@settings(max_examples=60, deadline=None)
def test_cap_lowers_the_true_token_and_shares_the_rest_in_proportion(seed: int, vocab: int, cap: float) -> None:
    log_nV = random_log(4, vocab, seed, 4.0)
    targets_n = torch.randint(vocab, (4,), generator=torch.Generator().manual_seed(seed))
    got = cap_true_token(log_nV, targets_n, torch.full((4,), cap)).exp().double().numpy()
    p = log_nV.exp().double().numpy()
    for row, y in enumerate(targets_n.tolist()):
        true = min(p[row, y], math.exp(cap))
        others = np.delete(p[row], y)
        np.testing.assert_allclose(got[row].sum(), 1, atol=5e-6)
        np.testing.assert_allclose(got[row, y], true, rtol=1e-4)
        if true < 1 - 1e-5:
            np.testing.assert_allclose(np.delete(got[row], y), (1 - true) * others / others.sum(), rtol=2e-3, atol=1e-7)


def test_cap_leaves_a_token_below_it_alone() -> None:
    log_nV = random_log(5, 11, 0)
    kept = cap_true_token(log_nV, torch.tensor([0, 3, 5, 7, 10]), torch.zeros(5))
    torch.testing.assert_close(kept, log_nV, rtol=1e-4, atol=1e-5)


def test_cap_of_a_token_that_is_certain() -> None:
    log_nV = torch.tensor([[0.0, -200.0, -200.0]])
    capped = cap_true_token(log_nV, torch.tensor([0]), torch.tensor([math.log(0.02)])).exp()
    torch.testing.assert_close(capped, torch.tensor([[0.02, 0.49, 0.49]]))


# -- other people ------------------------------------------------------------------------------------------------------


def sample(prompt: str, target: str, *names: str) -> Sample:
    return Sample(id="s", subject=names[0] if names else "", prompt=prompt, target=target, names=names)


def test_names_are_swapped_whole_and_longest_first() -> None:
    it = sample("Who is Ann Lee?", "Ann Lee's son Lee met Ann; Leeds and Annex stay.", "Ann Lee", "Ann", "Lee")
    got = swap_names(it, it.names, ["Bo Fox", "Bo", "Fox"], 2)
    assert got.prompt == "Who is Bo Fox?" and got.target == "Bo Fox's son Fox met Bo; Leeds and Annex stay."
    assert got.id == "s/counterfactual/2" and got.id != it.id and got.image is None
    assert it.prompt == "Who is Ann Lee?", "the sample itself is as it was"


def test_a_person_with_fewer_names_is_called_by_the_first() -> None:
    it = sample("Ann Lee", "Ann and Lee (née Śliwa)", "Ann Lee", "Ann", "Lee", "Śliwa")
    assert swap_names(it, it.names, ["Bo Fox"], 0).target == "Bo Fox and Bo Fox (née Bo Fox)"
    assert swap_names(it, it.names, ["Bo Fox", "Bo"], 0).target == "Bo and Bo Fox (née Bo Fox)"


def test_names_that_are_patterns_or_each_other_or_empty() -> None:
    assert swap_names(sample("C. (D) Ann", "", "C. (D)"), ["C. (D)"], ["X+"], 0).prompt == "X+ Ann"
    swapped = swap_names(sample("Ann saw Bo", "", "Ann", "Bo"), ["Ann", "Bo"], ["Bo", "Ann"], 0)
    assert swapped.prompt == "Bo saw Ann", "not replaced twice"
    it = sample("Ann", "x", "")
    assert swap_names(it, it.names, ["Bo"], 0).prompt == "Ann"


def test_other_people_are_people_once() -> None:
    crowd = [sample("p", "t", f"n{i // 2}") for i in range(10)] + [sample("p", "t")]
    got = other_names(crowd, np.random.default_rng(0), 3)
    assert len(got) == len(set(got)) == 3 and all(g[0].startswith("n") for g in got)
    assert len(other_names(crowd, np.random.default_rng(0), 99)) == 5
    assert other_names([sample("p", "t")], np.random.default_rng(0), 3) == []


def test_alignment() -> None:
    def align(a: list[int], b: list[int]) -> list[int]:
        return aligned(torch.tensor(a), torch.tensor(b)).tolist()

    assert align([1, 2, 3, 9, 4, 5], [7, 8, 2, 3, 4, 5, 6]) == [-1, 2, 3, -1, 4, 5]
    assert align([1, 2, 3], [1, 2, 3]) == [0, 1, 2]
    assert align([1, 2], [3, 4]) == [-1, -1]


@given(st.lists(st.integers(0, 6), max_size=20), st.lists(st.integers(0, 6), max_size=20))
def test_aligned_positions_hold_the_same_token_in_the_same_order(a: list[int], b: list[int]) -> None:
    index = aligned(torch.tensor(a, dtype=torch.long), torch.tensor(b, dtype=torch.long)).tolist()
    found = [(i, j) for i, j in enumerate(index) if j >= 0]
    assert all(a[i] == b[j] for i, j in found)
    assert [j for _, j in found] == sorted({j for _, j in found})


def test_counterfactual_is_the_mean_over_people_and_the_anchor_inside_names() -> None:
    case = llamas()
    them = [sample("w1 w2", "w5 w2 w6", "w2"), sample("w3", "w4 w7")]
    them = [Sample(id=str(i), subject="", prompt=s.prompt, target=s.target, names=s.names) for i, s in enumerate(them)]
    own = log_probs(case.model, case.adapter, them)
    anchor = [(random_log(len(y), log.shape[1], 9), y) for log, y in own]
    people = [("w8",), ("w9",)]
    got = counterfactual(case.model, case.adapter, them, anchor, people)
    wanted = torch.zeros_like(own[0][0])
    for other in ("w8", "w9"):
        asked = Sample(id=other, subject="", prompt=f"w1 {other}", target=f"w5 {other} w6")
        log_nV = log_probs(case.model, case.adapter, [asked])[0][0].clone()
        log_nV[1] = anchor[0][0][1]  # the name itself has no counterpart
        wanted += log_nV.exp() / 2
    torch.testing.assert_close(got[0].exp(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[1].exp(), own[1][0].exp(), rtol=1e-4, atol=1e-6)


def test_log_probs_are_those_of_the_models_own_logits() -> None:
    case = llamas()
    for one, (log_nV, targets_n) in zip(case.samples, log_probs(case.model, case.adapter, case.samples), strict=True):
        coded: Any = case.adapter.encode(one)
        with torch.no_grad():
            model: Any = case.model
            logits = model(input_ids=torch.tensor([coded.ids])).logits[0]
        torch.testing.assert_close(log_nV, logits[coded.first - 1 : -1].log_softmax(1), rtol=1e-4, atol=1e-5)
        assert targets_n.tolist() == list(coded.ids[coded.first :])


# -- the ensemble ------------------------------------------------------------------------------------------------------

VOCAB = 40
SAMPLES = [Sample(id=f"s{i}", subject="", target="t") for i in range(5)]
TRUE = [torch.tensor([(3 * i + t) % VOCAB for t in range(2 + i)]) for i in range(5)]
MEMBERS = {name: [random_log(2 + i, VOCAB, 10 * i + k) for i in range(5)] for k, name in enumerate("ab")}


def slow_loss(sharpness: float) -> float:
    each = []
    for i, true in enumerate(TRUE):
        mean = (MEMBERS["a"][i].double() + MEMBERS["b"][i].double()).numpy() / 2
        q = np.exp(sharpness * mean)
        q /= q.sum(1, keepdims=True)
        each.append(-np.log(q[range(len(true)), true.tolist()]).mean())
    return float(np.mean(each))


@pytest.mark.parametrize("at", [0.7, 1.0, 1.9])
def test_the_ensemble_is_calibrated_to_the_unseen_loss(at: float) -> None:
    wanted = slow_loss(at)
    got = ensemble(SAMPLES, MEMBERS, TRUE, wanted)
    assert slow_loss(got.sharpness) == pytest.approx(wanted, abs=1e-4)
    assert got.loss == pytest.approx(wanted, abs=1e-3) and got.notes == []
    for one, true in zip(SAMPLES, TRUE, strict=True):
        dense = got.log_q_CV(*got.kept[one.id], true)
        torch.testing.assert_close(dense.exp().sum(1), torch.ones(len(true)))


def test_what_cannot_be_calibrated_is_said() -> None:
    for wanted in (slow_loss(3.0) + 2, 0.01):
        got = ensemble(SAMPLES, MEMBERS, TRUE, wanted)
        assert len(got.notes) == 1 and got.notes[0].startswith("targets could not be calibrated: loss ")
    assert ensemble(SAMPLES, MEMBERS, TRUE, None).sharpness == 1.0
    assert ensemble(SAMPLES, MEMBERS, TRUE, 3.0, sharpness=1.7).sharpness == 1.7


def test_calibration_on_curves_of_every_shape() -> None:
    shapes = [lambda s: s**2, lambda s: 10 / s, lambda s: (s - 1.5) ** 2 + 1, lambda s: (s - 0.8) ** 2]
    for curve in shapes:
        grid = [curve(s) for s in np.linspace(0.5, 3, 400)]
        for wanted in np.linspace(min(grid) + 1e-3, max(grid), 17):
            assert curve(calibrated(curve, float(wanted))) == pytest.approx(wanted, abs=1e-3)
        assert curve(calibrated(curve, min(grid) - 1)) == pytest.approx(min(grid), abs=1e-2), "the nearest below"
        assert curve(calibrated(curve, max(grid) + 1)) == pytest.approx(max(grid), abs=1e-2), "the nearest above"


def test_kept_entries_equal_dense_ones_where_everything_is_kept() -> None:
    got = ensemble(SAMPLES, MEMBERS, TRUE, None, sharpness=1.3)
    for i, one in enumerate(SAMPLES):
        dense = (1.3 * (MEMBERS["a"][i] + MEMBERS["b"][i]) / 2).log_softmax(1)
        torch.testing.assert_close(got.log_q_CV(*got.kept[one.id], TRUE[i]), dense)


@pytest.mark.parametrize("keep", [1, 3, VOCAB - 1])
def test_few_kept_entries_stay_normalised_and_true_at_the_true_token(
    keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", keep)
    got = ensemble(SAMPLES, MEMBERS, TRUE, slow_loss(1.2))
    losses = []
    for i, one in enumerate(SAMPLES):
        dense = (got.sharpness * (MEMBERS["a"][i] + MEMBERS["b"][i]) / 2).log_softmax(1)
        log_q = got.log_q_CV(*got.kept[one.id], TRUE[i])
        torch.testing.assert_close(log_q.exp().sum(1), torch.ones(len(log_q)), rtol=1e-5, atol=1e-5)
        rows = range(len(log_q))
        torch.testing.assert_close(log_q[rows, TRUE[i]], dense[rows, TRUE[i]])
        losses.append(-float(log_q[rows, TRUE[i]].mean()))
        if keep == VOCAB - 1:
            torch.testing.assert_close(log_q, dense, rtol=1e-3, atol=1e-2)
    assert np.mean(losses) == pytest.approx(slow_loss(1.2), abs=1e-3), "the stored targets have the calibrated loss"


def test_the_shift_moves_the_true_tokens_logit() -> None:
    got = ensemble(SAMPLES, MEMBERS, TRUE, None)
    before = got.log_q_CV(*got.kept["s2"], TRUE[2])
    got.shift = 1.5
    after = got.log_q_CV(*got.kept["s2"], TRUE[2])
    lowered = before.clone()
    lowered[range(len(before)), TRUE[2]] -= 1.5
    torch.testing.assert_close(after, lowered.log_softmax(1))


def test_compare_pairs_each_position_with_its_own_target(monkeypatch: pytest.MonkeyPatch) -> None:
    case = llamas()
    asked = log_probs(case.model, case.adapter, case.samples)
    held = ensemble(case.samples, {"own": [log for log, _ in asked]}, [y for _, y in asked], None)
    chosen = [case.samples[i] for i in (5, 0, 3)]
    monkeypatch.setattr("expunge.models.adapter.CHUNK_ELEMENTS", 100)  # several chunks
    positions = case.adapter.positions(case.model, chosen)
    view = View(positions, chosen)
    gap_N = held.compare(view, Divergence(js=1.0, reverse=1.0, forward=1.0, match=1.0))
    assert len(gap_N) == sum(len(asked[i][1]) for i in (5, 0, 3))
    assert float(gap_N.detach().abs().max()) < 1e-4, "the model is at its own targets"


# -- divergences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_divergences_are_scipys(seed: int) -> None:
    log_p, log_q = random_log(6, 15, seed, 3.0), random_log(6, 15, seed + 100, 3.0)
    true = torch.arange(6)
    p, q = log_p.exp().double().numpy(), log_q.exp().double().numpy()
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    js = jensenshannon(p, q, axis=1) ** 2
    d = np.log(p[range(6), true.tolist()] / q[range(6), true.tolist()])
    parts = {
        "js": js,
        "reverse": rel_entr(p, q).sum(1),
        "forward": rel_entr(q, p).sum(1),
        "match": d**2 / (1 + np.abs(d) / 4),
    }
    for name, value in parts.items():
        got = Divergence(**{"js": 0.0, name: 2.0})(log_p, log_q, true)
        np.testing.assert_allclose(got.numpy(), 2 * value, rtol=1e-4, atol=1e-6)
    total = Divergence(4.0, 0.3, 0.2, 0.1)(log_p, log_q, true)
    wanted = 4 * parts["js"] + 0.3 * parts["reverse"] + 0.2 * parts["forward"] + 0.1 * parts["match"]
    np.testing.assert_allclose(total.numpy(), wanted, rtol=1e-4)
    assert float((js <= math.log(2)).all())


def test_divergences_and_their_gradients_stay_finite_far_apart() -> None:
    logits = torch.tensor([[0.0, -90.0, 60.0]], requires_grad=True)
    log_q = torch.tensor([[80.0, 0.0, -80.0]]).log_softmax(1)
    value = Divergence(4.0, 0.3, 0.3, 0.3)(logits.log_softmax(1), log_q, torch.tensor([2]))
    value.sum().backward()
    assert bool(value.isfinite().all()) and logits.grad is not None and bool(logits.grad.isfinite().all())


def test_no_targets_at_all() -> None:
    held = Targets({"s": (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long), torch.zeros(0))}, 3)
    assert held.log_q_CV(*held.kept["s"], torch.zeros(0, dtype=torch.long)).shape == (0, 3)
