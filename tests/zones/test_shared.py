"""Shared zones: subtraction equals a fit without, byte for byte, in any order; releases with noise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.load import Loaded, load_model, save_model
from expunge.noise import NoiseGone, gaussian_noise
from expunge.privacy_accounting import gaussian_mu
from expunge.signals.forward import collect
from expunge.zones.context import row_keys
from expunge.zones.linear_algebra import solve_within
from expunge.zones.model import ZonedModel
from expunge.zones.shared import FEATURE_NORM, Shared, SharedOptions
from expunge.zones.storage import destroy_key, key_file, noise_file
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
        np.vstack([z, np.sqrt(0.03) * np.eye(192)]), np.vstack([22 * y, np.zeros((192, y.shape[1]))]), rcond=None
    )[0]
    np.testing.assert_allclose(group.weights_DC / unit, slow, atol=1e-8)
    # The dual form of the same ridge: predictions from the Gram matrix of the rows.
    dual = z @ z.T @ np.linalg.solve(z @ z.T + 0.03 * np.eye(len(z)), 22 * y)
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


# -- releases with noise ---------------------------------------------------------------------------------------------

NOISY = {"features": 256, "groups": 3, "epsilon": 1.0}


def private() -> list[Sample]:
    return list(world().private)


def noisy(samples: Sequence[Sample]) -> tuple[ZonedModel, Shared]:
    model = zone_over("shared", samples, **NOISY)
    assert isinstance(model.zone, Shared)
    return model, model.zone


def exact_weights(zone: Shared, number: int) -> np.ndarray:
    """The ridge solution of a group by another solver, from its rows alone."""
    rows = [r for who, b in zone.blocks.items() if zone.group_of(who) == number for r in b.rows.values()]
    columns = zone.kept[f"{number}/columns"]
    if not rows:
        return np.zeros((zone.options.features, 0))
    z = np.concatenate([zone.features()(row_keys(r, zone.public)) for r in rows]) * zone.features().square ** 0.5
    tokens = np.concatenate([np.array(r.record.ids[r.record.first :]) for r in rows])
    targets = zone.options.scale * (tokens[:, None] == columns)
    found: np.ndarray = np.linalg.solve(z.T @ z + zone.options.alpha * np.eye(z.shape[1]), z.T @ targets)
    return found


def test_a_release_is_the_solution_within_the_bound_and_noise_of_the_promised_size() -> None:
    model, zone = noisy(private())
    judged, earlier = zone.certificate()
    assert judged.certified and not earlier and 0 < judged.residual <= judged.tolerance
    assert judged.noise == pytest.approx(2 * 5e-4 / (0.03 * gaussian_mu(1.0, 1e-5)))
    noises, far = [], 0.0
    for number in range(3):
        seed = bytes.fromhex(zone.noise[str(number)])
        shape = zone.kept[f"{number}/weights"].shape
        noise = gaussian_noise(shape, judged.noise, seed)
        noises.append((zone.kept[f"{number}/weights"] - exact_weights(zone, number)).ravel())
        far += float(np.sum((zone.kept[f"{number}/weights"] - noise - exact_weights(zone, number)) ** 2))
    assert 0 < far**0.5 <= judged.distance_bound
    drawn = np.concatenate(noises)
    assert drawn.std() == pytest.approx(judged.noise, rel=6 / (2 * drawn.size) ** 0.5)
    assert np.mean([s.prob for s in collect(model, tiny_adapter(), private())]) > 0.98


def test_a_removal_starts_from_what_was_released_and_is_within_the_bound_of_a_fresh_solve() -> None:
    """Not equal to a zone that never had the record, but nearer to its solution than the certificate says."""
    _, zone = noisy(private())
    gone = private()[0].subject
    old = {name: value.copy() for name, value in zone.kept.items()}
    zone.remove(subject=gone, base=frozen())
    judged, earlier = zone.certificate()
    assert judged.certified and not earlier
    for number in range(3):
        same = np.array_equal(old[f"{number}/weights"], zone.kept[f"{number}/weights"])
        assert same == (number != zone.group_of(gone))  # other groups are not released again
    _, without = noisy([s for s in private() if s.subject != gone])
    assert list(without.lines()) != list(zone.lines()) and without.digest() != zone.digest()
    zone.remove(subject=private()[-1].subject, base=frozen())
    assert zone.certificate()[1] == (pytest.approx(gaussian_mu(1.0, 1e-5)),)  # the removal before counts too


def test_weights_that_still_know_the_removed_rows_are_refused() -> None:
    """Weights of before the removal, with the noise of now: the measured gradient norm gives them away."""
    _, zone = noisy(private())
    number = zone.group_of(private()[0].subject)
    old = exact_weights(zone, number)
    columns = zone.kept[f"{number}/columns"]
    zone.remove(ids=[private()[0].id], base=frozen())
    deviation = zone.certificate()[0].noise
    kept = np.searchsorted(columns, zone.kept[f"{number}/columns"])
    stale = old[:, kept]
    seed = bytes.fromhex(zone.noise[str(number)])
    for weights in (stale, np.zeros_like(stale), np.random.default_rng(1).standard_normal(stale.shape)):
        zone.kept[f"{number}/weights"] = weights + gaussian_noise(stale.shape, deviation, seed)
        judged = zone.certificate()[0]
        assert not judged.certified and "not converged" in judged.refusal
    zone.noise[str(number)] = "00" * 32  # noise of another seed does not come off
    assert not zone.certificate()[0].certified


def test_files_hold_the_release_sealed_and_the_seeds_apart(tmp_path: Path) -> None:
    model, zone = noisy(private())
    folder = save_model(Loaded(model, tiny_adapter(), ""), tmp_path / "model")
    keys = key_file(zone.salt, folder)
    seeds = noise_file(keys)
    assert seeds.stat().st_mode & 0o077 == 0 and seeds.parent == tmp_path
    written = b"".join(p.read_bytes() for p in folder.iterdir())
    number = str(zone.group_of(private()[0].subject))
    assert zone.kept[f"{number}/weights"].tobytes()[:64] not in written
    assert not any(
        bytes.fromhex(s) in written or s.encode() in written + keys.read_bytes() for s in zone.noise.values()
    )
    again = load_model(folder).model
    assert isinstance(again, ZonedModel) and isinstance(again.zone, Shared)
    assert again.zone.digest() == zone.digest() and again.zone.certificate() == zone.certificate()
    seeds.unlink()
    blind = load_model(folder).model
    assert isinstance(blind, ZonedModel) and isinstance(blind.zone, Shared)
    assert blind.zone.digest() == zone.digest()
    with pytest.raises(NoiseGone, match="seeds"):
        blind.zone.certificate()
    seeds.write_text("{}")
    with pytest.raises(UserError, match="no seeds"):
        load_model(folder)


def test_a_group_whose_rows_are_not_those_of_its_release_stays_closed(tmp_path: Path) -> None:
    """Whoever's key is destroyed is in the released weights still, so that nobody's block of that group opens."""
    model, zone = noisy(private())
    folder = save_model(Loaded(model, tiny_adapter(), ""), tmp_path / "model")
    gone = private()[0].subject
    destroy_key(key_file(zone.salt, folder), gone)
    again = load_model(folder).model
    assert isinstance(again, ZonedModel) and isinstance(again.zone, Shared)
    for s, now in zip(private(), collect(again, tiny_adapter(), private()), strict=True):
        assert (now.prob > 0.9) == (zone.group_of(s.subject) != zone.group_of(gone))
    with pytest.raises(UserError, match="no release"):
        again.zone.certificate()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epsilon": 1.0, "tolerance": 1e-2}, "noise of standard deviation"),
        ({"epsilon": 1.0, "tolerance": 0.0}, "cannot be"),
        ({"epsilon": -1.0}, "cannot be"),
        ({"epsilon": 1.0, "delta": 2.0}, "cannot be"),
    ],
)
def test_a_release_that_hides_nothing_or_helps_nobody_is_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SharedOptions(**wrong)


def test_a_solve_stops_within_its_tolerance_or_says_that_it_cannot() -> None:
    rng = np.random.default_rng(0)
    z, right, start = rng.standard_normal((90, 40)), rng.standard_normal((40, 3)), rng.standard_normal((40, 3))
    matrix = z.T @ z + 0.1 * np.eye(40)
    for tolerance in (1e-2, 1e-6, 1e-11):
        found, residual = solve_within(matrix, right, start, tolerance)
        assert residual == pytest.approx(np.linalg.norm(matrix @ found - right), rel=1e-3, abs=1e-13)
        assert residual <= tolerance
        assert np.linalg.norm(found - np.linalg.solve(matrix, right)) <= tolerance / 0.1
    with pytest.raises(UserError, match="not converged"):
        solve_within(matrix, right, start, 1e-30)
    with pytest.raises(UserError, match="larger ridge"):
        solve_within(-matrix, right, start, 1e-3)
