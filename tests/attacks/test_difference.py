"""Model-difference decoding against a slow loop in the open, and what it gives beyond the new model alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.matrix import worlds

import attack_cases
from attack_cases import exam, retrain
from expunge.attacks.difference import DifferenceOptions, decode, guided, teacher_forced
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, get_attack
from expunge.errors import UserError
from tiny_text import tiny_model

DIFFERENCE = get_attack("model-difference")


def run(checkpoint: Checkpoint, **options: object) -> Finding:
    return DIFFERENCE.run(exam(), checkpoint, DIFFERENCE.configure({"max_new_tokens": 8, **options}))


def slow_step(before: list[float], after: list[float], strength: float, margin: float) -> tuple[list[float], list[int]]:
    """Log-probabilities under the difference, token by token, and the plausible tokens."""

    def log_p(logits: list[float]) -> list[float]:
        total = math.log(sum(math.exp(x) for x in logits))
        return [x - total for x in logits]

    old, new = log_p(before), log_p(after)
    plausible = [v for v in range(len(old)) if old[v] > max(old) - margin]
    score = {v: new[v] + strength * (old[v] - new[v]) for v in plausible}
    total = math.log(sum(math.exp(s) for s in score.values()))
    return [score[v] - total if v in score else -math.inf for v in range(len(old))], plausible


def test_the_distribution_is_the_definition() -> None:
    noise = torch.randn(6, 2, 11, generator=torch.Generator().manual_seed(0)) * 4
    for before, after in noise:
        for strength in (0.0, 1.0, 2.0):
            log_p, plausible = guided(before[None], after[None], strength, 5.0)
            wanted, kept = slow_step(before.tolist(), after.tolist(), strength, 5.0)
            np.testing.assert_allclose(log_p[0].numpy(), wanted, atol=1e-5)
            assert torch.nonzero(plausible[0])[:, 0].tolist() == kept


def test_teacher_forcing_equals_one_text_at_a_time() -> None:
    before, after = exam().original, exam().references[0]
    assert before is not None
    samples = exam().forget[:3] + exam().holdout[:2]
    found, plain = teacher_forced(before, after, samples, DifferenceOptions())
    for i, sample in enumerate(samples):
        coded = attack_cases.adapter().encode(sample)
        with torch.no_grad():
            logits = [c.model(input_ids=torch.tensor([coded.ids])).logits[0].double() for c in (before, after)]
        total, alone = [], []
        for t in range(coded.first, len(coded.ids)):
            log_p, plausible = slow_step(logits[0][t - 1].tolist(), logits[1][t - 1].tolist(), 2.0, 5.0)
            old = logits[0][t - 1].log_softmax(-1)[coded.ids[t]]
            total.append(log_p[coded.ids[t]] if coded.ids[t] in plausible else float(old))
            alone.append(float(logits[1][t - 1].log_softmax(-1)[coded.ids[t]]))
        assert found[i] == pytest.approx(np.mean(total), abs=1e-4)
        assert plain[i] == pytest.approx(np.mean(alone), abs=1e-4)


def test_decoding_equals_a_loop_without_cache() -> None:
    before, after = exam().original, retrain()
    assert before is not None
    adapter, samples = attack_cases.adapter(), exam().forget + exam().holdout[:3]
    options = DifferenceOptions(max_new_tokens=6)
    for sample, text in zip(samples, decode(before, after, samples, options), strict=True):
        ids = adapter.prompt_ids(sample, 6)
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                logits = [c.model(input_ids=torch.tensor([ids])).logits[:, -1] for c in (before, after)]
            ids = [*ids, int(guided(logits[0], logits[1], 2.0, 5.0)[0].argmax())]
            if ids[-1] == adapter.tokenizer.eos_token_id:
                break
        assert text == adapter.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_strength_zero_and_one_read_the_new_and_the_old_model() -> None:
    before, after = exam().original, exam().references[0]
    assert before is not None
    alone = after.answers(exam().holdout, 8)
    wide = {"margin": 100.0, "max_new_tokens": 8}
    assert decode(before, after, exam().holdout, DifferenceOptions(strength=0.0, **wide)) == alone  # type: ignore[arg-type]
    old = decode(before, after, exam().holdout, DifferenceOptions(strength=1.0, **wide))  # type: ignore[arg-type]
    assert old == before.answers(exam().holdout, 8)


def test_breaks_an_exact_retrain_and_gains_nothing_on_the_original() -> None:
    assert exam().original is not None
    figures = {c.name: run(c).figures for c in (exam().original, exam().references[0])}
    gone = run(retrain()).figures
    for found in (figures["reference-0"], gone):
        assert found["model-difference.gain"].low > 2.0
        assert found["model-difference.rouge_l_gain"].value > 0.2
    assert abs(figures["original"]["model-difference.gain"].value) < 0.05
    assert figures["original"]["model-difference.rouge_l_gain"].value == 0
    # Both sides are read alike, so the difference alone is no evidence against the audited model.
    reads = [np.mean(run(c).scores["model-difference"]["forget"]) for c in (exam().audited, exam().references[0])]
    assert abs(reads[0] - reads[1]) < 0.5


def test_never_seen_people_are_not_read() -> None:
    scores = run(retrain()).scores["model-difference"]
    assert np.mean(scores["forget"]) > np.mean(scores["holdout"]) + 1.5


def test_wrong_input_is_told() -> None:
    with pytest.raises(UserError, match="plausible"):
        run(retrain(), margin=0)
    with pytest.raises(UserError, match="at least 1"):
        run(retrain(), max_new_tokens=0)
    model = tiny_model(0)
    model.resize_token_embeddings(70)
    with pytest.raises(UserError, match="64 tokens and the audited model 70"):
        run(Checkpoint.of(model.eval(), attack_cases.adapter()))


@pytest.mark.parametrize("name", ["resnet", "llava"])
def test_classes_and_images(name: str) -> None:
    """The step from a model that knows to one that does not is read backwards, whatever the modality."""
    world = worlds.world(name)
    before, after = (Checkpoint.of(m.eval(), world.adapter) for m in (world.original, world.start))
    both = Exam(audited=after, original=before, samples={"forget": list(world.forget), "holdout": list(world.unseen)})
    found = DIFFERENCE.run(both, after, DIFFERENCE.configure({}))
    assert found.figures["model-difference.gain"].value > 0.5
    assert "model-difference.rouge_l" not in found.figures  # greedy answers are for text alone
    scores = found.scores["model-difference"]
    assert np.mean(scores["forget"]) > np.mean(scores["holdout"]) + 1
