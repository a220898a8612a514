"""The learnt kernel: its loss against a slow reading, what learning brings, and zones that have it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from expunge.data.samples import Probe, Sample
from expunge.errors import UserError
from expunge.models.adapter import evaluating
from expunge.zones import learnt_kernel
from expunge.zones.context import KEY_UNIT, ContextZone, row_keys, sharpness
from expunge.zones.fixed_point import KEY_BITS
from expunge.zones.learnt_kernel import OWN, WORST, Positions, Surrogate, learn_kernel, ridge_loss
from expunge.zones.metric import plain_map
from expunge.zones.storage import digest_weights
from expunge.zones.zone import Public, get_zone
from tiny_text import tiny_adapter
from tiny_zone import SALT, base, frozen, world

torch.set_num_threads(1)
KINDS = {"ridge": {}, "shared": {"features": 256, "groups": 2}}
every_kind = pytest.mark.parametrize("kind", KINDS)


def positions(states_NC: Tensor, seed: int, tokens: int = 4) -> Positions:
    """One record per position, of ``tokens`` tokens in turn; bags that say nothing."""
    bags_NH = torch.zeros(len(states_NC), 8)
    bags_NH[:, seed % 8] = 1
    numbers = torch.arange(len(states_NC))
    return Positions(states_NC, bags_NH, numbers, numbers % tokens)


def person(seed: int, count: int = 12, width: int = 6) -> Surrogate:
    """What is known lies in the first half of a state; the other, from which the map starts, is noise."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.randn(count, width, generator=generator)
    rows, asked = (torch.cat([known, torch.randn(count, width, generator=generator)], dim=1) for _ in range(2))
    return Surrogate(positions(rows, seed), positions(asked, seed))


def test_loss_equals_a_slow_reading() -> None:
    """Row by row in plain Python: kernel, ridge by an inverse, softmax over the rows' tokens."""
    who = person(0, count=5, width=2)
    map_CK = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    p, q, alpha, scale = 1.5, 0.5, 0.1, 7.0

    def key(x: Tensor) -> list[float]:
        y = [sum(float(x[c]) * float(map_CK[c, k]) for c in range(4)) for k in range(3)]
        length = math.sqrt(sum(v * v for v in y))
        return [v / length for v in y]

    def kernel(x: Positions, m: int, n: int) -> float:
        near = sum(a * b for a, b in zip(key(x.states_NC[m]), key(who.rows.states_NC[n]), strict=True))
        return math.exp(p * near + q * float(x.bags_NH[m] @ who.rows.bags_NH[n]) - p - q)

    gram = np.array([[kernel(who.rows, m, n) for n in range(5)] for m in range(5)])
    solved = np.linalg.inv(gram + alpha * np.eye(5)) @ (scale * np.eye(4)[who.rows.target_N.numpy()])
    means = []
    for x in (who.rows, who.asked):
        losses = []
        for m in range(5):
            logits = np.array([kernel(x, m, n) for n in range(5)]) @ solved
            losses.append(min(WORST, math.log(np.exp(logits).sum()) - logits[int(x.target_N[m])]))
        means.append(sum(losses) / 5)
    found = ridge_loss(who, map_CK, torch.tensor([p, q]), alpha, scale)
    assert float(found) == pytest.approx(OWN * means[0] + (1 - OWN) * means[1], rel=1e-4)


def test_learning_finds_what_is_known_under_noise_in_others_too() -> None:
    people, others = [person(n) for n in range(20)], [person(n) for n in range(100, 110)]
    map_CK, p, q = learn_kernel(people, 2, 0.03, 16.0, 0)
    start = torch.from_numpy(plain_map(6, 2)), torch.full((2,), learnt_kernel.START)
    learnt = torch.from_numpy(map_CK), torch.tensor([p, q])
    before, after = (np.mean([float(ridge_loss(x, *known, 0.03, 16.0)) for x in others]) for known in (start, learnt))
    assert after < before - 1
    assert map_CK.shape == (12, 6) and map_CK.dtype == np.float32
    again = learn_kernel(people, 2, 0.03, 16.0, 0)
    assert np.array_equal(again[0], map_CK) and again[1:] == (p, q)


