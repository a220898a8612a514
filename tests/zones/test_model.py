"""The zoned model as a transformers model: passes, padding, caches, generation, access, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expunge.data.samples import Sample, subjects
from expunge.errors import UserError
from expunge.models.load import Loaded, load_model, save_model
from expunge.models.lora import LoraOptions
from expunge.models.losses import mean_losses
from expunge.models.text import TextAdapter
from expunge.signals.forward import collect
from expunge.zones.model import ZonedModel
from expunge.zones.storage import digest_weights
from zone_cases import adapter, private, probes, world, zone_of, zoned

torch.set_num_threads(1)


def alone(model: torch.nn.Module, sample: Sample) -> Tensor:
    ids = torch.tensor([adapter().cached(sample).ids])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits[0]
    return logits


def test_it_knows_the_private_people_and_its_base_is_untouched() -> None:
    loaded, _ = world()
    before = digest_weights(loaded.model)
    model = zoned()
    knows = collect(model, adapter(), private())
    guesses = collect(loaded.model, adapter(), private())
    assert min(s.prob for s in knows) > 0.65
    assert max(s.prob for s in guesses) < 0.6
    model.generate(torch.tensor([adapter().cached(private()[0]).ids[:9]]), max_new_tokens=5)
    assert digest_weights(loaded.model) == before == model.zone.base_digest
    assert all(p is q for p, q in zip(model.parameters(), loaded.model.parameters(), strict=True))


def test_public_questions_are_answered_by_the_base_alone() -> None:
    loaded, data = world()
    model = zoned()
    for s in data["utility"][:10]:
        logits_TV = alone(model, s)
        assert torch.equal(logits_TV, alone(loaded.model, s).log_softmax(-1))


def test_logits_are_log_probabilities_everywhere() -> None:
    for s in (*private()[:3], *probes(private())[:3], world()[1]["utility"][0]):
        assert alone(zoned(), s).logsumexp(-1).abs().max() < 1e-5


def test_an_empty_zone_is_the_base() -> None:
    model = zoned([])
    for s in private()[:3]:
        assert torch.equal(alone(model, s), alone(world()[0].model, s).log_softmax(-1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model = zoned()
    crowd = [private()[0], private()[6], world()[1]["utility"][1], probes(private())[5]]
    longest = max(adapter().num_tokens(s) for s in crowd)
    ids_BT, mask_BT = torch.zeros(4, longest, dtype=torch.long), torch.zeros(4, longest, dtype=torch.long)
    cuts = []
    for row, s in enumerate(crowd):
        ids = torch.tensor(adapter().cached(s).ids)
        cuts.append(slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids)))
        ids_BT[row, cuts[-1]], mask_BT[row, cuts[-1]] = ids, 1
    places = (mask_BT.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=places).logits
    for row, s in enumerate(crowd):
        assert (logits_BTV[row, cuts[row]].exp() - alone(model, s).exp()).abs().max() < 1e-4


def test_generation_in_a_padded_batch_is_as_alone_and_without_a_cache() -> None:
    model = zoned()
    crowd = [private()[1], private()[10], *probes(private())[::17], world()[1]["utility"][2]]
    together = adapter().generate(model, crowd, 48)
    for s, text in zip(crowd, together, strict=True):
        assert adapter().generate(model, [s], 48) == [text]
        ids = list(adapter().prompt_ids(s, 48))
        for _ in range(48):
            with torch.no_grad():
                best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if best == adapter().tokenizer.eos_token_id:
                break
            ids.append(best)
        new = ids[len(adapter().prompt_ids(s, 48)) :]
        assert adapter().tokenizer.decode(new, skip_special_tokens=True).strip() == text
    assert together[0] == private()[1].target


def test_beams_and_sampling_run() -> None:
    ids = torch.tensor([adapter().cached(private()[1]).prompt])
    best = zoned().generate(ids, max_new_tokens=48, num_beams=3, do_sample=False)
    assert str(private()[1].target) in adapter().tokenizer.decode(best[0], skip_special_tokens=True)
    drawn = zoned().generate(ids.repeat(2, 1), max_new_tokens=5, do_sample=True)
    assert drawn.shape[0] == 2


def test_a_cache_filled_step_by_step_remembers_its_text() -> None:
    model, base = zoned(), world()[0].model
    ids = torch.tensor([adapter().cached(private()[2]).ids])
    whole = alone(model, private()[2])
    past, rows = None, []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits[0, 0])
        assert (torch.stack(rows).exp() - whole.exp()).abs().max() < 1e-4
        foreign = base(input_ids=ids[:, :5], use_cache=True).past_key_values
        with pytest.raises(UserError, match="zone_ids"):
            model(input_ids=ids[:, 5:6], past_key_values=foreign)
        foreign = base(input_ids=ids[:, :5], use_cache=True).past_key_values
        told = model(input_ids=ids[:, 5:6], past_key_values=foreign, zone_ids=ids[:, :6]).logits[0, 0]
        assert (told.exp() - whole[5].exp()).abs().max() < 1e-4


def test_embeddings_are_read_as_the_tokens_that_they_are() -> None:
    model = zoned()
    ids = torch.tensor([adapter().cached(private()[0]).ids])
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.allclose(model(inputs_embeds=embeds).logits[0], alone(model, private()[0]), atol=1e-5)
        soft = torch.cat([torch.randn(1, 3, embeds.shape[2]), embeds], dim=1)
        assert model(inputs_embeds=soft).logits.isfinite().all()


def test_labels_give_the_mean_loss_and_gradients_reach_the_base() -> None:
    model = copy.deepcopy(zoned())
    ids = torch.tensor([adapter().cached(private()[0]).ids])
    labels = ids.clone()
    labels[:, :4] = -100
    out = model(input_ids=ids, labels=labels)
    own = -alone(model, private()[0])[3:-1].gather(1, ids[0, 4:, None]).mean()
    assert out.loss.item() == pytest.approx(own.item(), rel=1e-4)
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)


def test_only_the_kept_logits_are_computed() -> None:
    ids = torch.tensor([adapter().cached(private()[0]).ids])
    with torch.no_grad():
        last = zoned()(input_ids=ids, logits_to_keep=2).logits[0]
    assert last.shape[0] == 2 and torch.allclose(last, alone(zoned(), private()[0])[-2:], atol=1e-5)


# -- the adapter's seam ------------------------------------------------------------------------------------------------


def test_the_seam_takes_whole_logits_whoever_bound_the_adapter() -> None:
    model = zoned()
    plain = TextAdapter(tokenizer=adapter().tokenizer, context=adapter().context)
    assert not plain.whole_logits
    found = mean_losses(model, plain, private()[:4])
    slow = []
    for s in private()[:4]:
        coded = adapter().cached(s)
        picked = alone(model, s)[coded.first - 1 : -1].gather(1, torch.tensor(coded.ids[coded.first :])[:, None])
        slow.append(-picked.mean().item())
    assert found == pytest.approx(slow, abs=1e-4)
    assert len(plain.blocks(model)) == world()[0].model.config.num_hidden_layers


# -- access ------------------------------------------------------------------------------------------------------------


def test_access_is_per_subject() -> None:
    crowd = private()
    first, *_ = subjects(crowd)
    model = zoned().allow([first])
    for s in crowd:
        same = torch.equal(alone(model, s), alone(world()[0].model, s).log_softmax(-1))
        assert same == (s.subject != first)
    with pytest.raises(UserError, match="unknown subject"):
        model.allow(["Nobody"])
    assert not torch.equal(alone(model.allow(None), crowd[-1]), alone(world()[0].model, crowd[-1]).log_softmax(-1))


def test_the_subject_field_opens_a_block_that_the_text_does_not_name() -> None:
    model = zoned()
    s = private()[0]
    question = Sample(id="q", subject=s.subject, prompt=s.prompt.replace(s.names[0], "this person"), target=s.target)
    closed = collect(model, adapter(), [question])[0].prob
    with model.about([s.subject]):
        opened = collect(model, adapter(), [question])[0].prob
    assert opened > closed + 0.1
    assert collect(model, adapter(), [question])[0].prob == pytest.approx(closed)
    with model.about([s.subject, None]), pytest.raises(UserError, match="2 subjects were given for 3 sequences"):
        model(input_ids=torch.ones(3, 4, dtype=torch.long))


# -- files -------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same_model(tmp_path: Path) -> None:
    model = zoned()
    folder = save_model(Loaded(model, adapter(), ""), tmp_path / "model")
    again = load_model(folder, device="cpu")
    assert isinstance(again.model, ZonedModel)
    assert again.model.zone.digest() == model.zone.digest()
    for s in (private()[3], probes(private())[7], world()[1]["utility"][3]):
        assert torch.equal(alone(again.model, s), alone(model, s))
    assert isinstance(ZonedModel.from_pretrained(folder, device="cpu"), ZonedModel)
    first, second = tmp_path / "model", save_model(again, tmp_path / "second" / "model")
    for name in ("zone.json", "zone.safetensors", "zone-blocks.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_folder_is_an_ordinary_model_to_others(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_model(Loaded(zoned(), adapter(), ""), tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert digest_weights(plain) == digest_weights(world()[0].model)


def test_after_removal_the_model_is_the_base_for_that_subject_and_knows_the_others() -> None:
    crowd = private()
    model, base = zoned(), world()[0].model
    before = {s.id: s.prob for s in collect(model, adapter(), crowd)}
    gone = crowd[0].subject
    model.zone.remove(subject=gone)
    after = {s.id: s.prob for s in collect(model, adapter(), crowd)}
    for s in crowd:
        if s.subject == gone:
            assert torch.equal(alone(model, s), alone(base, s).log_softmax(-1))
        else:  # a block may open a token earlier or later, for one rival is gone
            assert after[s.id] == pytest.approx(before[s.id], abs=0.02)


def test_a_changed_base_is_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(zoned())
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(UserError, match="has been changed since the zone was built"):
        save_model(Loaded(model, adapter(), ""), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    folder = save_model(Loaded(zoned(), adapter(), ""), tmp_path / "kept" / "model")
    model.base.save_pretrained(folder)
    with pytest.raises(UserError, match="not the one that its zone was built on"):
        load_model(folder)


def test_what_a_zone_is_not_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a base with a zone"):
        ZonedModel(world()[0].model)
    folder = save_model(Loaded(zoned(), adapter(), ""), tmp_path / "model")
    with pytest.raises(UserError, match="leave --lora out"):
        load_model(folder, lora=LoraOptions(r=2))
    plain = save_model(world()[0], tmp_path / "plain")
    with pytest.raises(UserError, match="holds no zone"):
        ZonedModel.from_pretrained(plain)
    assert zone_of(private()[:2]).digest()
