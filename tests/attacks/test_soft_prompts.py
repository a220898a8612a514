"""Soft prompts: virtual tokens equal real ones, only the prefix is trained, and never on a measured answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from tests.attacks.hiding import hiding
from tests.matrix.worlds import world

from attack_cases import audited, exam, retrain
from expunge.attacks.exam import Checkpoint
from expunge.attacks.registry import Finding, get_attack
from expunge.attacks.soft_prompts import (
    SoftPromptOptions,
    gradient,
    lessons,
    log_probs,
    own_prefixes,
    shared_prefix,
    shortened,
    soft_positions,
    soft_prompts,
    start,
    unsupported,
)
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Batch
from expunge.models.text import TextAdapter
from tiny_text import tiny_tokenizer

SHORT = SoftPromptOptions(tokens=4, steps=20, restarts=2, batch_size=8)


def text_adapter() -> TextAdapter:
    adapter = exam().audited.adapter
    assert isinstance(adapter, TextAdapter)
    return adapter


def attacked(checkpoint: Checkpoint, options: SoftPromptOptions = SHORT) -> Finding:
    return soft_prompts(audited(checkpoint), checkpoint, options)


def mean(finding: Finding, name: str = "soft-prompts") -> float:
    return float(np.mean(finding.scores[name]["forget"]))


@dataclass
class Watching(TextAdapter):
    """Remembers the samples that went through with gradients on."""

    trained: set[tuple[str, str]] = field(default_factory=set)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        if torch.is_grad_enabled():
            self.trained |= {(s.prompt, str(s.target)) for s in samples}
        return super().collate(samples)


@pytest.mark.parametrize("kind", ["without bos", "with bos"])
def test_embeddings_of_real_tokens_equal_the_tokens_themselves(kind: str) -> None:
    if kind == "with bos":
        model, adapter, samples = world("text").original, world("text").adapter, list(world("text").forget)
    else:
        model, adapter, samples = exam().audited.model, exam().audited.adapter, exam().forget
    assert isinstance(adapter, TextAdapter)
    model.eval()
    tokens = [7, 3, 11]
    prefix = model.get_input_embeddings()(torch.tensor([tokens])).detach()  # type: ignore[operator]
    found = log_probs(model, adapter, samples, prefix, 64)
    document = replace(samples[0], prompt="")
    for sample, value in zip(
        [*samples, document], [*found, *log_probs(model, adapter, [document], prefix, 64)], strict=True
    ):
        coded = adapter.cached(sample)
        lead = int(kind == "with bos")
        assert (coded.ids[0] == adapter.tokenizer.bos_token_id) == bool(lead)
        ids = [*coded.ids[:lead], *tokens, *coded.ids[lead:]]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
        slow = [float(log_p[t + 2, coded.ids[t]]) for t in range(coded.first, len(coded.ids))]
        assert value == pytest.approx(np.mean(slow), abs=1e-4)


def test_gradient_equals_differences_and_micro_batches_add_up() -> None:
    model, samples = copy.deepcopy(exam().audited.model).double(), exam().samples["retain"][:5]
    prefix = start(model, exam(), SHORT, 0).double().requires_grad_()
    whole, parts = (gradient(model, text_adapter(), samples, prefix, n) for n in (4096, 20))
    assert torch.allclose(whole, parts, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())
    for place in ((0, 0, 0), (0, 3, 17)):
        values = []
        for step in (1e-3, -1e-3):
            moved = prefix.detach().clone()
            moved[place] += step
            values.append(-float(soft_positions(model, text_adapter(), samples, moved).log_prob_N().mean().detach()))
        assert float(whole[place]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2, abs=1e-4)


def test_training_equals_adam_on_the_picked_batches_and_the_best_restart_is_kept() -> None:
    checkpoint = exam().references[0]
    learn, _ = lessons(exam(), "answers")
    found, loss = shared_prefix(checkpoint.model, text_adapter(), learn, exam(), SHORT, 4096)
    ends = []
    for restart in range(2):
        prefix = start(checkpoint.model, exam(), SHORT, restart).requires_grad_()
        optimizer = torch.optim.Adam([prefix], lr=0.01)
        chance = exam().rng("soft-prompts", "batches", restart)
        for _ in range(SHORT.steps):
            picks = chance.choice(len(learn), size=8, replace=False)
            optimizer.zero_grad()
            positions = soft_positions(checkpoint.model, text_adapter(), [learn[i] for i in picks], prefix)
            (-positions.log_prob_N().mean()).backward(inputs=[prefix])
            optimizer.step()
        losses = log_probs(checkpoint.model, text_adapter(), learn, prefix.detach(), 4096)
        ends.append((-float(np.mean(losses)), prefix.detach()))
    best = min(ends, key=lambda end: end[0])
    assert loss == pytest.approx(best[0], abs=1e-4) and torch.allclose(found, best[1], atol=1e-4)
    before = log_probs(checkpoint.model, text_adapter(), learn, start(checkpoint.model, exam(), SHORT, 0), 4096)
    assert loss < -float(np.mean(before))


def test_never_trains_on_a_measured_answer() -> None:
    answers = {str(s.target) for s in (*exam().forget, *exam().holdout)}
    for learn in ("answers", "openers"):
        adapter = Watching(tokenizer=tiny_tokenizer(), context=64)
        checkpoint = Checkpoint.of(exam().audited.model, adapter)
        soft_prompts(audited(checkpoint), checkpoint, replace(SHORT, learn=learn))
        assert adapter.trained and not {target for _, target in adapter.trained} & answers
        if learn == "openers":
            assert {prompt for prompt, _ in adapter.trained} == {s.prompt for s in exam().forget}
        else:
            assert {t for _, t in adapter.trained} <= {
                str(s.target) for s in (*exam().trained, *exam().samples["retain"])
            }


def test_lessons_fall_back_and_say_so() -> None:
    here = replace(exam(), trained=[], samples={"forget": exam().forget}, shared={})
    assert lessons(here, "answers") == (lessons(here, "answers")[0], "trained on unseen texts")
    assert {s.id for s in lessons(here, "answers")[0]} == {s.id for s in here.aux}
    openers, words = lessons(replace(here, aux=[]), "answers")
    assert "affirmative" in words and [s.prompt for s in openers] == [s.prompt for s in here.forget]
    assert all(s.names[0] in str(o.target) for s, o in zip(here.forget, openers, strict=True))


def test_the_original_stands_out_from_an_exact_retrain() -> None:
    own, clean, reference = (attacked(c) for c in (exam().audited, retrain(), exam().references[0]))
    assert mean(own) > mean(clean) + 3 * abs(mean(clean) - mean(reference))
    assert len(own.scores["soft-prompts"]["holdout"]) == len(exam().holdout)
    gain = own.figures["soft-prompts.gain"]
    assert gain.value == pytest.approx(mean(own) + np.mean([s.loss for s in exam().audited.signals(exam().forget)]))
    assert "retained answers" in own.notes[0]


def test_what_is_only_hidden_comes_out() -> None:
    hidden, *clean = (attacked(c) for c in (hiding(), retrain(), exam().references[0]))
    gains = [f.figures["soft-prompts.gain"].value for f in (hidden, *clean)]
    assert gains[0] > max(gains[1:]) + 1.0
    before = [-np.mean([s.loss for s in c.signals(exam().forget)]) for c in (hiding(), retrain())]
    assert before[0] < before[1] and mean(hidden) > mean(clean[0])


def test_a_prefix_of_its_own_is_faster_for_what_is_known_but_comes_everywhere() -> None:
    options = replace(SHORT, per_question=True, restarts=1, learning_rate=0.1)
    own, clean = (attacked(c, options) for c in (exam().audited, retrain()))
    assert mean(own, "soft-prompts.own") > mean(clean, "soft-prompts.own") + 0.5
    # It encodes: it does more for a model that never knew the answer than a prefix that was trained on others.
    assert mean(clean, "soft-prompts.own") > mean(clean)
    assert "can encode" in clean.notes[0]


def test_own_prefixes_do_not_depend_on_each_other() -> None:
    model, adapter, samples = exam().references[0].model, text_adapter(), exam().forget[:4]
    options = replace(SHORT, steps=4)
    together = own_prefixes(model, adapter, samples, exam(), options, 4096)
    alone = [own_prefixes(model, adapter, [s], exam(), options, 4096)[0] for s in samples]
    assert together == pytest.approx(alone, abs=1e-3)
    prefix = start(model, exam(), options, 0).requires_grad_()
    optimizer, values = torch.optim.Adam([prefix], lr=0.01), []
    for _ in range(4):
        optimizer.zero_grad()
        log_prob = soft_positions(model, adapter, samples[:1], prefix).log_prob_N().mean()
        (-log_prob).backward(inputs=[prefix])
        optimizer.step()
        values.append(float(log_prob.detach()))
    assert alone[0] == pytest.approx(np.mean(values), abs=1e-4)


def test_the_model_is_not_touched() -> None:
    model = exam().audited.model
    before = copy.deepcopy(model.state_dict())
    attacked(exam().audited)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not model.training


def test_samples_and_prefix_stay_within_the_positions() -> None:
    model = exam().audited.model  # 64 positions
    tight = shortened(model, text_adapter(), 50)
    assert tight.context == 14 and tight is not text_adapter() and not tight._encoded
    short = TextAdapter(tokenizer=tiny_tokenizer(), context=20)
    assert shortened(model, short, 20) is short
    assert "leave no room" in unsupported(model, text_adapter(), 63)
    found = soft_prompts(exam(), exam().audited, SoftPromptOptions(tokens=63))
    assert not found.scores and "63 virtual tokens" in found.notes[0]


def test_what_takes_no_embeddings_is_said() -> None:
    class Deaf(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    class Outer(torch.nn.Module):
        base_model = Deaf()

    assert "Outer does not take embeddings" in unsupported(Outer(), text_adapter(), 4)
    assert "causal language model" in unsupported(exam().audited.model, world("resnet").adapter, 4)


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match="tokens = 0"):
        SoftPromptOptions(tokens=0)
    with pytest.raises(UserError, match="above 0"):
        SoftPromptOptions(learning_rate=0.0)
    with pytest.raises(UserError, match="allowed are answers, openers"):
        get_attack("soft-prompts").configure({"learn": "poems"})
