"""The audit's statistics against slow references and closed forms, and what its vector says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from expunge.bench.judge import (
    AXES,
    LEFT,
    LESS,
    LIKE,
    NO_REFERENCE,
    NOT_SHOWN,
    Judged,
    Panel,
    Values,
    holm,
    judge,
    settle,
    tile,
    worst,
)
from expunge.stats import Estimate, auc


def panel(models: Any, family: Any = "extraction", **more: Any) -> Panel:
    references = [name for name in models if name.startswith("reference")]
    return Panel("some", "some", family, "quick", "text", models, "audited", references, **more)


def ranked(models: Any, **more: Any) -> Panel:
    both: dict[str, Values] = {n: {"forget": f, "holdout": h} for n, (f, h) in models.items()}
    return panel(both, "membership", **more)


def names(num: int, prefix: str = "p", each: int = 1) -> list[str]:
    return [f"{prefix}{i // each}" for i in range(num)]


# -- means ---------------------------------------------------------------------------------------------------------


def test_gap_and_error_of_means_are_those_of_a_slow_computation() -> None:
    rng = np.random.default_rng(0)
    audited, first, second, third = rng.normal(0, 1, (4, 30))
    audited += 0.8
    groups = names(30, each=3)
    models = {"audited": audited, "reference-0": first, "reference-1": second, "reference-2": third}
    found = judge(panel({n: {"forget": v.tolist()} for n, v in models.items()}), {"forget": groups})

    apart = [audited[i] - (first[i] + second[i] + third[i]) / 3 for i in range(30)]
    by_subject = [sum(apart[3 * g : 3 * g + 3]) / 3 for g in range(10)]
    middle = sum(by_subject) / 10
    of_subjects = sum((x - middle) ** 2 for x in by_subject) / 9 / 10
    means = [sum(v) / 30 for v in (first, second, third)]
    grand = sum(means) / 3
    of_models = sum((m - grand) ** 2 for m in means) / 2 * (1 + 1 / 3)
    error = math.sqrt(of_subjects + of_models)
    degrees = (of_subjects + of_models) ** 2 / (of_subjects**2 / 9 + of_models**2 / 2)
    assert found.gap.value == pytest.approx(sum(apart) / 30)
    assert found.gap.high - found.gap.value == pytest.approx(stats.t.ppf(0.975, degrees) * error)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.gap.value) / error, degrees))
    assert found.gap.n == 30 and found.gap.note == ""
    assert found.models["reference-1"].value == pytest.approx(means[1])


def test_one_reference_counts_subjects_alone_and_says_so() -> None:
    rng = np.random.default_rng(1)
    own, other = rng.normal(0, 1, (2, 12))
    found = judge(panel({"audited": {"forget": own}, "reference-0": {"forget": other}}), {"forget": names(12)})
    assert found.p == pytest.approx(float(stats.ttest_rel(own, other).pvalue))
    assert "one reference" in found.gap.note


def test_one_subject_is_not_judged() -> None:
    values = {"audited": {"forget": [1.0, 2.0]}, "reference-0": {"forget": [0.0, 0.1]}}
    for more in ({}, {"reference-1": {"forget": [0.0, 0.2]}}):
        found = judge(panel({**values, **more}), {"forget": ["p", "p"]})
        settle([found])
        assert found.verdict == NOT_SHOWN and math.isnan(found.p) and "one subject" in found.gap.note
        assert found.gap.value == pytest.approx(1.45 if not more else 1.425)


def test_without_a_reference_nothing_is_compared() -> None:
    for one in (panel({"audited": {"forget": [1.0, 2.0]}}), ranked({"audited": ([1.0, 2.0], [0.5, 0.1])})):
        found = judge(one, {"forget": names(2), "holdout": names(2, "h")})
        settle([found])
        assert found.verdict == NO_REFERENCE and math.isnan(found.gap.value) and found.models["audited"].n > 0


def test_columns_without_numbers() -> None:
    nan = math.nan
    found = judge(
        panel({"audited": {"forget": [nan] * 3}, "reference-0": {"forget": [1.0, 2.0, 3.0]}}), {"forget": names(3)}
    )
    assert found.verdict == NOT_SHOWN and math.isnan(found.gap.value)
    whole = judge(
        panel({"audited": {"forget": [1.0, 2.0, 4.0]}, "reference-0": {"forget": [0.0, 0.0, 1.0]}}),
        {"forget": names(3)},
    )
    gaps = judge(
        panel({"audited": {"forget": [1.0, nan, 2.0, 4.0, 9.0]}, "reference-0": {"forget": [0.0, 7.0, 0.0, 1.0, nan]}}),
        {"forget": names(5)},
    )
    assert gaps.gap.value == pytest.approx(whole.gap.value) and gaps.p == pytest.approx(whole.p) and gaps.gap.n == 3
    empty = judge(ranked({"audited": ([nan, nan], [1.0, 2.0]), "reference-0": ([1.0, 2.0], [1.0, 2.0])}),
                  {"forget": names(2), "holdout": names(2, "h")})  # fmt: skip
    assert empty.verdict == NOT_SHOWN


def test_equal_models_do_not_differ_whatever_rounding_does() -> None:
    """The mean of three equal numbers is not that number; a t test of such errors finds anything."""
    values = [0.1 + 0.7 * i for i in range(20)]
    assert any(np.mean([v, v, v]) != v for v in values)
    models = {n: {"forget": values} for n in ("audited", "reference-0", "reference-1", "reference-2")}
    found = judge(panel(models), {"forget": names(20)})
    assert found.gap.value == 0 and found.p == 1


def test_without_spread_the_sign_decides() -> None:
    for num, expected in ((3, 0.25), (10, 2.0**-9)):
        models = {"audited": {"forget": [1.0] * num}, "reference-0": {"forget": [0.0] * num}}
        assert judge(panel(models), {"forget": names(num)}).p == expected
    apart = ranked({"audited": ([1.0] * 3, [0.0] * 3), "reference-0": ([0.0] * 3, [0.0] * 3)})
    found = judge(apart, {"forget": names(3), "holdout": names(3, "h")})
    assert found.gap.value == 0.5 and found.p == pytest.approx(2 / 20), "2 of the 20 ways to name three of six"


def test_the_forget_role_is_the_one_that_is_judged() -> None:
    models: dict[str, Values] = {
        "audited": {"retain": [5.0, 6.0], "forget": [1.0, 3.0]},
        "reference-0": {"retain": [0.0, 0.0], "forget": [1.0, 2.5]},
    }
    found = judge(panel(models), {"retain": names(2), "forget": names(2)})
    assert found.gap.value == pytest.approx(0.25)


# -- AUC -----------------------------------------------------------------------------------------------------------


def slow_auc(positives: Any, negatives: Any) -> float:
    won = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    return float(won / len(positives) / len(negatives))


def test_gap_and_error_of_aucs_are_those_of_a_slow_computation() -> None:
    rng = np.random.default_rng(2)
    groups: Any = {"forget": names(16, each=2), "holdout": names(24, "h", each=2)}
    models = {n: (rng.normal(s, 1, 16), rng.normal(0, 1, 24)) for n, s in
              (("audited", 1.0), ("reference-0", 0.0), ("reference-1", 0.1))}  # fmt: skip
    found = judge(ranked(models), groups, resamples=4000)
    own = {n: slow_auc(*sides) for n, sides in models.items()}
    gap = own["audited"] - (own["reference-0"] + own["reference-1"]) / 2
    assert found.gap.value == pytest.approx(gap) and found.models["reference-1"].value == pytest.approx(
        own["reference-1"]
    )

    draws = []
    for _ in range(1500):  # people are drawn with all their texts, the same for every model
        people = [[2 * g + k for g in rng.integers(0, size, size) for k in (0, 1)] for size in (8, 12)]
        values = {n: auc(f[people[0]], h[people[1]]) for n, (f, h) in models.items()}
        draws.append(values["audited"] - (values["reference-0"] + values["reference-1"]) / 2)
    of_models = np.var([own["reference-0"], own["reference-1"]], ddof=1) * 1.5
    error = math.sqrt(np.var(draws, ddof=1) + of_models)
    degrees = error**4 / (np.var(draws, ddof=1) ** 2 / (8 + 12 - 2) + of_models**2 / 1)
    half = found.gap.high - found.gap.value
    assert half == pytest.approx(stats.t.ppf(0.975, degrees) * error, rel=0.08)
    assert found.tpr.keys() == {"0.001", "0.01", "0.1"}


def test_auc_is_judged_on_both_sides() -> None:
    rng = np.random.default_rng(3)
    flat = {f"reference-{k}": (rng.normal(0, 1, 60), rng.normal(0, 1, 60)) for k in range(3)}
    groups: Any = {"forget": names(60), "holdout": names(60, "h")}
    for shift, verdict in ((2.0, LEFT), (-2.0, LESS), (0.0, LIKE)):
        row = judge(ranked({"audited": (rng.normal(shift, 1, 60), rng.normal(0, 1, 60)), **flat}), groups)
        settle([row])
        assert row.verdict == verdict and row.differs == (verdict != LIKE)


def test_auc_needs_two_people_on_each_side() -> None:
    models = {"audited": ([2.0, 3.0], [0.0, 1.0]), "reference-0": ([0.0, 1.0], [0.0, 1.0])}
    found = judge(ranked(models), {"forget": ["p", "p"], "holdout": ["h", "i"]})
    settle([found])
    assert found.gap.value == 0.5 and math.isnan(found.p) and found.verdict == NOT_SHOWN


def test_a_sample_that_one_model_cannot_score_is_left_out_for_all() -> None:
    models = {"audited": ([2.0, 3.0, math.nan], [0.0, 1.0]), "reference-0": ([0.0, 1.0, 9.0], [0.0, 1.0])}
    found = judge(ranked(models), {"forget": names(3), "holdout": names(2, "h")})
    assert found.models["reference-0"].value == 0.5 and found.models["reference-0"].n == 4


# -- many tests ----------------------------------------------------------------------------------------------------


def slow_holm(p_values: Sequence[float]) -> list[float]:
    """max over the tests that are not larger of min(1, how many are not smaller times p)."""
    known = [p for p in p_values if not math.isnan(p)]
    ordered = sorted(known)
    steps = [min(1.0, (len(ordered) - i) * p) for i, p in enumerate(ordered)]
    return [math.nan if math.isnan(p) else max(steps[: ordered.index(p) + 1]) for p in p_values]


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]).size == 0
    rng = np.random.default_rng(4)
    for _ in range(50):
        p = rng.uniform(0, 1, rng.integers(1, 12)) ** 3
        p[rng.uniform(size=len(p)) < 0.2] = math.nan
        assert holm(p.tolist()).tolist() == pytest.approx(slow_holm(p.tolist()), nan_ok=True)


@pytest.mark.parametrize("of_models", [0.0, 0.1])
@pytest.mark.parametrize("references", [2, 4])
def test_one_audit_in_twenty_alarms_falsely_at_most(of_models: float, references: int) -> None:
    """Twenty scores and nothing different: the chance of a single alarm is the level, while subjects differ most."""
    rng = np.random.default_rng(5)
    models = ["audited", *(f"reference-{k}" for k in range(references))]
    alarms = 0
    for _ in range(100):
        rows = []
        for _ in range(20):
            skill = rng.normal(0, 1, 12)  # of a sample, shared by models
            drawn = {n: {"forget": skill + rng.normal(0, of_models) + rng.normal(0, 0.5, 12)} for n in models}
            rows.append(judge(panel(drawn), {"forget": names(12)}, resamples=10))
        settle(rows)
        alarms += any(row.differs for row in rows)
    assert alarms <= 100 * 0.05 + 2 * math.sqrt(100 * 0.05 * 0.95)


def row(family: Any, gap: float, p: float = 1e-9, score: str = "some", half: float = 0.01, **more: Any) -> Judged:
    sides: Any = {"holdout": [0.0]} if family == "membership" else {}
    own = {n: {"forget": [0.0], **sides} for n in ("audited", "reference-0", "reference-1")}
    models = {"audited": Estimate(0.5 + gap), "reference-0": Estimate(0.4), "reference-1": Estimate(0.6)}
    one = replace(panel(own, family, **more), score=score)
    return Judged(one, models, Estimate(gap, gap - half, gap + half, 1), p)


def test_small_differences_are_not_held_against_a_model() -> None:
    rows = [row("membership", 0.04), row("membership", 0.06), row("kept", -0.01), row("kept", -0.03)]
    settle(rows)
    assert [r.verdict for r in rows] == [LIKE, LEFT, LIKE, LESS]


@pytest.mark.parametrize(
    ("family", "two_sided", "against"),
    [
        ("extraction", True, {LEFT, LESS}),
        ("membership", True, {LEFT, LESS}),
        ("membership", False, {LEFT}),
        ("recovery", True, {LEFT}),
        ("kept", True, {LESS}),
    ],
)
def test_what_speaks_against_a_model(family: Any, two_sided: bool, against: set[str]) -> None:
    rows = [row(family, gap, two_sided=two_sided) for gap in (0.3, -0.3)]
    settle(rows)
    assert {r.verdict for r in rows if r.differs} == against


def test_traces_of_the_request_are_declared_one_sided() -> None:
    from expunge.attacks.registry import all_attacks

    assert {n for n, a in all_attacks().items() if not a.two_sided} == {"update_loss", "update_logit", "weight-delta"}


def test_worst_is_what_differs_then_the_surest_then_the_largest() -> None:
    rows = [
        row("extraction", 0.0, 1.0, "equal", half=0.0),
        row("extraction", 0.2, 0.5, "unsure", half=0.3),
        row("recovery", -0.9, 1e-12, "less, which is no harm here"),
        row("extraction", 0.2, 1e-4, "sure"),
        row("extraction", 0.3, 1e-4, "as sure and larger"),
    ]
    settle(rows)
    assert worst(rows) is rows[4]
    assert worst(rows[:2]) is rows[1], "no gap and no spread is the best that can be, not the worst"
    assert worst([]) is None and worst([row("extraction", 0.2, math.nan)]) is None


# -- the vector ----------------------------------------------------------------------------------------------------


def counted(under: int, over: int, auditable: int = 6) -> dict[str, Any]:
    return {"counts": {"under-unlearned": under, "over-unlearned": over}, "auditable": auditable, "n": 8}


def test_tile_of_a_failed_axis() -> None:
    rows = [row("extraction", 0.3, score="verbatim"), row("extraction", 0.001, 0.9), row("membership", 0.4)]
    settle(rows)
    found = tile("effectiveness", rows, counted(2, 1))
    assert found["verdict"] == "failed" and found["tests"] == 2 and found["worst"]["score"] == "verbatim"
    assert found["sentence"] == (
        "Of 6 auditable samples 2 are under-unlearned and 1 over-unlearned; 1 of 2 scores speaks against the model, "
        "most clearly verbatim (mean 0.8 against 0.5: more is left)."
    )
    privacy = tile("privacy", rows, counted(2, 1))
    assert privacy["verdict"] == "failed" and "AUC 0.9 against 0.5" in privacy["sentence"]
    assert "auditable" not in privacy["sentence"]


def test_tile_of_a_passed_axis_does_not_deny_harmless_differences() -> None:
    rows = [row("recovery", -0.9), row("recovery", 0.0, 0.7)]
    settle(rows)
    assert rows[0].verdict == LESS
    found = tile("robustness", rows, None)
    assert found["verdict"] == "passed"
    assert found["sentence"] == "None of 2 scores speaks against the model after correction for all tests."


def test_tiles_say_why_nothing_is_shown() -> None:
    bare = Judged(panel({"audited": {"forget": [1.0]}}), {"audited": Estimate(1.0)}, Estimate(math.nan))
    single = judge(panel({"audited": {"forget": [1.0]}, "reference-0": {"forget": [0.0]}}), {"forget": names(1)})
    cases = {
        "no retrained model to compare with": ([bare], None),
        "no attack measured it": ([], None),
        "too few samples": ([single], None),
        "none of 8 samples is auditable": ([], counted(0, 0, 0)),
    }
    for words, (rows, completeness) in cases.items():
        found = tile("effectiveness", rows, completeness)
        assert found["verdict"] == NOT_SHOWN and found["worst"] is None and words in found["sentence"].lower()
    assert "Completeness was not judged" in tile("effectiveness", [bare], None)["sentence"]


def test_completeness_alone_decides_effectiveness() -> None:
    assert [tile("effectiveness", [], counted(*c))["verdict"] for c in ((0, 0), (1, 0), (0, 1))] == [
        "passed", "failed", "failed"
    ]  # fmt: skip
    assert all(tile(axis, [], counted(1, 1))["verdict"] == NOT_SHOWN for axis in AXES if axis != "effectiveness")


def test_a_single_reference_is_said() -> None:
    rng = np.random.default_rng(6)
    own, other = rng.normal(0, 1, (2, 12))
    one = judge(panel({"audited": {"forget": own}, "reference-0": {"forget": other}}), {"forget": names(12)})
    settle([one])
    assert "one reference only" in tile("effectiveness", [one], None)["sentence"]


def test_record_has_no_nan() -> None:
    rng = np.random.default_rng(7)
    found = judge(ranked({"audited": (rng.normal(0, 1, 5), rng.normal(0, 1, 5))}),
                  {"forget": names(5), "holdout": names(5, "h")})  # fmt: skip
    record = found.record()
    assert record["p"] is None and record["gap"]["value"] is None and record["statistic"] == "auc"
    assert record["axis"] == "privacy" and record["tpr"]["0.01"]["n"] == 10
