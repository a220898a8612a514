"""The router against a slow reading of its definition, and token by token against whole texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from expunge.data.samples import subjects
from expunge.zones.router import FEATURES, Router
from expunge.zones.zone import Block, Record, Row, Zone
from zone_cases import adapter, private, probes, public, world, zone_of

torch.set_num_threads(1)


def router_of(zone: Zone) -> Router:
    arrays, constants = zone.public.arrays, zone.public.constants
    return Router(arrays["idf"], arrays["gate"], constants["threshold"], constants["typical"]).index(zone.blocks)


def slow_features(zone: Zone, ids: Sequence[int], subject: str) -> list[float]:
    """The five features of one subject after ``ids``, straight from their definitions."""
    idf = zone.public.arrays["idf"].astype(float)
    bag = set(ids)

    def length(tokens: set[int]) -> float:
        return math.sqrt(sum(idf[t] ** 2 for t in tokens))

    def sim(who: str) -> float:
        found = []
        for row in zone.blocks[who].rows.values():
            question = set(row.record.ids[: row.record.first])
            both = sum(idf[t] ** 2 for t in bag & question)
            found.append(both / max(length(bag) * length(question), 1e-9))
        return max(found)

    def called(name: tuple[int, ...]) -> bool:
        return any(tuple(ids[i : i + len(name)]) == name for i in range(len(ids)))

    def names(who: str, full: bool) -> set[tuple[int, ...]]:
        found: set[tuple[int, ...]] = set()
        for row in zone.blocks[who].rows.values():
            r = row.record
            found |= set(r.names[: r.full_names] if full else r.names[r.full_names :])
        return found

    bearers = {n: sum(n in names(w, True) | names(w, False) for w in zone.blocks) for n in names(subject, True)}
    bearers |= {n: sum(n in names(w, True) | names(w, False) for w in zone.blocks) for n in names(subject, False)}
    words = set().union(*(r.record.ids for r in zone.blocks[subject].rows.values()))
    others = [sim(w) for w in zone.blocks if w != subject]
    return [
        max((1 / bearers[n] for n in names(subject, True) if called(n)), default=0.0),
        max((1 / bearers[n] for n in names(subject, False) if called(n)), default=0.0),
        sim(subject),
        sim(subject) - max(others),
        sum(idf[t] ** 2 for t in bag & words) / (length(bag) ** 2 + zone.public.constants["typical"]),
    ]


def test_features_are_what_they_are_defined_as() -> None:
    zone = zone_of(private())
    router = router_of(zone)
    texts = [adapter().cached(s).ids for s in (private()[3], probes(private())[10], world()[1]["utility"][0])]
    for ids in texts:
        features_TSF = router.read(router.start(), ids)[1]
        assert features_TSF.shape == (len(ids), len(zone.blocks), len(FEATURES))
        for t in range(2, len(ids), 5):
            for number, subject in enumerate(router.subjects):
                wanted = slow_features(zone, ids[: t + 1], subject)
                assert features_TSF[t, number] == pytest.approx(wanted, abs=1e-5)


def test_token_by_token_is_as_the_whole_text() -> None:
    zone = zone_of(private())
    ids = adapter().cached(probes(private())[4]).ids
    whole = router_of(zone)
    state, features_TSF, _ = whole.read(whole.start(), ids)
    step = router_of(zone)
    now, rows = step.start(), []
    for token in ids:
        now, one, _ = step.read(now, [token])
        rows.append(one[0])
    assert np.allclose(np.array(rows), features_TSF, atol=1e-6)
    assert np.allclose(now.best_S, state.best_S, atol=1e-5)


def test_of_several_open_blocks_the_one_that_fits_now_is_read() -> None:
    """A question that begins as somebody else's: both blocks open, and its own answers in the end."""
    record = {"first": 8, "digest": ""}
    first, second = (1, 2, 3, 4, 5, 6, 10, 11), (1, 2, 3, 4, 12, 13, 14, 15)
    blocks = {
        who: Block(who, {who: Row(Record(id=who, owners=(who,), ids=(*ids, 30), **record), {})})
        for who, ids in (("a", first), ("b", second))
    }
    gate = np.array([4, 2, 3, 2, 2, -3], dtype=np.float32)
    router = Router(np.ones(40, dtype=np.float32), gate, -0.5, 8.0).index(blocks)

    def read(ids: Sequence[int]) -> str:
        block_BT = router.route(torch.tensor([ids]), torch.ones(1, len(ids)), 1).block_BT
        return [*router.subjects, ""][block_BT[0, -1]]

    begun = (*first[:6], *second[4:])  # six tokens of the one, then all of the other
    assert read(first[:6]) == read(first) == "a" and read(second) == "b"
    assert read(begun) == "b" and read((*begun, 30)) == "b"
    assert read((20, 21, 22, 23, 24)) == ""


