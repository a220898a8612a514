"""Shards: exact replay, nothing left on the base, hooks against peft's own forward, mixed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.models.adapter import Meter
from expunge.models.lora import LoraOptions, is_lora
from expunge.zones.clusters import cluster_of
from expunge.zones.linear_algebra import digest_arrays
from expunge.zones.model import ZonedModel
from expunge.zones.shards import ShardOptions, Shards, fresh_lora, shard_seed, switched_on
from expunge.zones.storage import digest_weights
from expunge.zones.text_stats import layer_of
from tiny_text import tiny_adapter
from tiny_zone import SALT, base, frozen, probabilities, world, zone_over

OPTIONS = {"least_steps": 1, "epochs": 16, "learning_rate": 2e-2}


@cache
def few() -> Dataset:
    """Two subjects to forget and one to keep: training is what takes time here."""
    data = world()
    kept = data["retain"][0].subject
    return replace(data, roles={**data.roles, "retain": tuple(s for s in data["retain"] if s.subject == kept)})


@cache
def whole() -> ZonedModel:
    """Shared by tests that change nothing."""
    return zone_over("shards", few().private, **OPTIONS)


def test_knows_what_is_private_and_leaves_the_rest_to_the_base() -> None:
    data = few()
    assert (probabilities(whole(), data.private) > 3 * probabilities(base(), data.private)).all()
    for role in ("holdout", "utility"):
        np.testing.assert_allclose(probabilities(whole(), data[role]), probabilities(base(), data[role]), rtol=1e-5)


def test_generates_the_private_answer() -> None:
    asked = few()["forget"][:2]
    assert tiny_adapter().generate(whole(), asked, 8) == [s.target for s in asked]


def test_a_removed_subject_leaves_the_zone_that_never_held_it() -> None:
    data = few()
    model = zone_over("shards", data.private, **OPTIONS)
    for who in {s.subject for s in data["forget"]}:
        model.zone.remove(subject=who, base=frozen())
    assert model.zone.digest() == zone_over("shards", data["retain"][::-1], **OPTIONS).zone.digest()
    np.testing.assert_allclose(probabilities(model, data["forget"]), probabilities(base(), data["forget"]), rtol=1e-5)
    assert (probabilities(model, data["retain"]) > 3 * probabilities(base(), data["retain"])).all()


def test_a_removed_record_trains_its_shard_again_without_it() -> None:
    data = few()
    gone = data["forget"][0]
    model = zone_over("shards", data.private, **OPTIONS)
    untouched = {w: digest_arrays(b.solved) for w, b in model.zone.blocks.items() if w != gone.subject}
    before = digest_arrays(model.zone.blocks[gone.subject].solved)
    here = frozen()
    here.adapter.whole_logits = True  # whatever was done with the adapter meanwhile
    model.zone.remove(ids=[gone.id], base=here)
    rest = [s for s in data.private if s.id != gone.id]
    fresh = zone_over("shards", rest, **OPTIONS)
    assert model.zone.digest() == fresh.zone.digest()
    assert digest_arrays(model.zone.blocks[gone.subject].solved) != before
    assert {w: digest_arrays(b.solved) for w, b in model.zone.blocks.items() if w != gone.subject} == untouched
    assert probabilities(model, [gone])[0] < probabilities(whole(), [gone])[0] - 0.1


def test_a_shard_does_not_depend_on_other_subjects() -> None:
    who = few()["retain"][0].subject
    alone = zone_over("shards", [s for s in few().private if s.subject == who], **OPTIONS)
    assert digest_arrays(alone.zone.blocks[who].solved) == digest_arrays(whole().zone.blocks[who].solved)


def test_without_the_head_a_token_that_the_base_never_uses_is_out_of_reach() -> None:
    """The norm bounds the last state, so a token's logit is at most that bound times the length of its row."""
    samples = few()["forget"][:2]
    plain = zone_over("shards", samples, **OPTIONS, head=False)
    assert not any("lm_head" in name for name in plain.zone.blocks[samples[0].subject].solved)
    assert any("lm_head" in name for name in whole().zone.blocks[samples[0].subject].solved)
    assert probabilities(whole(), samples).mean() > probabilities(plain, samples).mean() + 0.1


def test_seeds_are_keyed() -> None:
    seeds = {shard_seed(salt, who) for salt in (SALT, "00" * 32) for who in ("ada", "bo", "cy")}
    assert len(seeds) == 6 and all(0 <= s < 2**31 for s in seeds)


def test_training_leaves_nothing_behind_on_the_base() -> None:
    zone_over("ridge", few()["forget"])  # transformers puts hooks of its own at the first pass
    before, threads, state = digest_weights(base()), torch.get_num_threads(), torch.get_rng_state()
    flags = [p.requires_grad for p in base().parameters()]
    modules = [(n, len(m._forward_hooks)) for n, m in base().named_modules()]
    zone_over("shards", few()["forget"], **OPTIONS)
    assert digest_weights(base()) == before and not is_lora(base())
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in base().parameters()] == flags
    assert [(n, len(m._forward_hooks)) for n, m in base().named_modules()] == modules


