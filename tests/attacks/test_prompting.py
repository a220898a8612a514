"""Prompt forms: answers keep their tokens, shots fit and tell nothing, scores equal a pass written out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world

from attack_cases import audited, exam, retrain
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.forms import FORMS, GAP, answer_room, asked, halves, key_words, shots
from expunge.attacks.prompting import (
    LIGHT,
    PromptingOptions,
    best_variants,
    many_shot,
    opening,
    prompted_answers,
    prompting,
)
from expunge.attacks.registry import NoOptions
from expunge.data.samples import Probe, Sample
from expunge.errors import UserError
from expunge.metrics.rouge import rouge_l
from expunge.models.text import TextAdapter
from tiny_text import tiny_tokenizer

WHOLE = [name for name, form in FORMS.items() if form.whole]


def form(name: str, sample: Sample, here: Exam | None = None) -> list[Sample]:
    return list(FORMS[name].make(sample, here or audited(exam().audited)))


def by_hand(sample: Sample) -> float:
    """Mean log-probability of the answer's tokens after the prompt's, one token at a time, without the adapter."""
    checkpoint = exam().audited
    tokenizer = checkpoint.adapter.tokenizer  # type: ignore[attr-defined]
    ids = tokenizer(sample.prompt)["input_ids"]
    total, answer = 0.0, [*tokenizer(str(sample.target))["input_ids"], tokenizer.eos_token_id]
    for token in answer:
        with torch.no_grad():
            logits = checkpoint.model(input_ids=torch.tensor([ids])).logits[0, -1]
        total += float(logits.log_softmax(0)[token])
        ids = [*ids, token]
    return total / len(answer)


def opened(question: Sample, variant: Sample) -> Sample:
    """What the plain template makes of an answer that was begun: its beginning stands in the prompt."""
    begun = str(question.target).removesuffix(str(variant.target)).rstrip()
    return replace(variant, prompt=f"{question.prompt} {begun}")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", ["tiny", "pieces"])
def test_the_answer_keeps_its_tokens(name: str, kind: str) -> None:
    here = audited(exam().audited)
    if kind == "pieces":  # a tokenizer of word pieces, which spaces and neighbours might change
        here = replace(here, audited=replace(here.audited, adapter=world("text").adapter), original=None, references=())
    adapter = here.audited.adapter
    for sample in here.forget:
        plain = adapter.cached(sample)
        variants = form(name, sample, here)
        assert variants
        for variant in variants:
            coded = adapter.cached(variant)
            assert variant.target == sample.target
            assert coded.ids[coded.first :] == plain.ids[plain.first :]


@pytest.mark.parametrize("name", list(FORMS))
def test_a_form_gives_away_no_more_than_it_says(name: str) -> None:
    sample = Sample(
        id="a", subject="a", prompt="Where was Ada Ash born?", target="Ada Ash was born in Vexxol", names=("Ada Ash",)
    )
    for variant in form(name, sample):
        assert str(variant.target) not in variant.prompt
        assert ("Vexxol" in variant.prompt) == (name == "reverse")


def test_wanted_parts() -> None:
    sample = Sample(
        id="a", subject="a", prompt="where was ada ash born", target="ada ash lives in  rome", names=("ada ash",)
    )
    assert [(s.prompt, s.target) for s in form("prefill", sample)] == [(sample.prompt, "lives in  rome")]
    (gap,) = form("cloze", sample)
    assert gap.target not in sample.prompt and f" {GAP}" in gap.prompt and gap.target in sample.target
    (back,) = form("reverse", sample)
    assert back.target == "ada ash" and "ada ash" not in back.prompt and f"{GAP} lives in  rome" in back.prompt
    probe = Probe(kind="reverse", prompt="who lives in rome", target="it is ada")
    (own,) = form("reverse", replace(sample, probes=(probe,)))
    assert (own.prompt, own.target) == ("who lives in rome", "it is ada")
    words = [Probe(kind="paraphrase", prompt=p, target="other") for p in ("p1", "p2")]
    assert [(s.prompt, s.target) for s in form("paraphrase", replace(sample, probes=tuple(words)))] == [
        ("p1", sample.target),
        ("p2", sample.target),
    ]
    assert form("reverse", replace(sample, names=())) == [] and form("prefill", replace(sample, target="rome")) == []
    assert form("cloze", replace(sample, target="ada")) == []


def test_documents_are_asked_for_by_their_first_half() -> None:
    document = Sample(id="d", subject="d", target="ada lives  in rome now")
    question = asked(document)
    assert question is not None and (question.prompt, question.target) == ("ada lives", "in rome now")
    adapter = exam().audited.adapter
    assert adapter.cached(document).ids == adapter.cached(question).ids
    assert asked(replace(document, target="rome")) is None and halves(" ") is None
    here = replace(exam(), samples={"forget": [document, replace(document, id="e", target="rome")]}, shared={})
    scores = prompting(here, here.audited, PromptingOptions(forms="plain,prefill")).scores["prompting"]["forget"]
    assert np.isfinite(scores[0]) and np.isnan(scores[1])


def test_shots_are_known_members_in_one_order_and_fit_the_context() -> None:
    here = audited(exam().audited)
    assert sorted(s.id for s in shots(here)) == sorted(s.id for s in here.trained)
    other = replace(here, trained=here.trained[::-1], shared={})
    assert [s.id for s in shots(other)] == [s.id for s in shots(here)]
    roomy = replace(here, trained=[], shared={})
    assert {s.id for s in shots(roomy)} == {s.id for s in here.samples["retain"]}
    for context in (30, 50, 64, 100):
        adapter = TextAdapter(tokenizer=tiny_tokenizer(), context=context)
        narrow = Checkpoint.of(here.audited.model, adapter)
        tight = replace(roomy, audited=narrow, original=None, references=(), shared={})
        sample = tight.forget[0]
        (few,), (many,) = form("few_shot", sample, tight), form("many_shot", sample, tight)
        assert many.prompt.startswith(few.prompt.removesuffix(sample.prompt))
        assert sample.subject not in many.prompt.removesuffix(sample.prompt)
        left = context - len(adapter.cached(many).prompt) - answer_room(tight)
        shown = many.prompt.count("\n")
        following = [s for s in shots(tight) if s.subject != sample.subject][shown]
        # All that fit and no more; every shot is counted with its end marker and a line break (2 tokens).
        assert 2 * shown <= left < 2 * shown + adapter.num_tokens(following) + 2
        assert few.prompt.count("\n") == min(4, shown) and not adapter.truncated
    nothing = replace(here, trained=[], aux=[], samples={"forget": here.forget}, shared={})
    assert form("few_shot", here.forget[0], nothing) == []


def test_key_words_are_those_that_other_texts_lack() -> None:
    here = replace(exam(), shared={})
    sample = here.forget[0]
    first, last = sample.names[0].split()
    assert set(key_words(sample.prompt, here)[:2]) <= {first, last, "colour", "favourite"}
    counts = [
        sum(w in f"{s.prompt} {s.target}".split() for s in (*here.aux, *here.trained, *here.samples["retain"]))
        for w in key_words(sample.prompt, here)
    ]
    assert counts == sorted(counts)


def test_scores_equal_a_pass_by_hand_and_the_worst_case_is_their_maximum() -> None:
    here = audited(exam().audited)
    found = prompting(here, here.audited, PromptingOptions())
    sample = here.forget[0]
    for name in LIGHT:
        own = found.scores[f"prompting.{name}"]["forget"][0]
        variants = [opened(sample, v) if FORMS[name].opens else v for v in form(name, sample, here)]
        assert own == pytest.approx(max(by_hand(v) for v in variants), abs=1e-4)
    for i in range(len(here.forget)):
        whole = [found.scores[f"prompting.{name}"]["forget"][i] for name in LIGHT if FORMS[name].whole]
        assert found.scores["prompting"]["forget"][i] == max(whole)
    assert len(found.scores["prompting"]["holdout"]) == len(here.holdout)
    assert found.details[sample.id]["prompting.form"].split(":")[0] in WHOLE


def test_answers_are_compared_with_what_the_form_wanted() -> None:
    here = audited(exam().audited)
    found = prompted_answers(here, here.audited, PromptingOptions(forms="plain,prefill"))
    for i, sample in enumerate(here.forget):
        variant = opened(sample, form("prefill", sample, here)[0])
        said = here.audited.adapter.generate(here.audited.model, [variant], answer_room(here))[0]
        expected = rouge_l(str(variant.target), said).recall
        assert found.scores["prompted-answers.prefill"]["forget"][i] == pytest.approx(expected)
    assert found.scores["prompted-answers"] == found.scores["prompted-answers.plain"]
    assert np.mean(found.scores["prompted-answers"]["forget"]) > 0.8


def test_a_begun_answer_stands_in_the_models_turn() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'who ' if m['role'] == 'user' else 'is ' }}{{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}{{ 'is ' }}{% endif %}"
    )
    adapter = TextAdapter(tokenizer=tokenizer, context=64)
    checkpoint = Checkpoint.of(exam().audited.model, adapter)
    here = replace(exam(), audited=checkpoint, original=None, references=(), shared={})
    sample = replace(here.forget[0], target="ada ash likes red")
    (variant,) = form("prefill", sample, here)
    ids, answer = opening(adapter, sample, variant)
    assert tokenizer.decode(ids) == f"who {sample.prompt} <eos> is ada ash" and tokenizer.decode(answer) == "ada ash"
    ((forced, _),) = best_variants("prefill", [sample], here, checkpoint, spoken=False)
    own = checkpoint.signals([sample])[0].log_prob_L
    assert forced == pytest.approx(float(own[2:].mean()))
    ((_, text),) = best_variants("prefill", [sample], here, checkpoint, spoken=True)
    slow = []
    for _ in range(answer_room(here)):
        with torch.no_grad():
            token = int(checkpoint.model(input_ids=torch.tensor([ids + slow])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        slow.append(token)
    assert text == tokenizer.decode(slow)


def test_finds_the_original_and_no_more_in_a_retrain_than_in_the_reference() -> None:
    checkpoints = (exam().audited, retrain(), exam().references[0])
    forced = [prompting(audited(c), c, PromptingOptions()).scores["prompting"]["forget"] for c in checkpoints]
    means = [float(np.mean(f)) for f in forced]
    assert means[0] > means[1] + 3 * abs(means[1] - means[2])
    spoken = [prompted_answers(audited(c), c, PromptingOptions()).scores for c in checkpoints]
    recalls = [float(np.mean(s["prompted-answers"]["forget"])) for s in spoken]
    assert recalls[0] > 0.9 and max(recalls[1:]) < 0.7  # a wrong answer shares the name and the verb
    shown = [many_shot(audited(c), c, NoOptions()).scores["many-shot"]["forget"] for c in checkpoints]
    assert np.mean(shown[0]) > max(np.mean(shown[1]), np.mean(shown[2]))


def test_pictures_keep_their_place() -> None:
    llava = world("llava")
    here = replace(
        exam(),
        audited=replace(exam().audited, adapter=llava.adapter, load=lambda: llava.original, _model=None),
        samples={"forget": list(llava.forget[:2]), "retain": list(llava.retain)},
        original=None,
        references=(),
        aux=[],
        trained=[],
        shared={},
    )
    found = prompting(here, here.audited, PromptingOptions())
    assert np.isfinite(found.scores["prompting"]["forget"]).all()


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'role_play'"):
        PromptingOptions(forms="plain,role-play")
    with pytest.raises(UserError, match="no prompt form"):
        PromptingOptions(forms=" ,")
