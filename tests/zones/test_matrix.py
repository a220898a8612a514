"""Every kind of zone through the same behaviours."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.load import Loaded, load_model, save_model
from expunge.zones.build import build_zone
from expunge.zones.model import ZonedModel
from expunge.zones.storage import destroy_key, digest_weights, key_file
from tiny_text import tiny_adapter
from tiny_zone import base, frozen, probabilities, world, zone_over

torch.set_num_threads(1)

SHARD = {"least_steps": 1, "epochs": 16.0, "learning_rate": 2e-2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "store": ("store", {}),
    "ridge": ("ridge", {}),
    "shards": ("shards", SHARD),
    "shards by cluster": ("shards", {**SHARD, "clusters": 2}),
    "shared": ("shared", {"features": 256, "groups": 2}),
}
every_kind = pytest.mark.parametrize("name", KINDS)


def private() -> list[Sample]:
    """Two subjects to forget, one to keep, two records each."""
    data = world()
    kept = data["retain"][0].subject
    return [*data["forget"], *(s for s in data["retain"] if s.subject == kept)]


def zone_of(name: str, samples: list[Sample], owners: Mapping[str, tuple[str, ...]] | None = None) -> ZonedModel:
    kind, options = KINDS[name]
    return zone_over(kind, samples, owners, **options)


@cache
def whole(name: str) -> ZonedModel:
    """Shared by tests that change nothing."""
    return zone_of(name, private())


def alone(model: torch.nn.Module, sample: Sample) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([tiny_adapter().cached(sample).ids])).logits[0]
    return logits


def assert_same(first: ZonedModel, second: ZonedModel) -> None:
    """The same bytes, and the same bits in every answer."""
    assert first.zone.digest() == second.zone.digest()
    assert list(first.zone.lines()) == list(second.zone.lines())
    for s in (*private(), world()["utility"][0]):
        assert torch.equal(alone(first, s), alone(second, s))


def assert_closed(model: ZonedModel, samples: list[Sample]) -> None:
    for s in samples:
        assert torch.equal(alone(model, s), alone(base(), s).log_softmax(-1))


@every_kind
def test_it_knows_the_private_and_nothing_else_moves(name: str) -> None:
    before = digest_weights(base())
    assert (probabilities(whole(name), private()) > 2.5 * probabilities(base(), private())).all()
    assert_closed(whole(name), [*world()["utility"], *world()["holdout"]])
    assert digest_weights(base()) == before == whole(name).zone.base_digest


@every_kind
def test_the_order_of_building_does_not_matter(name: str) -> None:
    crowd = private()
    assert_same(zone_of(name, crowd[::-1]), whole(name))
    one_by_one = zone_of(name, crowd[3:])
    for s in crowd[:3]:
        one_by_one.zone.add([one_by_one.zone.record(s, tiny_adapter())], frozen())
    assert_same(one_by_one, whole(name))


@every_kind
def test_a_removed_subject_was_never_there(name: str) -> None:
    crowd = private()
    model, gone = zone_of(name, crowd), crowd[0].subject
    model.zone.remove(subject=gone, base=frozen())
    assert_same(model, zone_of(name, [s for s in crowd if s.subject != gone]))
    assert_closed(model, [s for s in crowd if s.subject == gone])
    assert model.zone.digest() != whole(name).zone.digest()


@every_kind
def test_a_removed_record_was_never_there(name: str) -> None:
    crowd = private()
    model = zone_of(name, crowd)
    model.zone.remove(ids=[crowd[1].id], base=frozen())
    assert_same(model, zone_of(name, [s for s in crowd if s.id != crowd[1].id]))


@every_kind
def test_saved_and_loaded_it_is_the_same_zone(name: str, tmp_path: Path) -> None:
    folder = save_model(Loaded(whole(name), tiny_adapter(), ""), tmp_path / "model")
    again = load_model(folder, device="cpu").model
    assert isinstance(again, ZonedModel)
    assert_same(again, whole(name))


@every_kind
def test_generation_with_a_cache_is_as_without(name: str) -> None:
    for s in (*private()[::2], world()["utility"][1]):
        ids = torch.tensor([tiny_adapter().cached(s).prompt])
        told = [
            whole(name).generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache, output_logits=True,
                                 return_dict_in_generate=True)
            for cache in (True, False)
        ]  # fmt: skip
        assert torch.equal(told[0].sequences, told[1].sequences)
        for cached, plain in zip(told[0].logits, told[1].logits, strict=True):
            torch.testing.assert_close(cached.exp(), plain.exp(), atol=1e-4, rtol=1e-3)


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_and_padding_do_not_matter(name: str, side: str) -> None:
    crowd = [private()[0], world()["utility"][1], private()[5], private()[2], world()["holdout"][0]]
    coded = [tiny_adapter().cached(s).ids for s in crowd]
    longest = max(map(len, coded)) + 2
    ids_BT, mask_BT = torch.zeros(len(coded), longest).long(), torch.zeros(len(coded), longest).long()
    spans = [slice(longest - len(c), longest) if side == "left" else slice(0, len(c)) for c in coded]
    for row, c in enumerate(coded):
        ids_BT[row, spans[row]], mask_BT[row, spans[row]] = torch.tensor(c), 1
    with torch.no_grad():
        places = (mask_BT.cumsum(1) - 1).clamp_min(0)
        logits_BTV = whole(name)(input_ids=ids_BT, attention_mask=mask_BT, position_ids=places).logits
    for row, s in enumerate(crowd):
        together, single = logits_BTV[row, spans[row]], alone(whole(name), s)
        torch.testing.assert_close(together.exp(), single.exp(), atol=1e-3, rtol=1e-3)


@every_kind
def test_a_block_without_its_key_stays_closed(name: str, tmp_path: Path) -> None:
    crowd, gone = private(), private()[0].subject
    folder = save_model(Loaded(whole(name), tiny_adapter(), ""), tmp_path / "model")
    destroy_key(key_file(whole(name).zone.salt, folder), gone)
    model = load_model(folder, device="cpu").model
    assert isinstance(model, ZonedModel) and len(model.zone.sealed) == 1
    assert_closed(model, [s for s in crowd if s.subject == gone])
    kept = [s for s in crowd if s.subject != gone]
    without = zone_of(name, kept)
    for s in kept:  # nothing of the closed block is left in what answers for the others
        assert torch.equal(alone(model, s), alone(without, s))


@every_kind
def test_access_is_per_subject(name: str) -> None:
    crowd, first = private(), private()[0].subject
    model = ZonedModel(base(), whole(name).zone).allow([first])
    assert_closed(model, [s for s in crowd if s.subject != first])
    assert torch.equal(alone(model, crowd[0]), alone(whole(name), crowd[0]))


@every_kind
def test_a_fact_about_several_goes_with_any_of_them(name: str) -> None:
    crowd = private()
    shared, other = crowd[0], crowd[2].subject
    model = zone_of(name, crowd, {shared.id: (other,)})
    assert set(model.zone.blocks[other].rows) == {shared.id, crowd[2].id, crowd[3].id}
    done = model.zone.remove(subject=other, base=frozen())
    assert dict(done.shared) == {shared.id: (shared.subject,)}
    assert_same(model, zone_of(name, [s for s in crowd if s.id != shared.id and s.subject != other]))


@every_kind
def test_statistics_on_private_texts_are_refused(name: str) -> None:
    kind, options = KINDS[name]
    public, crowd = list(world()["utility"]), private()
    loaded = Loaded(base(), tiny_adapter(), "")
    with pytest.raises(UserError, match="private and among the public texts"):
        build_zone(loaded, crowd, [*public, crowd[0]], kind, options=options)
    zone = zone_of(name, []).zone
    with pytest.raises(UserError, match="among the texts that the zone's statistics were fitted on"):
        zone.add([zone.record(public[0], tiny_adapter())], frozen())


@every_kind
def test_rows_are_checked_against_the_base(name: str) -> None:
    model = zone_of(name, private()[:2])
    assert model.zone.check(frozen()) == []
    block = next(iter(model.zone.blocks.values()))
    row_id, row = next(iter(block.rows.items()))
    block.rows[row_id] = type(row)(row.record, row.tensors, "00" * 32)
    assert model.zone.check(frozen()) == [row_id]


def test_probabilities_of_removed_subjects_are_the_bases() -> None:
    crowd = private()
    for name in KINDS:
        model = zone_of(name, crowd)
        for who in dict.fromkeys(s.subject for s in crowd):
            model.zone.remove(subject=who, base=frozen())
        np.testing.assert_array_equal(probabilities(model, crowd), probabilities(zone_of(name, []), crowd))
