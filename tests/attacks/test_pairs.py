"""Scores of two models against slow references; whom a checkpoint is compared with; models with other tokenizers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attack_cases import adapter, exam, retrain
from expunge.attacks import pairs
from expunge.attacks.exam import Checkpoint
from expunge.attacks.registry import get_attack
from expunge.errors import UserError
from expunge.models.text import TextAdapter
from expunge.signals.record import Signals
from expunge.stats import auc
from tiny_text import tiny_model, tiny_tokenizer

TOKEN = st.tuples(st.floats(-15, -(2**-10), width=32), st.floats(-15, -(2**-10), width=32), st.booleans())
TEXT = st.lists(TOKEN, min_size=1, max_size=50)


def signals(log_probs: list[float], hits: list[bool] | None = None, text_bytes: int = 20, cut: bool = False) -> Signals:
    values = np.array(log_probs, dtype=np.float32)
    return Signals(
        id="a", subject="s", log_prob_L=values, hit_L=np.array(hits if hits is not None else values > -0.7, dtype=bool),
        mean_L=values, std_L=np.ones_like(values), rank_L=np.zeros(len(values), dtype=np.int32),
        text_bytes=text_bytes, zlib_bytes=28, truncated=cut, ids_L=np.arange(len(values), dtype=np.int32),
    )  # fmt: skip


@given(TEXT)
def test_scores_equal_the_formulas(text: list[tuple[float, float, bool]]) -> None:
    own, other = [t[0] for t in text], [t[1] for t in text]
    ours, theirs = signals(own, [t[2] for t in text]), signals(other)
    loss, reference = -sum(own) / len(own), -sum(other) / len(other)
    assert pairs.ratio_score(ours, theirs, True) == pytest.approx(-loss / reference, rel=1e-4)
    assert pairs.difference_score(ours, theirs, True) == pytest.approx(reference - loss, abs=1e-4)
    p, q = math.exp(-loss), math.exp(-reference)
    if max(p, q) < 0.99:
        logit = math.log(p / (1 - p)) - math.log(q / (1 - q))
        assert pairs.logit_difference_score(ours, theirs, True) == pytest.approx(logit, abs=1e-3)
    shares = []
    for size in (2, 3, 4, 6, 9, 13, 18, 25, 32, 40):
        starts = range(len(text) - size + 1)
        won = [sum(other[s : s + size]) < sum(own[s : s + size]) for s in starts]
        near = [abs(sum(other[s : s + size]) - sum(own[s : s + size])) < 1e-4 for s in starts]
        if any(near):
            return  # rounding decides
        if won:
            shares.append(sum(won) / len(won))
    if shares:
        assert pairs.window_score(ours, theirs) == pytest.approx(sum(shares) / len(shares))


@given(TEXT, st.floats(0.001, 0.5))
def test_ez_mia_equals_its_formula(text: list[tuple[float, float, bool]], smoothing: float) -> None:
    shifts = [float(np.float32(own)) - float(np.float32(other)) for own, other, _ in text]
    wrong = [s for s, (_, _, hit) in zip(shifts, text, strict=True) if not hit]
    sides = []
    for sign in (1, -1):
        everywhere = sum(max(sign * s, 0) for s in shifts) / len(shifts)
        sides.append((sum(max(sign * s, 0) for s in wrong) + everywhere) / (len(wrong) + 1) + smoothing)
    found = pairs.ez_score(
        signals([t[0] for t in text], [t[2] for t in text]), signals([t[1] for t in text]), smoothing
    )
    assert found == pytest.approx(math.log(sides[0] / sides[1]), abs=1e-6)


def test_ez_mia_ranks_as_the_paper_where_the_paper_is_defined() -> None:
    """Many wrong tokens and little smoothing: the order of the ratios of sums."""
    rng, texts = np.random.default_rng(0), []
    for level in np.linspace(-1, 1, 12):
        shift = rng.normal(level, 1.0, 400)
        texts.append((signals((-5 + shift).tolist(), [False] * 400), signals([-5.0] * 400), shift))
    ratios = [np.maximum(s, 0).sum() / np.maximum(-s, 0).sum() for _, _, s in texts]
    found = [pairs.ez_score(a, b, 1e-4) for a, b, _ in texts]
    assert np.argsort(found).tolist() == np.argsort(ratios).tolist()
    np.testing.assert_allclose(np.exp(found), ratios, rtol=1e-2)


def test_the_strongest_member_gets_the_highest_score() -> None:
    """Known by heart: no wrong token, nothing fell. The paper's ratio is 0/0 there, its code gives 0."""
    never = signals([-6.0] * 8, [False] * 8)
    heart = pairs.ez_score(signals([-0.01] * 8, [True] * 8), never)
    nearly = pairs.ez_score(signals([-0.01] * 7 + [-2.0], [True] * 7 + [False]), never)
    stranger = pairs.ez_score(signals([-6.1] * 4 + [-5.9] * 4, [False] * 8), never)
    assert heart > nearly > stranger and abs(stranger) < 0.1