def test_routes_do_not_depend_on_batch_padding_or_steps() -> None:
    zone = zone_of(private())
    texts = [adapter().cached(s).ids for s in (private()[0], private()[9], world()[1]["utility"][5])]
    longest = max(map(len, texts))
    for left in (False, True):
        ids_BS = torch.zeros(len(texts), longest, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for row, ids in enumerate(texts):
            cut = slice(longest - len(ids), longest) if left else slice(0, len(ids))
            ids_BS[row, cut] = torch.tensor(ids)
            mask_BS[row, cut] = 1
        together = router_of(zone).route(ids_BS, mask_BS, longest)
        for row, ids in enumerate(texts):
            alone = router_of(zone).route(torch.tensor([ids]), torch.ones(1, len(ids)), len(ids))
            here = together.block_BT[row][mask_BS[row].bool()]
            assert here.tolist() == alone.block_BT[0].tolist()
            assert (together.block_BT[row][~mask_BS[row].bool()] == -1).all()
            stepwise = router_of(zone)
            found = [
                int(stepwise.route(torch.tensor([ids[: t + 1]]), torch.ones(1, t + 1), 1).block_BT[0, 0])
                for t in range(len(ids))
            ]
            assert found == alone.block_BT[0].tolist()


def test_private_questions_open_their_own_block_and_public_ones_none() -> None:
    zone = zone_of(private())
    router = router_of(zone)
    right = total = 0
    for s in [*private(), *probes(private())]:
        ids = adapter().cached(s).ids
        routes = router.route(torch.tensor([ids]), torch.ones(1, len(ids)), len(ids))
        last = int(routes.block_BT[0, -1])
        right += last >= 0 and router.subjects[last] == s.subject
        total += 1
    assert right == total
    opened = 0
    crowd = [*world()[1]["utility"], *probes(world()[1]["utility"])]
    for s in crowd:
        ids = adapter().cached(s).ids
        opened += int((router.route(torch.tensor([ids]), torch.ones(1, len(ids)), len(ids)).block_BT >= 0).any())
    assert opened <= 0.02 * len(crowd)


def test_a_given_subject_opens_from_the_first_token_and_access_closes() -> None:
    zone = zone_of(private())
    router = router_of(zone)
    first, second, *_ = sorted(subjects(private()))
    ids_BS = torch.tensor([adapter().cached(world()[1]["utility"][0]).ids])
    mask_BS = torch.ones_like(ids_BS)
    num = ids_BS.shape[1]
    assert set(router.route(ids_BS, mask_BS, num, about=[second]).block_BT[0].tolist()) == {1}
    shut = router.route(ids_BS, mask_BS, num, about=[second], allowed=frozenset({first}))
    assert (shut.block_BT == -1).all()
    own = next(s for s in private() if s.subject == first)
    ids_BS = torch.tensor([adapter().cached(own).ids])
    mask_BS = torch.ones_like(ids_BS)
    assert router.route(ids_BS, mask_BS, 1).block_BT.item() == 0
    assert router.route(ids_BS, mask_BS, 1, allowed=frozenset({second})).block_BT.item() == -1


def test_without_blocks_everything_is_closed() -> None:
    router = Router(public().arrays["idf"], public().arrays["gate"], 0.0, 1.0).index({})
    assert (router.route(torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5), 5).block_BT == -1).all()
