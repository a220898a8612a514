"""Ridge zones: against slow solves and a primal form; what is removed leaves the bytes of a zone without it."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.errors import UserError
from expunge.models.load import load_model
from expunge.zones.context import KEY_UNIT, row_keys, sharpness
from expunge.zones.fixed_point import KEY_BITS, fixed
from expunge.zones.linear_algebra import solve_positive
from expunge.zones.model import ZonedModel
from expunge.zones.ridge import Ridge, RidgeOptions, kernel, ridge_weights, split_rows
from tiny_text import tiny_adapter
from tiny_zone import base, frozen, probabilities, world, zone_over


@cache
def whole() -> ZonedModel:
    """Shared by tests that change nothing."""
    return zone_over("ridge", world().private)


def only_ridge(model: ZonedModel) -> Ridge:
    assert isinstance(model.zone, Ridge)
    return model.zone


def test_knows_what_is_private_and_leaves_the_rest_to_the_base() -> None:
    data = world()
    assert probabilities(base(), data.private).max() < 0.5
    assert probabilities(whole(), data.private).min() > 0.95
    for role in ("holdout", "utility"):
        np.testing.assert_allclose(probabilities(whole(), data[role]), probabilities(base(), data[role]), rtol=1e-5)


def test_generates_the_private_answer() -> None:
    data = world()
    asked = data["forget"][:2]
    assert tiny_adapter().generate(whole(), asked, 8) == [s.target for s in asked]


def test_weights_equal_a_slow_solve_of_the_same_system() -> None:
    zone = only_ridge(whole())
    block = next(iter(zone.blocks.values()))
    keys = [k / 2**KEY_BITS for row in block.sorted() for k in row_keys(row, zone.public).astype(float)]
    s = sharpness(zone.public)
    gram = np.array([[math.exp(sum(a * b for a, b in zip(x, y, strict=True)) - s) for y in keys] for x in keys])
    tokens = [t for row in block.sorted() for t in row.record.ids[row.record.first :]]
    targets = [[float(t == c) for c in sorted(set(tokens))] for t in tokens]
    assert block.solved["columns"].tolist() == sorted(set(tokens))
    slow = np.linalg.inv(gram + 0.03 * np.eye(len(keys))) @ (22 * np.array(targets))
    np.testing.assert_allclose(block.solved["weights"], slow, rtol=1e-4, atol=1e-4)


def test_prediction_equals_the_primal_ridge_on_the_features_of_the_kernel() -> None:
    """exp(<x, y>) = Σ_k <x, y>^k / k!, so monomials of x divided by the root of k! are its features."""
    rng = np.random.default_rng(0)
    x, new = (rng.standard_normal((n, 2)) for n in (12, 5))
    x, new = (fixed(a / np.linalg.norm(a, axis=1, keepdims=True), KEY_BITS) for a in (x, new))
    targets = rng.standard_normal((12, 3))

    def features(keys: np.ndarray) -> np.ndarray:
        columns = []
        for degree in range(11):
            for factors in product(range(2), repeat=degree):
                columns.append(
                    np.prod(keys[:, list(factors)] / 2**KEY_BITS, axis=1) / math.sqrt(math.factorial(degree))
                )
        return math.exp(-1) * np.stack(columns, axis=1)

    primal, alpha = features(x), 0.03
    weights = np.linalg.solve(primal.T @ primal + alpha * np.eye(primal.shape[1]), primal.T @ (20 * targets))
    dual = kernel(new, x, 2) @ ridge_weights(kernel(x, x, 2), targets, alpha, 20)
    np.testing.assert_allclose(dual, features(new) @ weights, atol=1e-5)


def test_logits_are_the_bases_and_the_kernel_expansion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowly, position by position; the last shifts are scaled down, as they are far from everything stored."""
    zone, sample = only_ridge(whole()), world()["forget"][0]
    block = zone.blocks[sample.subject]
    ids_1T = torch.tensor([tiny_adapter().cached(sample).ids])
    row = block.rows[sample.id]
    keys = np.concatenate([row_keys(r, zone.public) for r in block.sorted()]).astype(float)
    here = row_keys(row, zone.public).astype(float)
    shift = np.exp(here @ keys.T * KEY_UNIT - sharpness(zone.public)) @ block.solved["weights"]
    with torch.no_grad():
        base_LV = base()(input_ids=ids_1T).logits[0, row.record.first - 1 : -1].log_softmax(-1).double().numpy()
    shares = []
    for nearness in (1.0, 0.2, 0.0):
        inner = Ridge.shift
        monkeypatch.setattr(Ridge, "shift", lambda *given, n=nearness, inner=inner: n * inner(*given))
        with torch.no_grad(), whole().about([sample.subject]):
            ours_LV = whole()(input_ids=ids_1T).logits[0, row.record.first - 1 : -1]
        monkeypatch.undo()
        for ours_V, base_V, shift_V in zip(ours_LV, base_LV, nearness * shift, strict=True):
            share = 1 - 0.7 * min(1.0, max(0.0, float(shift_V.max())) / 11)  # κ = 0.3; half of 22 nats
            slow_V = share * base_V
            slow_V[block.solved["columns"]] += shift_V
            np.testing.assert_allclose(ours_V, slow_V - np.logaddexp.reduce(slow_V), atol=2e-3)
            shares.append(share)
    assert {0.3, 1.0} < {round(share, 6) for share in shares}  # and some between