def test_short_and_empty_texts() -> None:
    assert pairs.window_score(signals([-1.0]), signals([-2.0])) == 1.0
    assert pairs.window_score(signals([-3.0]), signals([-2.0])) == 0.0
    for score in (pairs.window_score, pairs.ez_score):
        assert math.isnan(score(signals([]), signals([])))
    assert math.isnan(pairs.ratio_score(signals([]), signals([]), True))


def test_a_loss_of_zero_stays_finite() -> None:
    certain = signals([0.0, 0.0])
    for score in (pairs.ratio_score, pairs.difference_score, pairs.logit_difference_score):
        assert math.isfinite(score(certain, certain, True))
        assert math.isfinite(score(signals([-3.0, -1.0]), certain, True))


def test_other_tokens_are_compared_in_bits_per_byte() -> None:
    """The same code length in two tokens or four is the same; a text that was cut has none."""
    two, four = signals([-2.0, -2.0]), signals([-1.0] * 4)
    assert pairs.difference_score(two, four, False) == pytest.approx(0.0)
    assert pairs.ratio_score(two, four, False) == pytest.approx(-1.0)
    assert pairs.logit_difference_score(two, four, False) == pytest.approx(0.0)
    better = signals([-0.5] * 4)
    assert pairs.difference_score(better, two, False) == pytest.approx(2.0 / math.log(2) / 20)
    assert math.isnan(pairs.difference_score(signals([-1.0], cut=True), two, False))
    assert pairs.difference_score(signals([-1.0], cut=True), two, True) == pytest.approx(1.0)


def test_whom_a_checkpoint_is_compared_with() -> None:
    full = exam()
    reference, base = full.references[0], full.base
    assert base is not None
    assert pairs.rivals(full, full.audited, "auto") == list(full.shadows)
    assert pairs.rivals(full, full.audited, "references") == [reference]
    assert pairs.rivals(full, reference, "references") == []
    assert pairs.rivals(full, full.audited, "base") == [base]
    assert pairs.rivals(full, reference, "all") == [*full.shadows, base]
    without = replace(full, shadows=[])
    assert pairs.rivals(without, reference, "auto") == [base]
    alone = replace(full, shadows=[], base=None)
    assert pairs.rivals(alone, full.audited, "auto") == [reference]
    attack = get_attack("wbc")
    finding = attack.run(alone, reference, attack.options())
    assert not finding.scores and "no other model to compare reference-0 with" in finding.notes[0]


def test_several_models_are_averaged() -> None:
    attack, one = get_attack("reference_difference"), exam()
    both = attack.run(one, one.audited, attack.options()).scores["reference_difference"]["forget"]
    alone = [
        attack.run(replace(one, shadows=[s], shared={}), one.audited, attack.options()).scores[attack.name]["forget"]
        for s in one.shadows
    ]
    np.testing.assert_allclose(both, np.mean(alone, axis=0))


def test_a_model_with_another_tokenizer() -> None:
    """One word more in the vocabulary. Token-wise attacks say that they had to stop."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    stranger = Checkpoint.of(
        exam().shadows[0].model, TextAdapter(tokenizer=tokenizer, context=64), "shadow", "odd-shadow"
    )
    mixed = replace(exam(), shadows=[stranger], shared={})
    attack = get_attack("reference_difference")
    finding = attack.run(mixed, mixed.audited, attack.options())
    assert "odd-shadow has other tokens than audited and was compared in bits per byte" in finding.notes[0]
    scores = finding.scores["reference_difference"]
    assert auc(scores["forget"], scores["holdout"]) > 0.6
    for name in ("ez_mia", "wbc"):
        attack = get_attack(name)
        finding = attack.run(mixed, mixed.audited, attack.options())
        assert not finding.scores and "was left out" in finding.notes[0]


def test_equal_tokens_are_recognised_across_adapters() -> None:
    first, second = exam().audited, retrain()
    assert first.adapter is not second.adapter
    ours, theirs = (c.signals(exam().forget) for c in (first, second))
    assert pairs.same_tokens(first, second, ours, theirs)
    other = Checkpoint.of(
        tiny_model(), TextAdapter(tokenizer=adapter().tokenizer, context=64, template="{prompt}{target}")
    )
    shifted = other.signals(exam().forget)  # no eos: other target tokens under the same vocabulary
    assert not pairs.same_tokens(first, other, ours, shifted)


def test_smoothing_must_be_positive() -> None:
    with pytest.raises(UserError, match="above 0"):
        get_attack("ez_mia").configure({"smoothing": 0})
