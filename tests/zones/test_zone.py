"""What is removed was never there: digests of zones after removal against zones built without."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge.data.samples import Sample, subjects
from expunge.errors import UserError
from expunge.zones.build import build_zone, check_disjoint
from expunge.zones.storage import pack_block
from expunge.zones.zone import Row, Zone, get_zone, shared_owners
from zone_cases import adapter, base, document, private, world, zone_of

torch.set_num_threads(1)


def shuffled(samples: list[Sample], seed: int) -> list[Sample]:
    mixed = list(samples)
    random.Random(seed).shuffle(mixed)
    return mixed


def content(zone: Zone) -> list[bytes]:
    return [*zone.lines(), *(pack_block(zone.blocks[s]) for s in sorted(zone.blocks))]


@pytest.mark.parametrize("seed", range(5))
def test_a_removed_subject_was_never_there(seed: int) -> None:
    crowd = shuffled(private(), seed)
    gone = crowd[0].subject
    zone = zone_of(crowd)
    full = zone.digest()
    removed = zone.remove(subject=gone)
    without = zone_of(shuffled([s for s in crowd if s.subject != gone], seed + 100))
    assert zone.digest() == without.digest() != full
    assert content(zone) == content(without)
    assert set(removed.records) == {s.id for s in crowd if s.subject == gone} and removed.subjects == (gone,)


@pytest.mark.parametrize("seed", range(5))
def test_a_removed_record_was_never_there(seed: int) -> None:
    crowd = shuffled(private(), seed)
    zone = zone_of(crowd)
    zone.remove(ids=[crowd[0].id, crowd[7].id])
    without = zone_of(shuffled(crowd[1:7] + crowd[8:], seed + 100))
    assert zone.digest() == without.digest()
    assert content(zone) == content(without)


def test_removal_by_parts_in_any_order_ends_in_the_same_zone() -> None:
    crowd = private()
    digests = set()
    for seed in range(3):
        zone = zone_of(shuffled(crowd, seed))
        for s in shuffled(crowd[:6], seed):
            zone.remove(ids=[s.id])
        digests.add(zone.digest())
    assert digests == {zone_of(crowd[6:]).digest()}


def test_what_is_added_again_is_as_if_it_had_never_left() -> None:
    crowd = private()
    zone = zone_of(crowd)
    before = zone.digest()
    zone.remove(subject=crowd[0].subject)
    zone.add([zone.record(s, adapter()) for s in crowd if s.subject == crowd[0].subject], base())
    assert zone.digest() == before


def test_wrong_subject_removed_and_nothing_removed_are_seen_in_the_digest() -> None:
    crowd = private()
    first, second, *_ = subjects(crowd)
    wanted = zone_of([s for s in crowd if s.subject != first]).digest()
    wrong = zone_of(crowd)
    assert wrong.digest() != wanted  # the identity
    wrong.remove(subject=second)
    assert wrong.digest() != wanted


def test_each_part_of_a_row_counts_in_the_digest() -> None:
    crowd = private()[:4]
    before = zone_of(crowd).digest()
    zone = zone_of(crowd)
    block = next(iter(zone.blocks.values()))
    row_id, row = next(iter(block.rows.items()))
    keys = row.tensors["keys"].copy()
    keys[0, 0] ^= 1
    block.rows[row_id] = Row(row.record, {**row.tensors, "keys": keys}, row.source)
    assert zone.digest() != before
    block.rows[row_id] = Row(replace(row.record, ids=(*row.record.ids[:-1], 3)), row.tensors, row.source)
    assert zone.digest() != before
    other = zone_of(crowd)
    other.public = replace(other.public, constants={**other.public.constants, "threshold": 0.0})
    assert other.digest() != before


# -- facts about several subjects --------------------------------------------------------------------------------------


def test_a_shared_fact_goes_when_any_owner_goes() -> None:
    crowd = private()
    first, second, *_ = subjects(crowd)
    both = document(first, f"{first} shares a garden with {second}, where they grow pears.")
    owners = shared_owners([*crowd, both])
    assert owners == {both.id: (second,)}
    for leaves, stays in ((first, second), (second, first)):
        zone = zone_of([*crowd, both], owners=owners)
        assert both.id in zone.blocks[first].rows and both.id in zone.blocks[second].rows
        removed = zone.remove(subject=leaves)
        assert both.id not in zone.record_ids
        assert removed.shared == {both.id: (stays,)}
        without = [s for s in [*crowd, both] if leaves not in (s.subject, *owners.get(s.id, ()))]
        assert zone.digest() == zone_of(without, owners=owners).digest()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_private_texts_among_the_public_ones_are_refused() -> None:
    loaded, data = world()
    leaked = data["forget"][0]
    with pytest.raises(UserError, match="private and among the public texts"):
        build_zone(loaded, private(), [*data["utility"], leaked], "store")
    with pytest.raises(UserError, match="private and among the public texts"):
        check_disjoint(private(), [replace(data["utility"][0], subject=leaked.subject)])
    check_disjoint(private(), data["utility"])


def test_a_record_that_the_statistics_were_fitted_on_is_refused() -> None:
    """Also when it is added later: the statistics say which texts they came from."""
    zone = zone_of(private()[:4])
    before = zone.digest()
    with pytest.raises(UserError, match="statistics were fitted on"):
        zone.add([zone.record(world()[1]["utility"][3], adapter())], base())
    assert zone.digest() == before


def test_rows_from_a_batched_pass_are_found_and_not_accepted() -> None:
    """Padding moves the last bits of states; the fingerprint of the unrounded states shows it."""
    crowd = private()
    zone = zone_of(crowd)
    assert zone.check(base()) == []
    short, long = sorted(crowd[:8], key=adapter().num_tokens)[::7]
    model = world()[0].model
    batch = adapter().collate([short, long])
    with torch.no_grad():
        hidden = model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
    block = zone.blocks[short.subject]
    row = block.rows[short.id]

    class Batched:
        """Stands in for the base, with states from the batch."""

        def states(self, record: object) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
            return tuple(h[0, : len(row.record.ids)].float() for h in hidden), torch.zeros(0)

    tensors, source = zone.extract(row.record, Batched())  # type: ignore[arg-type]
    assert source != row.source
    block.rows[short.id] = Row(row.record, tensors, source)
    assert zone.check(base()) == [short.id]


def test_edited_rows_are_found() -> None:
    zone = zone_of(private()[:4])
    block = next(iter(zone.blocks.values()))
    row_id, row = next(iter(block.rows.items()))
    values = row.tensors["values"].copy()
    values[-1] = 5
    block.rows[row_id] = Row(row.record, {**row.tensors, "values": values}, row.source)
    assert zone.check(base()) == [row_id]


def test_extraction_does_not_depend_on_what_else_is_there() -> None:
    one = zone_of(private()[5:6])
    all_of_them = zone_of(private())
    row_id = private()[5].id
    subject = private()[5].subject
    alone, among = one.blocks[subject].rows[row_id], all_of_them.blocks[subject].rows[row_id]
    assert alone.source == among.source
    assert all(np.array_equal(alone.tensors[n], among.tensors[n]) for n in alone.tensors)


def test_errors_name_what_is_wrong() -> None:
    crowd = private()[:4]
    zone = zone_of(crowd)
    before = zone.digest()
    with pytest.raises(UserError, match="in the zone already"):
        zone.add([zone.record(crowd[0], adapter())], base())
    with pytest.raises(UserError, match="unknown subject"):
        zone.remove(subject="Nobody At All")
    with pytest.raises(UserError, match=r"unknown record .* did you mean"):
        zone.remove(ids=[crowd[0].id + "x"])
    with pytest.raises(UserError, match="has no subject"):
        zone.add([replace(zone.record(crowd[0], adapter()), id="new", owners=())], base())
    with pytest.raises(UserError, match="unknown zone 'stor': did you mean 'store'"):
        get_zone("stor")
    assert zone.digest() == before
