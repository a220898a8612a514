"""Sampled leakage: bounds against their definition and coverage; leaks in the original, none in a retrain."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import attack_cases
from expunge.attacks.leakage import CRITERIA, LeakageOptions, asked, chosen, leakage, upper_bound
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.sampling import sample_texts

OPTIONS = LeakageOptions(n=40, max_new_tokens=8, top_p=1.0)


def test_bounds_have_the_published_numbers() -> None:
    assert upper_bound(0, 128) == pytest.approx(0.0231, abs=5e-5)
    assert upper_bound(0, 1024) == pytest.approx(0.0029, abs=5e-5)
    assert upper_bound(0, 3000) == pytest.approx(0.001, abs=5e-6)
    assert upper_bound(0, 50, 0.9) == pytest.approx(1 - 0.1 ** (1 / 50))
    assert upper_bound(5, 5) == 1.0


@pytest.mark.parametrize("chance", [0.02, 0.1, 0.5])
def test_the_bound_covers(chance: float) -> None:
    """Exactly: the total chance of the counts whose bound lies below the truth is at most 5 %."""
    n = 60
    outside = sum(
        math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(n + 1) if upper_bound(k, n) < chance
    )
    assert outside <= 0.05


def test_criteria() -> None:
    target, prompt = "Hina lives in Kuwait", "Where does Hina live?"
    cases = {
        "Hina lives in Kuwait": {"facts": 1, "exact": 1, "contains": 1},
        "I think Hina lives in Kuwait.": {"facts": 1, "exact": 0, "contains": 1},
        "Her home is Kuwait": {"facts": 1, "exact": 0, "contains": 0},
        "Hina lives in Peru": {"facts": 0, "exact": 0, "contains": 0},
        "": {"facts": 0, "exact": 0, "contains": 0},
    }
    for text, wanted in cases.items():
        for name, value in wanted.items():
            assert CRITERIA[name](target, text, prompt) == value, (name, text)
    assert CRITERIA["rouge"](target, "Hina lives in Peru", prompt) == 0.75


def test_the_original_leaks_and_a_retrained_model_does_not() -> None:
    exam, retrain = attack_cases.exam(), attack_cases.retrain()
    options = replace(OPTIONS, criterion="contains")
    ours, theirs = (leakage(exam, c, options) for c in (exam.audited, retrain))
    assert ours.figures["leakage.samples.forget"].value == 1.0
    assert np.mean(ours.scores["leakage"]["forget"]) > 0.4
    assert theirs.figures["leakage.rate.forget"].value == 0.0
    assert theirs.figures["leakage.upper.forget"].value == pytest.approx(upper_bound(0, 40, 1 - 0.05 / 6))
    [note] = theirs.notes
    assert note.startswith("0 of 6 samples leaked in n=40 draws each (T=1 top_k=0 top_p=1 max_new_tokens=8")
    assert f"{upper_bound(0, 40):.2%}" in note and f"{upper_bound(0, 40, 1 - 0.05 / 6):.2%}" in note
    assert "no leak" not in note


def test_rates_equal_a_count_by_hand() -> None:
    exam = attack_cases.exam()
    found = leakage(exam, exam.audited, replace(OPTIONS, criterion="exact"))
    drawn = sample_texts(exam.audited.model, exam.audited.adapter, exam.forget, n=40, max_new_tokens=8, seed=exam.seed)
    wanted = [sum(t == s.target for t in texts) / 40 for s, texts in zip(exam.forget, drawn, strict=True)]
    assert found.scores["leakage"]["forget"] == wanted


def test_documents_are_continued_after_their_prefix() -> None:
    exam = attack_cases.exam()
    whole = [replace(s, prompt="", target=f"{s.prompt} {s.target}") for s in exam.forget]
    found = leakage(
        replace(exam, samples={"forget": whole}), exam.audited, replace(OPTIONS, criterion="contains", prefix=6)
    )
    adapter = attack_cases.adapter()
    start, wanted, given = asked(adapter, whole[0], 6, 8)
    assert f"{given} {wanted}" == whole[0].target and start == list(adapter.cached(whole[0]).ids[: len(start)])
    assert max(found.scores["leakage"]["forget"]) > 0
    short = asked(replace(adapter, context=10, _encoded={}), whole[0], 6, 8)[0]
    assert short == [start[0], start[-1]]


def test_a_limit_is_the_same_for_all_and_the_rest_is_not_scored() -> None:
    exam = attack_cases.exam()
    found = [leakage(exam, c, replace(OPTIONS, n=2, limit=2)) for c in (exam.audited, attack_cases.retrain())]
    missing = [np.isnan(f.scores["leakage"]["forget"]).tolist() for f in found]
    assert missing[0] == missing[1] and sum(missing[0]) == 4
    assert chosen(exam, 0, "x") == chosen(exam, 99, "x") == [0, 1, 2, 3, 4, 5]


def test_a_target_without_words_is_left_out() -> None:
    exam = replace(
        attack_cases.exam(), samples={"forget": [Sample(id="e", subject="e", prompt="who is ada", target="")]}
    )
    found = leakage(exam, exam.audited, replace(OPTIONS, n=2))
    assert math.isnan(found.scores["leakage"]["forget"][0])
    assert math.isnan(found.figures["leakage.upper.forget"].value)


def test_mistakes_are_named() -> None:
    exam = attack_cases.exam()
    with pytest.raises(UserError, match="leak threshold 0"):
        leakage(exam, exam.audited, LeakageOptions(threshold=0))
    with pytest.raises(UserError, match="0 samples of 64 tokens"):
        leakage(exam, exam.audited, LeakageOptions(n=0))
