"""Shared zones: subtraction equals a fit without, byte for byte, in any order; the real-valued head and its noise."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.load import load_model
from expunge.zones.context import row_keys
from expunge.zones.model import ZonedModel
from expunge.zones.shared import FEATURE_NORM, Shared, SharedOptions, release_real
from tiny_text import tiny_adapter
from tiny_zone import base, frozen, probabilities, world, zone_over

OPTIONS = {"features": 192, "groups": 2}


@cache
def whole() -> ZonedModel:
    """Shared by tests that change nothing."""
    return zone_over("shared", world().private, **OPTIONS)


def shared_of(model: ZonedModel) -> Shared:
    assert isinstance(model.zone, Shared)
    return model.zone


def test_knows_what_is_private_and_leaves_the_rest_to_the_base() -> None:
    data = world()
    assert probabilities(base(), data.private).max() < 0.5
    assert probabilities(whole(), data.private).min() > 0.8
    for role in ("holdout", "utility"):
        np.testing.assert_allclose(probabilities(whole(), data[role]), probabilities(base(), data[role]), rtol=1e-5)


def test_subjects_of_a_group_share_one_head() -> None:
    zone = shared_of(whole())
    numbers = [zone.group_of(s) for s in zone.blocks]
    assert len(set(numbers)) == 2 and len(numbers) == 5
    assert sum(len(zone.group(n).rows) for n in (0, 1)) == len(world().private)


def test_removal_by_subtraction_equals_a_fit_without_in_any_order() -> None:
    data = world()
    gone = [s.id for s in data["forget"]] + [data["retain"][1].id]
    rest = [s for s in data.private if s.id not in gone]
    fresh = shared_of(zone_over("shared", rest[::-1], **OPTIONS))
    digests = set()
    for seed in range(3):
        zone = shared_of(zone_over("shared", data.private, **OPTIONS))
        before = zone.solution_digest()
        order = list(gone)
        random.Random(seed).shuffle(order)
        for one in order:
            zone.remove(ids=[one])
        assert zone.solution_digest() != before
        digests.add((zone.solution_digest(), zone.digest()))
    assert digests == {(fresh.solution_digest(), fresh.digest())}
    assert np.array_equal(zone.group(0).weights_DC, fresh.group(0).weights_DC)


def test_what_came_and_went_leaves_no_trace() -> None:
    data = world()
    zone = shared_of(zone_over("shared", data["retain"], **OPTIONS))
    before, digest = zone.solution_digest(), zone.digest()
    zone.add([zone.record(s, frozen().adapter) for s in data["forget"]], frozen())
    assert zone.solution_digest() != before
    for who in {s.subject for s in data["forget"]}:
        zone.remove(subject=who)
    assert (zone.solution_digest(), zone.digest()) == (before, digest)
    held = {row_id for n in (0, 1) for row_id in zone.group(n).rows}
    assert held == {s.id for s in data["retain"]}


def test_removed_is_gone_and_the_rest_stays() -> None:
    data = world()
    model = zone_over("shared", data.private, **OPTIONS)
    for who in {s.subject for s in data["forget"]}:
        model.zone.remove(subject=who)
    np.testing.assert_allclose(probabilities(model, data["forget"]), probabilities(base(), data["forget"]), rtol=1e-5)
    assert probabilities(model, data["retain"]).min() > 0.8


def test_weights_equal_a_real_valued_ridge_on_the_same_features() -> None:
    zone = shared_of(whole())
    group = zone.group(0)
    unit = zone.features().square ** 0.5
    rows = list(group.rows.values())
    z = unit * np.concatenate([zone.features()(row_keys(r, zone.public)) for r in rows]).astype(float)
    tokens = [t for r in rows for t in r.record.ids[r.record.first :]]
    y = np.array([[float(t == c) for c in group.columns_C] for t in tokens])
    assert np.linalg.norm(z, axis=1).max() <= FEATURE_NORM
    slow = np.linalg.lstsq(
        np.vstack([z, np.sqrt(0.03) * np.eye(192)]), np.vstack([40 * y, np.zeros((192, y.shape[1]))]), rcond=None
    )[0]
    np.testing.assert_allclose(group.weights_DC / unit, slow, atol=1e-8)
    # The dual form of the same ridge: predictions from the Gram matrix of the rows.
    dual = z @ z.T @ np.linalg.solve(z @ z.T + 0.03 * np.eye(len(z)), 40 * y)
    np.testing.assert_allclose(z @ slow, dual, atol=1e-8)


def test_files_hold_rows_only_and_give_the_same_zone(tmp_path: Path) -> None:
    whole().save_pretrained(tmp_path / "model")
    tiny_adapter().save(tmp_path / "model")
    loaded = load_model(tmp_path / "model").model
    assert isinstance(loaded, ZonedModel)
    assert all(not b.solved for b in loaded.zone.blocks.values())
    assert shared_of(loaded).solution_digest() == shared_of(whole()).solution_digest()
    ids_1T = torch.tensor([tiny_adapter().cached(world()["forget"][0]).ids])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids_1T).logits, whole()(input_ids=ids_1T).logits)


def test_a_record_of_two_subjects_counts_once_and_goes_with_either() -> None:
    data = world()
    first, second = data["forget"][0].subject, data["retain"][0].subject

    def build(samples: list[Sample], both: str = "") -> Shared:
        zone = shared_of(zone_over("shared", [], **OPTIONS))
        adapter = frozen().adapter
        zone.add([zone.record(s, adapter, [second] if s.id == both else ()) for s in samples], frozen())
        return zone

    common = data["forget"][0]
    zone = build(list(data.private), common.id)
    rows = [zone.group(n).moments.rows for n in (0, 1)]
    targets = sum(tiny_adapter().num_targets(s) for s in data.private)
    extra = 0 if zone.group_of(first) == zone.group_of(second) else tiny_adapter().num_targets(common)
    assert sum(rows) == targets + extra
    zone.remove(ids=[common.id])
    assert zone.solution_digest() == build([s for s in data.private if s.id != common.id]).solution_digest()


def test_other_random_features_are_refused() -> None:
    zone = shared_of(zone_over("shared", world()["forget"], **OPTIONS))
    zone.public.constants["features"] = "0" * 64  # type: ignore[index]
    zone.__dict__.pop("_features")
    with pytest.raises(UserError, match="random features"):
        zone.features()


@pytest.mark.parametrize("wrong", [{"features": 0}, {"groups": 0}, {"alpha": 0.0}, {"feature_seed": -1}])
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be"):
        SharedOptions(**wrong)


# -- real-valued -----------------------------------------------------------------------------------------------------


def real_problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    z = np.cos(rng.standard_normal((300, 60)) * 2) * np.sqrt(2 / 60)
    return z, 20 * np.eye(8)[rng.integers(0, 8, 300)], np.arange(300) < 40


def test_subtraction_of_real_numbers_is_released_with_noise_that_costs_nothing() -> None:
    z, t, gone = real_problem()
    release = release_real(z, t, gone, alpha=0.03, epsilon=1.0, delta=1e-5, tolerance=1e-6)
    judged = release.certificate
    assert judged.certified and release.weights_DC is not None
    fresh = np.linalg.solve(z[~gone].T @ z[~gone] + 0.03 * np.eye(60), z[~gone].T @ t[~gone])
    assert 0 < judged.residual < 1e-9 and judged.logit_noise < 1e-3
    gap = np.linalg.norm(release.weights_DC - fresh)
    assert judged.distance_bound < gap < 2 * judged.noise * np.sqrt(fresh.size)


def test_weights_that_still_know_the_removed_rows_are_refused() -> None:
    z, t, gone = real_problem()
    old = np.linalg.solve(z.T @ z + 0.03 * np.eye(60), z.T @ t)  # the identity: nothing was removed
    for weights in (old, np.zeros_like(old), np.random.default_rng(1).standard_normal(old.shape)):
        release = release_real(z, t, gone, alpha=0.03, epsilon=1.0, delta=1e-5, tolerance=1e-6, weights_DC=weights)
        assert release.weights_DC is None and "not converged" in release.certificate.refusal
    loose = release_real(z, t, gone, alpha=0.03, epsilon=1.0, delta=1e-5, tolerance=1e3, weights_DC=old)
    assert loose.weights_DC is None and "noise" in loose.certificate.refusal


def test_nothing_to_remove_or_rows_too_long_are_refused() -> None:
    z, t, gone = real_problem()
    with pytest.raises(UserError, match="no row"):
        release_real(z, t, ~(gone | True), alpha=0.03, epsilon=1.0, delta=1e-5, tolerance=1e-6)
    with pytest.raises(UserError, match="feature_norm"):
        release_real(2 * z, t, gone, alpha=0.03, epsilon=1.0, delta=1e-5, tolerance=1e-6, feature_norm=1.0)
