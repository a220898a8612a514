"""Ranks over seeds against hand-computed ones."""

from __future__ import annotations

import math

import pytest
from report_synthetic import results

from expunge.report.leaderboard import AXES, axes_of, leaderboard, rank_table
from expunge.report.markdown import rank_lines
from expunge.report.schema import Results, Row, parse_results


def row(method: str, kind: str, seed: int, **metrics: float) -> Row:
    named = {k.replace("__", "."): {"value": v} for k, v in metrics.items()}
    return Row.model_validate(
        {"model": f"{method}/{seed}", "method": method, "kind": kind, "seed": seed, "metrics": named}
    )


def study(methods: dict[str, list[dict[str, float]]], seeds: int) -> Results:
    shared = {"prob__retain": 0.9, "prob__utility": 0.5}
    rows = [row("reference", "reference", 0, mia__loss__auc=0.5, relearn__prob=0.1, **shared)]
    rows += [row("original", "original", s, mia__loss__auc=1.0, relearn__prob=0.9, **shared) for s in range(seeds)]
    for name, values in methods.items():
        rows += [row(name, "method", s, **{**shared, **v}) for s, v in enumerate(values)]
    return Results(schema="expunge.results/1", rows=rows, references=1)  # type: ignore[call-arg]


def test_distances_are_two_sided_and_relative_to_the_original() -> None:
    found = study(
        {"m": [{"mia__loss__auc": 0.4, "relearn__prob": 0.5, "tv__gap_closed": 0.7, "prob__retain": 0.99}]}, 1
    )
    original, mine = found.rows[1], found.rows[2]
    target = {"mia.loss.auc": 0.5, "relearn.prob": 0.1, "prob.retain": 0.9, "prob.utility": 0.5}
    axes = axes_of(mine, original, target)
    assert axes["membership"] == pytest.approx(0.2)  # |.4 − .5| / |1 − .5|
    assert axes["robustness"] == pytest.approx(0.5)
    assert axes["distribution"] == pytest.approx(0.3)
    assert axes["utility"] == pytest.approx(0.1)  # a tenth above the reference is a distance too
    assert math.isnan(axes["behaviour"])


def test_ranks_are_taken_within_seeds_and_averaged() -> None:
    near, far = {"mia__loss__auc": 0.5, "relearn__prob": 0.1}, {"mia__loss__auc": 1.0, "relearn__prob": 0.9}
    found = leaderboard(study({"a": [near, near, near], "b": [far, far, far], "c": [near, far, near]}, 3))
    by_name = {s.method: s for s in found}
    assert [s.method for s in found] == ["a", "c", "b"]
    # Axes with numbers: membership, robustness, utility (all equal: rank 2). Seed 0: a and c share 1.5, b has 3.
    assert by_name["a"].rank.value == pytest.approx(((1.5 + 1.5 + 2) + (1 + 1 + 2) + (1.5 + 1.5 + 2)) / 9)
    assert by_name["b"].rank.value == pytest.approx(((3 + 3 + 2) + (2.5 + 2.5 + 2) + (3 + 3 + 2)) / 9)
    assert by_name["a"].best and not by_name["b"].best
    assert by_name["a"].axes["membership"].seeds == 3 and by_name["a"].axes["behaviour"].value is None


def test_no_rank_is_better_than_the_first_and_no_distance_below_zero() -> None:
    """Two seeds, once first and once last of two: Student's interval would reach from -4.9 to 7.9."""
    near, far = {"mia__loss__auc": 0.5, "relearn__prob": 0.1}, {"mia__loss__auc": 1.0, "relearn__prob": 0.9}
    for standing in leaderboard(study({"a": [near, far], "b": [far, near]}, 2)):
        assert (standing.rank.low, standing.rank.value, standing.rank.high) == (1.0, 1.5, 2.0)
        apart = standing.axes["membership"]
        assert (apart.low, apart.value) == (0.0, 0.5) and apart.high is not None and apart.high > 6


def test_what_was_not_measured_comes_last_and_no_reference_gives_no_table() -> None:
    found = study({"a": [{"mia__loss__auc": 0.9}], "b": [{}]}, 1)
    assert [s.method for s in leaderboard(found)] == ["a", "b"]
    assert leaderboard(found.model_copy(update={"rows": found.rows[1:]})) == []
    assert rank_lines(found.model_copy(update={"rows": []})) == []


def test_tables_of_a_whole_study() -> None:
    whole = parse_results(results())
    table = rank_table(whole)
    assert table is not None and [c.key for c in table.columns] == ["rank", *AXES]
    assert all(len(line.cells) == len(table.columns) for line in table.lines)
    lines = rank_lines(whole)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