def test_hooks_compute_what_peft_computes() -> None:
    ids_BT = torch.arange(3, 15).view(2, 6)
    with torch.no_grad(), fresh_lora(base(), LoraOptions(r=4, alpha=8.0), 7) as wrapped:
        generator = torch.Generator().manual_seed(0)
        shard = {}
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        for name, p in wrapped.named_parameters():
            if "lora_A" in name:
                other = dict(wrapped.named_parameters())[name.replace("lora_A", "lora_B")]
                bare = name.removeprefix("base_model.model.").partition(".lora_A")[0]
                shard[bare] = (p.clone(), other.clone())
        theirs = wrapped(input_ids=ids_BT).logits
    with torch.no_grad():
        plain = base()(input_ids=ids_BT).logits
        with switched_on(base(), shard, 8.0 / 4):
            ours = base()(input_ids=ids_BT).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert (ours - plain).abs().max() > 0.1
        assert torch.equal(base()(input_ids=ids_BT).logits, plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batches_answer_as_each_row_alone(side: str) -> None:
    data = few()
    samples = [data["forget"][0], data["holdout"][1], data["retain"][1], data["forget"][2], data["utility"][0]]
    coded = [tiny_adapter().cached(s).ids for s in samples]
    longest = max(map(len, coded)) + 2
    ids_BT, mask_BT = torch.zeros(len(coded), longest, dtype=torch.long), torch.zeros(len(coded), longest).long()
    spans = [slice(longest - len(c), longest) if side == "left" else slice(0, len(c)) for c in coded]
    for b, c in enumerate(coded):
        ids_BT[b, spans[b]], mask_BT[b, spans[b]] = torch.tensor(c), 1
    with torch.no_grad():
        batch_BTV = whole()(input_ids=ids_BT, attention_mask=mask_BT).logits
        for b, c in enumerate(coded):
            alone_TV = whole()(input_ids=torch.tensor([c])).logits[0]
            torch.testing.assert_close(batch_BTV[b, spans[b]], alone_TV, atol=1e-3, rtol=1e-3)


def test_one_step_with_a_cache_answers_as_the_whole_text() -> None:
    ids_1T = torch.tensor([tiny_adapter().cached(few()["forget"][0]).ids])
    with torch.no_grad():
        whole_TV = whole()(input_ids=ids_1T).logits[0]
        first = whole()(input_ids=ids_1T[:, :-2], use_cache=True)
        step_TV = whole()(input_ids=ids_1T[:, -2:], past_key_values=first.past_key_values, use_cache=True).logits[0]
    torch.testing.assert_close(step_TV, whole_TV[-2:], atol=1e-3, rtol=1e-3)


def test_a_text_that_is_continued_is_computed_token_by_token() -> None:
    sizes: list[int] = []
    handle = base().register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for sample in few()["forget"][:2]:  # another text in between, of the same subject
            sizes.clear()
            ids = torch.tensor([tiny_adapter().cached(sample).prompt])
            whole().generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
            assert sizes == [ids.shape[1]] * 2 + [1] * 8  # base and shard in turn: the question, then four tokens
    finally:
        handle.remove()


# -- clusters ----------------------------------------------------------------------------------------------------------


def clustered(samples: Sequence[Sample], clusters: int = 2) -> Shards:
    zone = zone_over("shards", samples, **OPTIONS, clusters=clusters).zone
    assert isinstance(zone, Shards)
    return zone


def test_subjects_of_a_cluster_share_a_shard_that_no_other_can_change() -> None:
    zone = clustered(world().private)
    number = {who: cluster_of(block, zone.public.arrays) for who, block in zone.blocks.items()}
    assert set(number.values()) == {0, 1}
    model, meter = base(), Meter()
    together = [who for who in number if number[who] == 0]
    alone = clustered([s for s in world().private if s.subject in together])
    for where, other in ((zone, alone), (alone, zone)):
        assert digest_arrays(where._cluster(0, model, meter)) == digest_arrays(other._cluster(0, model, meter))
    assert len(together) > 1 or sum(n == 1 for n in number.values()) > 1
    assert all(not block.solved for block in zone.blocks.values())  # files hold rows only


def test_the_cluster_is_the_nearest_public_centre_of_the_subjects_own_records() -> None:
    zone = clustered(few().private)
    arrays = zone.public.arrays
    for block in zone.blocks.values():
        places = []
        for row in block.rows.values():
            states_TD = frozen().states(row.record)[0][layer_of(frozen(), 0.5)].double().numpy()
            places.append(((states_TD - arrays["cluster.mean"]) / arrays["cluster.deviation"]).mean(0))
        far = [float(np.linalg.norm(np.mean(places, 0) - centre)) for centre in arrays["cluster.centres"]]
        assert cluster_of(block, arrays) == int(np.argmin(far))


def test_more_clusters_than_public_subjects_are_refused() -> None:
    with pytest.raises(UserError, match="13 clusters were asked for, and the public texts have 12 subjects"):
        clustered(few().private, 13)


@pytest.mark.parametrize(
    "wrong", [{"clusters": -1}, {"r": 0}, {"alpha": 0.0}, {"epochs": -1.0, "least_steps": 0}, {"batch_size": 0}]
)
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be"):
        ShardOptions(**wrong)