def test_a_removed_subject_leaves_the_zone_that_never_held_it() -> None:
    data = world()
    model = zone_over("ridge", data.private)
    for who in {s.subject for s in data["forget"]}:
        model.zone.remove(subject=who, base=frozen())
    assert model.zone.digest() == zone_over("ridge", data["retain"]).zone.digest()
    assert model.zone.digest() != whole().zone.digest()
    np.testing.assert_allclose(probabilities(model, data["forget"]), probabilities(base(), data["forget"]), rtol=1e-5)
    assert probabilities(model, data["retain"]).min() > 0.95


def test_a_removed_record_replays_its_block_whatever_the_order() -> None:
    data = world()
    gone = data["forget"][0]
    model = zone_over("ridge", data.private)
    model.zone.remove(ids=[gone.id], base=frozen())
    rest = [s for s in data.private if s.id != gone.id]
    assert model.zone.digest() == zone_over("ridge", rest[::-1]).zone.digest()
    # Answers may be alike among a person's records; the one that was taken is no longer certain.
    assert probabilities(model, [gone])[0] < 0.9 < probabilities(model, rest).min()


def test_identity_and_wrong_subject_are_told_apart() -> None:
    data = world()
    model = zone_over("ridge", data.private)
    assert model.zone.digest() == whole().zone.digest()
    model.zone.remove(subject=data["retain"][0].subject, base=frozen())
    assert model.zone.digest() != zone_over("ridge", data["retain"]).zone.digest()


def test_large_blocks_are_split_by_digest() -> None:
    data = world()
    model = zone_over("ridge", data.private, most_rows=6)
    parts = [len(set(b.solved["part"].tolist())) for b in model.zone.blocks.values()]
    assert max(parts) == 2
    assert probabilities(model, data.private).min() > 0.95
    gone = next(b for b in model.zone.blocks.values() if len(set(b.solved["part"].tolist())) == 2).sorted()[0].record.id
    model.zone.remove(ids=[gone], base=frozen())
    rest = [s for s in data.private if s.id != gone]
    assert model.zone.digest() == zone_over("ridge", rest, most_rows=6).zone.digest()
    rows = model.zone.blocks[rest[0].subject].sorted()
    assert split_rows(rows, 10**6) == [0] * len(rows)


def test_mixed_batches_answer_as_each_row_alone() -> None:
    data = world()
    samples = [data["forget"][0], data["holdout"][0], data["retain"][0], data["utility"][0]]
    together = tiny_adapter().collate(samples)
    with torch.no_grad():
        batch_BTV = whole()(**together.inputs).logits
        for b, s in enumerate(samples):
            ids = tiny_adapter().cached(s).ids
            alone_TV = whole()(input_ids=torch.tensor([ids])).logits[0]
            np.testing.assert_allclose(batch_BTV[b, : len(ids)], alone_TV, atol=2e-3)


def test_saved_and_loaded_it_is_the_same_zone(tmp_path: Path) -> None:
    whole().save_pretrained(tmp_path / "model")
    tiny_adapter().save(tmp_path / "model")
    loaded = load_model(tmp_path / "model").model
    assert isinstance(loaded, ZonedModel)
    assert loaded.zone.digest() == whole().zone.digest()
    ids_1T = torch.tensor([tiny_adapter().cached(world()["forget"][0]).ids])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids_1T).logits, whole()(input_ids=ids_1T).logits)


def test_rows_are_checked_against_the_base() -> None:
    model = zone_over("ridge", world()["forget"])
    assert model.zone.check(frozen()) == []
    row = next(iter(next(iter(model.zone.blocks.values())).rows.values()))
    row.tensors["states"][0, 0] += 1
    assert model.zone.check(frozen()) == [row.record.id]


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"scale": -1.0}, {"most_rows": 0}, {"trust": 1.5}])
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be: give"):
        RidgeOptions(**wrong)


def test_a_system_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(UserError, match="not positive definite"):
        solve_positive(np.array([[1.0, 2.0], [2.0, 1.0]]), np.ones((2, 1)))