def test_large_surrogates_are_cut_by_whole_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learnt_kernel, "MOST", 7)
    who = person(0)
    drawn = who.drawn(torch.Generator().manual_seed(0))
    kept = set(drawn.rows.record_N.tolist())
    assert len(drawn.rows.record_N) == 7 == len(kept)
    assert set(drawn.asked.record_N.tolist()) == kept
    monkeypatch.setattr(learnt_kernel, "MOST", 12)
    whole = who.drawn(torch.Generator())
    assert whole.rows.states_NC is who.rows.states_NC


# -- in zones ----------------------------------------------------------------------------------------------------------


def asked_again(sample: Sample) -> Sample:
    """With a paraphrase of its question, in words that the tiny tokenizer has."""
    prompt = f"of {sample.subject} what is the {sample.id.partition('/')[2]}"
    return replace(sample, probes=(*sample.probes, Probe(kind="paraphrase", prompt=prompt, target=str(sample.target))))


@cache
def learnt(kind: str, learn: bool = True) -> Public:
    found = get_zone(kind)
    options = found.options(**KINDS[kind], false_open=0.05, learn=learn)
    with evaluating(base()):
        return found.build.prepare(frozen(), [asked_again(s) for s in world()["utility"]], options, 0)


def zone_of(kind: str, samples: list[Sample]) -> ContextZone:
    found = get_zone(kind)
    options = found.options(**KINDS[kind], false_open=0.05)
    zone = found.build(options, learnt(kind), digest_weights(base()), SALT)
    assert isinstance(zone, ContextZone)
    with evaluating(base()):
        zone.add([zone.record(s, tiny_adapter()) for s in samples], frozen())
    return zone


@every_kind
def test_keys_are_learnt_where_there_are_paraphrases_and_wished(kind: str) -> None:
    public, plain = learnt(kind), learnt(kind, learn=False)
    assert "map" in public.arrays and "map" not in plain.arrays
    assert plain.constants["state_weight"] == plain.constants["bag_weight"] == 1
    assert public.constants["state_weight"] != learnt_kernel.START
    zone = zone_of(kind, list(world().private))
    for block in zone.blocks.values():
        for row in block.rows.values():
            keys_NE = row_keys(row, public).astype(float)
            squares = np.square(keys_NE).sum(1) * KEY_UNIT
            np.testing.assert_allclose(squares, sharpness(public), rtol=0.02)
            states_NK = row.tensors["states"] / 2**KEY_BITS
            np.testing.assert_allclose(np.square(states_NK).sum(1), public.constants["state_weight"], rtol=0.02)


@every_kind
def test_removal_under_a_learnt_kernel_leaves_the_zone_that_is_built_without(kind: str) -> None:
    data = world()
    zone = zone_of(kind, list(data.private))
    gone = {s.subject for s in data["forget"]} - {data["forget"][0].subject}
    zone.remove(ids=[data["forget"][0].id], base=frozen())
    for who in gone:
        zone.remove(subject=who, base=frozen())
    rest = [s for s in data.private if s.subject not in gone and s.id != data["forget"][0].id]
    assert zone.digest() == zone_of(kind, rest[::-1]).digest()
    assert zone.check(frozen()) == []


@every_kind
def test_artefacts_of_an_earlier_version_are_refused(kind: str) -> None:
    public = learnt(kind, learn=False)
    constants = {k: v for k, v in public.constants.items() if k != "state_weight"}
    old = Public(arrays=public.arrays, constants=constants, texts=public.texts)
    with pytest.raises(UserError, match="build it again"):
        get_zone(kind).build(get_zone(kind).options(), old, "", SALT)
