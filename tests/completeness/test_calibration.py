"""Calibrated completeness: closed forms, uniform p-values, controlled false discoveries, and what must not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from expunge.completeness.calibration import (
    Completeness,
    by_subject,
    calibrate,
    evidence,
    residuals,
    score,
)
from expunge.completeness.readings import Floats, Form, Readings
from expunge.errors import UserError
from expunge.stats import discoveries

GAP = 3.0  # of the original above models that never saw a sample, on the scale of the evidence


def readings(
    rng: np.random.Generator,
    num: int,
    shadows: int,
    *,
    form: Form = "text",
    kept: Any = False,
    shift: float = 0.0,
    spread: float = 0.3,
    never_trained: bool = False,
    prefix: str = "s",
) -> Readings:
    """Exchangeable models: difficulty of the sample plus noise. ``kept``: what the unlearned model still has."""
    hard_N, own_N = rng.normal(0, 1, num), rng.uniform(0.7, 1.3, num) * spread
    rows = hard_N + own_N * rng.normal(0, 1, (shadows + 1, num))
    gain = 0.0 if never_trained else GAP
    original_N = hard_N + gain + 0.2 * own_N * rng.normal(0, 1, num)
    unlearned_N = np.where(kept, original_N + 0.05 * own_N, rows[-1]) + shift
    subjects = [f"{prefix}{i // 4}" for i in range(num)]
    ids = [f"{prefix}-{i:04d}" for i in range(num)]

    def to(evidence: Floats) -> Floats:
        return np.asarray(12 - evidence if form == "text" else 1 / (1 + np.exp(-evidence)))

    return Readings(form, ids, to(unlearned_N), to(rows[:-1]), to(original_N), subjects)


def pair(rng: np.random.Generator, num: int, shadows: int, beside: int = 0, **more: Any) -> dict[str, Any]:
    own = readings(rng, num, shadows, **more)
    if not beside:
        return {"readings": own}
    more = {k: v for k, v in more.items() if k in ("form", "shift", "spread")}
    return {"readings": own, "holdout": readings(rng, beside, shadows, never_trained=True, prefix="h", **more)}


# -- closed forms --------------------------------------------------------------------------------------------------


def test_residuals_are_the_written_formula() -> None:
    values, shadows = np.array([3.0, 1.0]), np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 5.0]])
    variances = [1.0, 7.0]
    shrunk = [(2 * v + 4 * 4.0) / 6 for v in variances]
    expected = [(3 - 2) / math.sqrt(shrunk[0] * 4 / 3), (1 - 2) / math.sqrt(shrunk[1] * 4 / 3)]
    assert residuals(values, shadows).tolist() == pytest.approx(expected)
    assert residuals(values, shadows[:2], own_spread=False).tolist() == pytest.approx(
        [1.5 / math.sqrt(1.5), 0.5 / math.sqrt(1.5)]
    )


def slow_p_under(own: Readings, beside: Readings | None) -> list[float]:
    """Share of left-out readings at least as remembered, among those on the same side of the threshold of the gap.

    Remembered is a residual less the model's mean residual on the holdout; where a model is judged, and not left out
    to make the null, the lower of that and the residual itself.
    """
    assert own.original_N is not None
    shadow_KN = -own.shadow_KN
    spread = len(shadow_KN) > 2
    beside_KM = None if beside is None else -beside.shadow_KN

    def remembered(values: Floats, unseen: Floats | None, without: int | None, null: bool = False) -> list[float]:
        drop = [] if without is None else [without]
        plain = residuals(values, np.delete(shadow_KN, drop, axis=0), spread)
        centre = 0.0
        if unseen is not None and beside_KM is not None:
            centre = float(np.mean(residuals(unseen, np.delete(beside_KM, drop, axis=0), spread)))
        return [float(x) - centre if null else min(float(x), float(x) - centre) for x in plain]

    def unseen_of(which: Floats | None) -> Floats | None:
        return None if which is None else -which

    left: list[tuple[float, float]] = []  # (remembered, gap) of every left-out reading
    for k in range(len(shadow_KN)):
        beside_M = None if beside_KM is None else beside_KM[k]
        original_M = unseen_of(None if beside is None else beside.original_N)
        gaps = remembered(-own.original_N, original_M, k)
        left += zip(remembered(shadow_KN[k], beside_M, k, null=True), gaps, strict=True)
    threshold = math.inf
    for candidate in sorted(gap for _, gap in left):
        near = [r for r, gap in left if gap >= candidate]
        if (1 + sum(r >= candidate for r in near)) / (1 + len(near)) <= 0.05:
            threshold = candidate
            break
    seen = remembered(-own.unlearned_N, unseen_of(None if beside is None else beside.unlearned_N), None)
    gaps = remembered(-own.original_N, unseen_of(None if beside is None else beside.original_N), None)
    answers = []
    for mine, gap in zip(seen, gaps, strict=True):
        null = [r for r, other in left if (other >= threshold) == (gap >= threshold)]
        answers.append((1 + sum(r >= mine for r in null)) / (1 + len(null)))
    return answers


@pytest.mark.parametrize("shadows", [2, 3, 5])
@pytest.mark.parametrize("beside", [0, 8])
def test_p_values_against_a_slow_loop(shadows: int, beside: int) -> None:
    given = pair(np.random.default_rng(shadows), 12, shadows, beside, kept=np.arange(12) < 3)
    found = calibrate(**given)
    assert found.p_under_N.tolist() == pytest.approx(slow_p_under(given["readings"], given.get("holdout")))
    assert 1 / (1 + 12 * shadows) <= found.smallest_p <= 1 / (1 + 6 * shadows)
    assert found.calibration == ("shadows and holdout" if beside else "shadows")


def test_single_shadow_takes_its_null_from_the_holdout() -> None:
    given = pair(np.random.default_rng(1), 6, 1, 9)
    own, beside = given["readings"], given["holdout"]
    found = calibrate(**given)
    null = [(s - u) / math.sqrt(2) for s, u in zip(beside.shadow_KN[0], beside.unlearned_N, strict=True)]
    for i in range(6):
        mine = (own.shadow_KN[0, i] - own.unlearned_N[i]) / math.sqrt(2)
        assert found.p_under_N[i] == pytest.approx((1 + sum(x >= mine - 1e-12 for x in null)) / 10)
        assert found.p_over_N[i] == pytest.approx((1 + sum(x <= mine + 1e-12 for x in null)) / 10)
    assert found.calibration == "holdout"


def test_position_completeness_and_score() -> None:
    own = Readings("text", ["a", "b", "c"], np.array([4.0, 1.0, 2.5]), np.array([[4.1, 4.0, 4.0], [3.9, 4.0, 4.0],
                   [4.0, 4.1, 4.1], [4.0, 3.9, 3.9]]), np.array([1.0, 1.0, 1.0]))  # fmt: skip
    found = calibrate(own, level=0.1)  # 13 never-seen readings resolve no 0.05
    assert found.position_N.tolist() == pytest.approx([0.0, 1.0, 0.5])
    gap = residuals(-np.array([1.0] * 3), -own.shadow_KN)
    shrunk = [1 - 0.0, 1 - gap[1] ** 2 / (gap[1] ** 2 + 1), 1 - 0.5 * gap[2] ** 2 / (gap[2] ** 2 + 1)]
    assert found.completeness_N.tolist() == pytest.approx(shrunk)
    expected = [
        -math.log(own.unlearned_N[i] + 0.002)
        + 0.8 * math.log(1.002)
        + 0.2 * np.mean([math.log(own.shadow_KN[k, i] + 0.002) for k in range(4)])
        for i in range(3)
    ]
    assert score(own).tolist() == pytest.approx(expected) and found.score_N.tolist() == pytest.approx(expected)


def slow_discoveries(p_values: list[float], fdr: float) -> list[bool]:
    num = len(p_values)
    cut = max((p for r, p in enumerate(sorted(p_values), 1) if p <= fdr * r / num), default=-1.0)
    return [p <= cut for p in p_values]


def test_step_up_rule() -> None:
    assert discoveries(np.array([0.01, 0.02, 0.03, 0.5]), 0.05).tolist() == [True, True, True, False]
    assert discoveries(np.zeros(0), 0.05).size == 0
    rng = np.random.default_rng(2)
    for _ in range(40):
        p = np.round(rng.uniform(0, 1, 15) ** 4, 2)
        assert discoveries(p, 0.1).tolist() == slow_discoveries(p.tolist(), 0.1)


# -- calibration ---------------------------------------------------------------------------------------------------


def called(shadows: int, beside: int, draws: int = 60, **more: Any) -> tuple[float, list[Completeness]]:
    """Share called at the level before correction, over many draws of exchangeable models."""
    found = [calibrate(**pair(np.random.default_rng([shadows, beside, i]), 40, shadows, beside, **more))
             for i in range(draws)]  # fmt: skip
    return float(np.nanmean([f.called() for f in found])), found


@pytest.mark.parametrize("form", ["text", "classifier"])
@pytest.mark.parametrize(("shadows", "beside"), [(1, 60), (2, 0), (2, 60), (3, 0), (3, 60), (5, 0), (5, 60), (10, 60)])
def test_exchangeable_models_are_called_at_the_level(form: Form, shadows: int, beside: int) -> None:
    share, found = called(shadows, beside, form=form)
    assert 0.03 <= share <= 0.07
    for column in ("p_over_N", "p_under_N"):
        p = np.concatenate([getattr(f, column) for f in found])
        for level in (0.1, 0.25, 0.5):
            assert np.mean(p <= level) <= level + 0.03
        assert np.mean(p <= 0.5) >= 0.4


@pytest.mark.parametrize(("shadows", "beside"), [(1, 60), (2, 60), (3, 0), (5, 60)])
def test_false_discoveries_stay_under_their_rate(shadows: int, beside: int) -> None:
    """A quarter of the samples is kept: all are called under, and at most the rate of the calls is wrong."""
    wrong, power = [], []
    for i in range(80):
        kept_N = np.arange(40) < 10
        given = pair(np.random.default_rng([9, shadows, i]), 40, shadows, beside, kept=kept_N)
        under_N = np.array([v == "under-unlearned" for v in calibrate(**given, fdr=0.1).verdict_N])
        wrong.append(float((under_N & ~kept_N).sum() / max(1, under_N.sum())))
        power.append(float(under_N[kept_N].mean()))
    assert np.mean(wrong) <= 0.1 + 2 * np.std(wrong) / math.sqrt(len(wrong))
    assert np.mean(power) >= 0.95


@pytest.mark.parametrize("form", ["text", "classifier"])
@pytest.mark.parametrize(("shadows", "beside"), [(1, 80), (2, 0), (2, 40), (3, 40), (5, 0)])
def test_the_original_itself_is_under_and_a_collapsed_model_over(form: Form, shadows: int, beside: int) -> None:
    given = pair(np.random.default_rng(4), 40, shadows, beside, form=form)
    own = given["readings"]
    given["readings"] = replace(own, unlearned_N=own.original_N)
    found = calibrate(**given)
    assert found.counts()["under-unlearned"] >= 0.95 * found.auditable_N.sum() and found.auditable_N.mean() >= 0.9
    assert np.nanmax(found.completeness_N) < 0.2

    worse = own.unlearned_N + 9 if form == "text" else own.unlearned_N * 1e-3
    beside_worse = {}
    if beside and shadows > 1:  # a broken model is broken everywhere
        other = given["holdout"]
        gone = other.unlearned_N + 9 if form == "text" else other.unlearned_N * 1e-3
        beside_worse = {"holdout": replace(other, unlearned_N=gone)}
    elif beside:
        beside_worse = {"holdout": given["holdout"]}
    found = calibrate(replace(own, unlearned_N=worse), **beside_worse)
    assert found.counts()["over-unlearned"] >= 0.95 * found.auditable_N.sum()


def test_a_model_that_is_better_as_a_whole_is_not_mistaken_for_one_that_remembers() -> None:
    given = pair(np.random.default_rng(5), 60, 3, 80, shift=0.9)
    alone = calibrate(given["readings"])
    beside = calibrate(**given)
    assert np.mean(alone.p_under_N <= 0.05) > 0.5, "without a holdout it looks remembered"
    assert np.mean(beside.p_under_N <= 0.05) <= 0.1 and beside.counts()["under-unlearned"] == 0


def test_a_model_that_is_worse_as_a_whole_does_not_hide_what_it_remembers_by_centring() -> None:
    """Centring alone would call samples of a bad model remembered that read like never seen."""
    given = pair(np.random.default_rng(6), 60, 3, 80, shift=-1.5)
    found = calibrate(**given)
    assert found.counts()["under-unlearned"] == 0 and found.counts()["over-unlearned"] >= 50


# -- what must not matter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shadows", [1, 2, 4])
def test_order_of_rows_changes_no_bit(shadows: int) -> None:
    rng = np.random.default_rng(7)
    given = pair(rng, 37, shadows, 23, kept=np.arange(37) < 9)
    first = calibrate(**given)
    order, other = rng.permutation(37), rng.permutation(23)
    again = calibrate(given["readings"].select(order), holdout=given["holdout"].select(other))
    for name in ("score_N", "position_N", "completeness_N", "p_under_N", "p_over_N", "auditable_N"):
        assert np.array_equal(getattr(first, name)[order], getattr(again, name), equal_nan=name != "auditable_N"), name
    assert [first.verdict_N[i] for i in order] == list(again.verdict_N)
    assert first.counts() == again.counts() and first.notes == again.notes


def test_rows_without_numbers_are_not_auditable_and_change_nothing_else() -> None:
    given = pair(np.random.default_rng(8), 20, 3, 20)
    own = given["readings"]
    whole = calibrate(**given)
    more = pair(np.random.default_rng(80), 3, 3)["readings"]
    more.unlearned_N[0], more.shadow_KN[1, 1] = math.nan, math.inf
    assert more.original_N is not None and own.original_N is not None
    more.original_N[2] = math.nan
    mixed = Readings(
        "text", [*own.ids, "x", "y", "z"], np.concatenate([own.unlearned_N, more.unlearned_N]),
        np.concatenate([own.shadow_KN, more.shadow_KN], axis=1), np.concatenate([own.original_N, more.original_N]),
    )  # fmt: skip
    found = calibrate(mixed, holdout=given["holdout"])
    assert list(found.verdict_N[20:]) == ["not-auditable"] * 3 and np.isnan(found.p_under_N[20:]).all()
    assert np.array_equal(found.p_under_N[:20], whole.p_under_N) and found.verdict_N[:20] == whole.verdict_N
    assert found.notes[0].startswith("3 sample(s) without a finite reading")
    none = calibrate(mixed.select([20, 21, 22]))
    assert none.counts()["not-auditable"] == 3


# -- refusals and honest silence -----------------------------------------------------------------------------------


def test_single_shadow_without_holdout_gives_no_verdict() -> None:
    found = calibrate(pair(np.random.default_rng(10), 8, 1)["readings"])
    assert found.counts()["not-auditable"] == 8 and found.calibration == "none" and found.smallest_p == 1.0
    assert np.isnan(found.p_under_N).all() and np.isfinite(found.score_N).all()
    assert any("give a second shadow" in note for note in found.notes)


def test_without_a_gap_nothing_is_auditable() -> None:
    rng = np.random.default_rng(11)
    found = calibrate(readings(rng, 30, 4, never_trained=True, spread=1.0))
    assert found.counts()["not-auditable"] >= 27


def test_offline_says_what_is_not_known() -> None:
    own = replace(pair(np.random.default_rng(12), 8, 3)["readings"], original_N=None)
    found = calibrate(own)
    assert found.auditable_N.all() and np.isnan(found.position_N).all()
    assert any("no original" in note for note in found.notes)
    assert found.score_N.tolist() == pytest.approx(
        (np.log(own.shadow_KN + 0.002).mean(axis=0) - np.log(own.unlearned_N + 0.002)).tolist()
    )


def test_one_sample() -> None:
    given = pair(np.random.default_rng(13), 1, 3, 40)
    found = calibrate(**given)
    assert len(found.verdict_N) == 1 and found.smallest_p == 0.25
    assert found.verdict_N[0] == "not-auditable", "four never-seen readings cannot show anything at the 5 % level"


def test_wrong_levels_and_holdouts_are_refused() -> None:
    given = pair(np.random.default_rng(14), 6, 2, 6)
    for name in ("level", "fdr"):
        for value in (0.0, 1.0, -1.0, math.nan):
            with pytest.raises(UserError, match=f"{name} = .* is not between 0 and 1"):
                calibrate(given["readings"], **{name: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="give the same models for both"):
        calibrate(given["readings"], holdout=readings(np.random.default_rng(15), 6, 3))
    hollow = replace(given["holdout"], unlearned_N=np.full(6, math.nan))
    with pytest.raises(UserError, match="no holdout sample has a number"):
        calibrate(given["readings"], holdout=hollow)


def test_certain_probabilities_have_evidence() -> None:
    assert np.isfinite(evidence("classifier", np.array([0.0, 1.0]))).all()


# -- subjects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shadows", [2, 3])
@pytest.mark.parametrize("beside", [0, 12])
def test_subjects_against_a_slow_loop(shadows: int, beside: int) -> None:
    given = pair(np.random.default_rng(16), 12, shadows, beside, kept=np.arange(12) < 4)
    own, other = given["readings"], given.get("holdout")
    found = calibrate(**given)
    answers = by_subject(own, found, other)

    def means(values: Floats, subjects: list[str]) -> dict[str, float]:
        return {s: float(np.mean([v for v, t in zip(values, subjects, strict=True) if t == s])) for s in subjects}

    null = []
    for part in filter(None, (own, other)):
        for k in range(shadows):
            left = residuals(-part.shadow_KN[k], -np.delete(part.shadow_KN, k, axis=0), shadows > 2)
            null += list(means(left, list(part.subjects or [])).values())
    seen = means(residuals(-own.unlearned_N, -own.shadow_KN, shadows > 2), list(own.subjects or []))
    assert [a.subject for a in answers] == ["s0", "s1", "s2"] and [a.n for a in answers] == [4, 4, 4]
    for answer in answers:
        beyond = sum(x >= seen[answer.subject] - 1e-12 for x in null)
        assert answer.p_under == pytest.approx((1 + beyond) / (1 + len(null)))
        gone = [c for c, s, a in zip(found.completeness_N, own.subjects or [], found.auditable_N, strict=True)
                if s == answer.subject and a]  # fmt: skip
        assert answer.completeness == pytest.approx(np.mean(gone))
    assert answers[0].p_under == min(a.p_under for a in answers), "the one that is kept"


def test_subjects_need_two_shadows_and_names() -> None:
    given = pair(np.random.default_rng(17), 8, 1, 8)
    answers = by_subject(given["readings"], calibrate(**given), given["holdout"])
    assert len(answers) == 2 and all(math.isnan(a.p_under) for a in answers)
    nameless = replace(given["readings"], subjects=None)
    assert by_subject(nameless, calibrate(nameless, holdout=given["holdout"])) == []
