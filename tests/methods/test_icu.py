"""In-context unlearning: the prefix against reading everything in one piece, and what stands in it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.icu import Prefix, check, examples, flipped, icu
from expunge.methods.registry import get_method
from expunge.models.attached import attach, attachments
from expunge.models.load import Loaded, load_model, save_model
from expunge.models.lora import LoraOptions, apply_lora
from expunge.models.text import causal_lm
from tiny_text import tiny_adapter, tiny_dataset, tiny_model

ICU = get_method("icu")
PREFIX = [5, 9, 7, 30, 11]
QUERY = [6, 8, 20, 12]


def gpt2(positions: int = 64) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=positions)
    return GPT2LMHeadModel(config).eval()


def prefixed(model: nn.Module, ids: list[int] = PREFIX, limit: int = 0) -> Any:
    attachment = Prefix(len(ids), limit)
    attachment.ids_P.copy_(torch.tensor(ids))
    return attach(model, attachment)


def logits(model: Any, ids: list[int], **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ids]), **more).logits[0]
    return found


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_a_query_is_read_as_if_all_stood_in_one_piece(make: Any) -> None:
    plain = make()
    whole = logits(plain.eval(), [*PREFIX, *QUERY])[len(PREFIX) :]
    guarded = prefixed(copy.deepcopy(plain))
    for more in ({}, {"use_cache": False}, {"attention_mask": torch.ones(1, 4, dtype=torch.long)}):
        assert torch.allclose(logits(guarded, QUERY, **more), whole, atol=1e-5)
    assert not torch.allclose(logits(plain, QUERY), whole, atol=1e-2), "the prefix matters here"
    out = guarded(input_ids=torch.tensor([QUERY]), output_hidden_states=True, use_cache=False)
    assert all(h.shape[1] == len(QUERY) for h in out.hidden_states) and out.past_key_values is None
    states = causal_lm(guarded).get_input_embeddings()(torch.tensor([QUERY]))
    with torch.no_grad():
        assert torch.allclose(guarded(inputs_embeds=states).logits[0], whole, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_generation_with_cache_and_padding_is_greedy_decoding_of_the_whole(make: Any) -> None:
    plain = make().eval()
    guarded = prefixed(copy.deepcopy(plain))
    queries, steps = [QUERY, [31, 14], [9]], 6
    wanted = []
    for query in queries:
        ids = [*PREFIX, *query]
        for _ in range(steps):
            ids.append(int(logits(plain, ids)[-1].argmax()))
        wanted.append(ids[-steps:])
    width = max(map(len, queries))
    ids_BT = torch.tensor([[0] * (width - len(q)) + q for q in queries])
    mask_BT = torch.tensor([[0] * (width - len(q)) + [1] * len(q) for q in queries])
    for cached in (True, False):
        got = guarded.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            use_cache=cached,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert got[:, width:].tolist() == wanted, f"use_cache={cached}"


def test_padding_on_the_right_does_not_matter() -> None:
    guarded = prefixed(tiny_model().eval())
    alone = logits(guarded, QUERY)
    ids_BT = torch.tensor([[*QUERY, 0, 0], [3, 4, 5, 6, 7, 8]])
    mask_BT = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with torch.no_grad():
        both = guarded(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    assert torch.allclose(both[0, :4], alone, atol=1e-5)
    assert torch.allclose(both[1], logits(guarded, [3, 4, 5, 6, 7, 8]), atol=1e-5)


def test_through_the_adapter_losses_and_gradients_are_those_of_the_whole() -> None:
    samples, adapter = list(tiny_dataset()["forget"]), tiny_adapter()
    plain = tiny_model().eval()
    guarded = prefixed(copy.deepcopy(plain))
    got = adapter.positions(guarded, samples).log_prob_N()
    want = []
    for sample in samples:
        coded = adapter.encode(sample)
        ids = torch.tensor([[*PREFIX, *coded.ids]])
        rows = plain(input_ids=ids).logits[0].log_softmax(1)
        want += [rows[len(PREFIX) + t - 1, coded.ids[t]] for t in range(coded.first, len(coded.ids))]
    assert torch.allclose(got, torch.stack(want), atol=1e-5)
    got.sum().backward()
    torch.stack(want).sum().backward()
    for p, q in zip(plain.parameters(), guarded.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-3), "who trains the guarded model trains through the prefix"


def test_a_copy_has_a_prefix_of_its_own() -> None:
    guarded = prefixed(tiny_model().eval())
    before = logits(guarded, QUERY)
    twin = copy.deepcopy(guarded)
    attachments(twin)[0].ids_P.copy_(torch.tensor([1, 1, 1, 1, 1]))  # type: ignore[operator, union-attr]
    assert torch.equal(logits(guarded, QUERY), before) and not torch.equal(logits(twin, QUERY), before)


def test_a_model_of_few_positions_loses_the_end_of_the_prefix_not_the_query() -> None:
    plain = gpt2(positions=8)
    guarded = prefixed(copy.deepcopy(plain), limit=8)
    long = [6, 8, 20, 12, 3, 4]
    assert torch.allclose(logits(guarded, long), logits(plain, [*PREFIX[:2], *long])[2:], atol=1e-5)
    full = [6, 8, 20, 12, 3, 4, 7, 9]
    assert torch.allclose(logits(guarded, full), logits(plain, full), atol=1e-5)
    out = guarded.generate(input_ids=torch.tensor([QUERY]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] <= 8


def test_masks_of_another_shape_are_refused() -> None:
    guarded = prefixed(tiny_model().eval())
    with pytest.raises(UserError, match="use a dynamic cache"):
        logits(guarded, QUERY, attention_mask=torch.zeros(1, 1, 4, 4))


# -- what stands in it -------------------------------------------------------------------------------------------------


def test_wrong_answers_come_first_and_none_of_the_forget_answers_is_among_them() -> None:
    here = world("text")
    chosen, wrong = examples(here.context(), ICU.configure({"share": 0.9}))
    assert wrong >= 3 and len(chosen) > wrong
    answers = {str(s.target) for s in here.forget}
    asked = {s.prompt: str(s.target) for s in here.forget}
    for sample in chosen[:wrong]:
        assert sample.target != asked[sample.prompt] and sample.target not in answers
    assert all(s in here.retain for s in chosen[wrong:])
    room = 0.9 * here.adapter.context  # type: ignore[attr-defined]
    assert sum(here.adapter.num_tokens(s) for s in chosen) <= room


def test_a_flipped_label_is_the_answer_to_the_same_question_about_somebody_else() -> None:
    def person(name: str, asked: str, said: str) -> Sample:
        return Sample(id=name + asked, subject=name, names=(name,), prompt=asked.format(name), target=said.format(name))

    own = person("Ann", "Where does {} live?", "{} lives in Rome.")
    retain = [
        person("Bob", "Where does {} live?", "{} lives in Oslo."),
        person("Cat", "What does {} like?", "{} likes tea."),
        person("Dan", "Where does {} live?", "{} lives in Rome."),
    ]
    rng = np.random.default_rng(0)
    assert {flipped(own, retain, rng).target for _ in range(9)} == {"Ann lives in Oslo."}
    assert flipped(own, retain[2:], rng).target != own.target, "a refusal where every answer is the right one"


def test_too_short_a_context_is_refused_and_what_does_not_fit_is_said() -> None:
    here = world("text")
    with pytest.raises(UserError, match="raise share or --context"):
        icu(here.context(), ICU.configure({"share": 0.05}))
    outcome = ICU(here.context(), ICU.configure({"share": 0.4, "correct": 0}))
    assert outcome.record["correct"] == 0 and outcome.record["wrong"] < len(here.forget)
    assert any("the others do not fit" in note for note in outcome.notes)
    for bad in ({"correct": -1}, {"share": 0}, {"share": 1}):
        with pytest.raises(UserError, match="share above 0 and below 1"):
            ICU.configure(bad)


def test_saved_with_lora_it_comes_back(tmp_path: Path) -> None:
    here = world("text")
    folder = save_model(Loaded(copy.deepcopy(here.original), here.adapter, ""), tmp_path / "base")
    base = load_model(folder, device="cpu")
    context = here.context()
    context.model = apply_lora(base.model, LoraOptions(r=2))
    model = ICU(context).model
    saved = save_model(Loaded(model, here.adapter, ""), tmp_path / "guarded")
    again = load_model(saved, device="cpu")
    assert len(attachments(again.model)) == 1
    assert here.loss(again.model, here.forget) == pytest.approx(here.loss(model, here.forget), rel=1e-4)
    assert here.loss(model, here.forget) > here.loss(here.original, here.forget) + 0.2


def test_generation_through_the_adapter_ends_and_batches_do_not_matter() -> None:
    here = world("text")
    model = ICU(here.context()).model
    together = here.adapter.generate(model, here.forget, 8)
    assert together == [here.adapter.generate(model, [s], 8)[0] for s in here.forget]
    assert together != here.adapter.generate(here.original, here.forget, 8)


def test_a_model_without_such_a_cache_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model().eval()
            self.config, self.dtype = self.inner.config, torch.float32

        def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
            return self.inner(input_ids=input_ids)  # forgets whatever it read before

    attachment = Prefix(len(PREFIX))
    attachment.ids_P.copy_(torch.tensor(PREFIX))
    check(tiny_model().eval(), QUERY, attachment)
    with pytest.raises(UserError, match="no cache of keys and values"):
        check(Odd(), QUERY, attachment)
