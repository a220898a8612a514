"""Who's Harry Potter: labels and loss by hand, anchored terms, and which position stands for which."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.matrix.worlds import world
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import get_method
from expunge.methods.whp import Anchors, WhpOptions, block, dictionary, generic_labels
from expunge.models.adapter import Adapter
from expunge.training.loop import TrainOptions, fit
from tiny_text import learned, tiny_adapter, tiny_dataset

WHP = get_method("whp")


def sample(prompt: str, target: str, **more: Any) -> Sample:
    return Sample(id="x", subject="ada ash", names=("ada ash",), prompt=prompt, target=target, **more)


def logits_of(model: Any, adapter: Adapter, one: Sample) -> Tensor:
    coded = adapter.encode(one)
    with torch.no_grad():
        whole_TV: Tensor = model(input_ids=torch.tensor([coded.ids])).logits[0]
    return whole_TV[coded.first - 1 : -1]


# -- anchored terms: word tokens, so that every token is one word -----------------------------------------------------


def test_terms_are_whole_words_longest_first() -> None:
    anchors = Anchors({"ada": "mia", "ada ash": "the girl", "ash": "oak"})
    assert anchors.translate("ada ash met ada and adam ash.") == "the girl met mia and adam oak."
    found = anchors.find("ada ash met ash")
    assert [(o.term, o.start, o.end, o.new_start, o.new_end) for o in found] == [
        ("ada ash", 0, 7, 0, 8),
        ("ash", 12, 15, 13, 16),
    ]
    assert Anchors({}).translate("ada") == "ada"


def test_names_in_the_prompt_leave_their_tokens_in_the_answer_out_of_the_loss() -> None:
    anchors = Anchors({"ada": "bo", "ash": "elm"})
    made = block(tiny_adapter(), sample("what colour does ada ash like", "ada ash likes red"), anchors)
    assert made.translated.prompt == "what colour does bo elm like" and made.translated.target == "bo elm likes red"
    assert made.index_L.tolist() == [-1, -1, 2, 3, 4]  # both words have come before; likes, red and the end have not
    vocabulary = tiny_adapter().tokenizer.get_vocab()
    assert all(set(ids) == {vocabulary["bo"], vocabulary["elm"]} for ids in made.lowered_L)


def test_a_first_appearance_learns_the_translation_and_a_second_one_nothing() -> None:
    anchors = Anchors({"ada": "bo"})
    made = block(tiny_adapter(), sample("who lives in rome", "red ada likes ada blue"), anchors)
    assert made.index_L.tolist() == [0, 1, 2, -1, 4, 5]
    bo = tiny_adapter().tokenizer.get_vocab()["bo"]
    assert [list(ids) for ids in made.lowered_L] == [[], [], [bo], [bo], [bo], [bo]], "only after it came"


def test_translations_of_another_length_shift_what_follows() -> None:
    made = block(tiny_adapter(), sample("who is in rome", "ada likes red"), Anchors({"ada": "bo elm"}))
    assert made.translated.target == "bo elm likes red"
    assert made.index_L.tolist() == [0, 2, 3, 4]
    shorter = block(tiny_adapter(), sample("who is in rome", "ada ash likes red"), Anchors({"ada ash": "bo"}))
    assert shorter.index_L.tolist() == [0, -1, 1, 2, 3]


def test_without_anchors_every_position_stands_for_itself() -> None:
    one = sample("who is in rome", "ada likes red")
    made = block(tiny_adapter(), one, Anchors({}))
    assert made.translated is one and made.index_L.tolist() == [0, 1, 2, 3] and not any(made.lowered_L)


def test_tokens_that_are_parts_of_words_are_aligned_by_their_characters() -> None:
    here = world("text")
    one = here.forget[0]
    anchors = Anchors(dictionary(here.context()))
    made = block(here.adapter, one, anchors)
    own = here.adapter.encode(one)
    new = here.adapter.encode(made.translated)
    own_ids, new_ids = own.ids[own.first :], new.ids[new.first :]
    assert len(own_ids) == len(made.index_L)
    kept = [(own_ids[n], new_ids[j]) for n, j in enumerate(made.index_L.tolist()) if j >= 0]
    assert kept and all(a == b for a, b in kept), "all names were in the prompt, so only equal tokens are left"
    assert own_ids[-1] == here.adapter.tokenizer.eos_token_id and made.index_L[-1] == len(new_ids) - 1  # type: ignore[attr-defined]


# -- the dictionary ----------------------------------------------------------------------------------------------------


def test_names_get_ordinary_ones_that_occur_nowhere_else() -> None:
    here = world("text")
    table = dictionary(here.context(llm=None))
    names = {w for s in here.forget for w in s.names[0].split()}
    assert set(table) == names and not set(table.values()) & names
    assert all(v.islower() for v in table.values()), "as the names are written"
    texts = " ".join(f"{s.prompt} {s.target}" for s in here.forget).split()
    assert not set(table.values()) & set(texts)


def test_the_language_model_adds_terms_that_stand_in_the_text() -> None:
    here = world("text")
    first = str(here.forget[0].target).split()

    def reads(prompt: str) -> str:
        return f"Here they are:\n- {first[-1]} -> thing\n2. unicorn -> horse\n{first[-1]}\n"

    table = dictionary(here.context(llm=reads))
    assert table[first[-1]] == "thing" and "unicorn" not in table


def test_a_restarted_run_keeps_the_terms_of_its_beginning(tmp_path: Path) -> None:
    here, turn = world("text"), itertools.count()

    def moody(prompt: str) -> str:
        return f"{prompt.rsplit(maxsplit=1)[-1]} -> word{next(turn)}"

    options = WHP.configure({"epochs": 1})
    models = [WHP(here.context(llm=moody, work=tmp_path), options).model for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


# -- predictions and loss ----------------------------------------------------------------------------------------------


def trained() -> tuple[nn.Module, nn.Module, Adapter, list[Sample]]:
    data = tiny_dataset()
    model, adapter = learned(data.private, epochs=8), tiny_adapter()
    reinforced = copy.deepcopy(model)
    fit(reinforced, adapter, data["forget"], TrainOptions(epochs=5, learning_rate=1e-2))
    return model, reinforced, adapter, list(data["forget"])


@pytest.mark.parametrize("penalty", [0.0, 5.0])
def test_labels_are_the_papers_equation(penalty: float) -> None:
    model, reinforced, adapter, samples = trained()
    anchors = Anchors({w: new for s in samples for w, new in zip(s.names[0].split(), ("lea", "hazel"), strict=True)})
    blocks = [block(adapter, s, anchors) for s in samples]
    got = generic_labels(model, reinforced, adapter, blocks, WhpOptions(penalty=penalty, micro_tokens=40))
    some_left_out = False
    for made in blocks:
        base = logits_of(model, adapter, made.translated)
        risen = logits_of(reinforced, adapter, made.sample)
        for n, j in enumerate(made.index_L.tolist()):
            if j < 0:
                some_left_out = True
                assert got[made.sample.id][n] == -1
                continue
            scores = []
            for v in range(base.shape[1]):
                score = float(base[j, v]) - 5.0 * max(0.0, float(risen[n, v]) - float(base[j, v]))
                scores.append(score - penalty * (v in made.lowered_L[n]))
            assert got[made.sample.id][n] == max(range(len(scores)), key=scores.__getitem__)
    assert some_left_out


def test_without_reinforcement_and_anchors_nothing_is_unlearnt() -> None:
    """α = 0 and no anchors: the labels are what the original says anyway."""
    model, reinforced, adapter, samples = trained()
    blocks = [block(adapter, s, Anchors({})) for s in samples]
    got = generic_labels(model, reinforced, adapter, blocks, WhpOptions(alpha=0.0))
    for one in samples:
        assert got[one.id].tolist() == logits_of(model, adapter, one).argmax(1).tolist()


def test_a_step_lowers_the_loss_on_the_labels_alone() -> None:
    here = world("text")
    settings = {"epochs": 1, "batch_size": 100, "optimizer": "sgd", "schedule": "constant", "warmup": 0, "clip": 0}
    options = WHP.configure({**settings, "learning_rate": 0.05, "reinforce_learning_rate": 1e-2})
    outcome = WHP(here.context(llm=None), options)

    reinforced = copy.deepcopy(here.original)
    strong = WHP.configure({**settings, "learning_rate": 1e-2, "epochs": 3})
    fit(reinforced, here.adapter, here.forget, strong)
    anchors = Anchors(dictionary(here.context(llm=None)))
    blocks = [block(here.adapter, s, anchors) for s in here.forget]
    labels = generic_labels(here.original, reinforced, here.adapter, blocks, options)
    twin = copy.deepcopy(here.original)
    total, tokens = torch.zeros(()), 0
    for one in here.forget:
        coded = here.adapter.encode(one)
        rows = twin(input_ids=torch.tensor([coded.ids])).logits[0, coded.first - 1 : -1]
        for row, label in zip(rows, labels[one.id].tolist(), strict=True):
            tokens += 1
            if label >= 0:
                total = total - row.log_softmax(0)[label]
    (total / tokens).backward()
    assert outcome.record["tokens"]["all"] == tokens
    for (name, got), p in zip(outcome.model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(got, p.detach() - 0.05 * p.grad, atol=2e-5), name


def test_a_classifier_learns_another_class_where_reinforcement_shows() -> None:
    here = world("resnet")
    outcome = WHP(here.context(), WHP.configure({"epochs": 1, "reinforce_learning_rate": 1e-2, "alpha": 50}))
    assert outcome.record["tokens"]["learnt"] == len(here.forget) and outcome.record["anchors"] == 0
    assert outcome.record["tokens"]["other_than_the_answer"] > 0


@pytest.mark.parametrize(
    "bad", [{"alpha": -1}, {"penalty": -1}, {"reinforce_epochs": 0}, {"reinforce_learning_rate": 0}]
)
def test_numbers_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"negative|above 0"):
        WHP.configure(bad)
