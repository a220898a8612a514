"""Distances, gap closed, ranking, warnings, labels: against numbers worked out by hand."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import report_synthetic as synthetic

from expunge.drawing import label_points, new_figure, spread, style
from expunge.report.catalogue import understand
from expunge.report.charts import pareto
from expunge.report.checks import warnings
from expunge.report.samples import SampleRecord, pack
from expunge.report.schema import Measure, parse_results
from expunge.report.view import View, distance, gap_closed, summarise
from expunge.report.wording import headline, number, paragraph


def view_of(rows: list[dict[str, Any]], **more: Any) -> View:
    return View(parse_results({"schema": "expunge.results/1", "rows": rows, **more}), SampleRecord(present=True))


def row(method: str, kind: str, seed: int = 0, **metrics: float) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in metrics.items()}
    return {"model": f"{method}/{seed}", "method": method, "kind": kind, "seed": seed, "metrics": named}


def test_distance_counts_both_sides() -> None:
    metric, reference = understand("prob.forget"), Measure(value=0.5)
    above = distance(metric, Measure(value=0.7, low=0.6, high=0.8), reference)
    below = distance(metric, Measure(value=0.3, low=0.2, high=0.4), reference)
    astride = distance(metric, Measure(value=0.5, low=0.4, high=0.7), reference)
    assert above is not None and below is not None and astride is not None
    assert (above.value, above.low, above.high) == pytest.approx((0.2, 0.1, 0.3))
    assert (below.value, below.low, below.high) == pytest.approx((0.2, 0.1, 0.3))
    assert (astride.value, astride.low, astride.high) == pytest.approx((0.0, 0.0, 0.2))
    assert distance(metric, Measure(value=0.5), None) is None
    assert distance(understand("model_utility"), Measure(value=0.5), reference) is None


def test_gap_closed_by_hand() -> None:
    gap = gap_closed(0.8, Measure(value=0.2, low=0.1, high=0.4))
    assert gap is not None
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.75, 0.5, 0.875))
    assert gap_closed(0.0, Measure(value=0.2)) is None
    floored = gap_closed(0.8, Measure(value=0.2, low=0.1, high=0.4), floor=0.2)
    assert floored is not None
    assert (floored.value, floored.low, floored.high) == pytest.approx((1.0, 0.4 / 0.6, 0.7 / 0.6))
    assert gap_closed(0.3, Measure(value=0.2), floor=0.3) is None
    further = gap_closed(0.5, Measure(value=1.0))
    assert further is not None and further.value == pytest.approx(-1.0)


def test_over_forgetting_does_not_win() -> None:
    view = view_of(
        [
            row("original", "original", prob__forget=0.9),
            row("reference", "reference", prob__forget=0.4),
            row("collapsed", "method", prob__forget=0.0),
            row("honest", "method", prob__forget=0.5),
        ]
    )
    assert [entry.method for entry in view.ranked] == ["honest", "collapsed"]
    assert headline(view).startswith("Closest to retraining on the forget set: honest (probability gap closed 80 %")
    assert "remembers more than retrained" in paragraph(view, view.ranked[0])
    assert "knows less than retrained" in paragraph(view, view.ranked[1])


def test_an_interval_that_reaches_the_retrained_model_does_not_make_a_method_the_same() -> None:
    rows = [row("original", "original", prob__forget=0.9), row("reference", "reference", prob__forget=0.1)]
    rows += [row("wide", "method", seed, prob__forget=value) for seed, value in ((0, 0.0), (1, 0.8))]
    view = view_of(rows)
    said = paragraph(view, view.ranked[0])
    assert "not told apart from retrained" in said and "as retrained" not in said


def test_a_method_further_away_than_the_original_is_not_called_close() -> None:
    rows = [row("original", "original", prob__forget=0.6), row("reference", "reference", prob__forget=0.5)]
    view = view_of([*rows, row("wild", "method", prob__forget=0.1)])
    assert headline(view).startswith("No method came closer to retraining") and "wild" in headline(view)


def test_the_runs_own_share_of_the_gap_is_used_when_all_have_it() -> None:
    rows = [row("original", "original", tv__forget=0.8), row("reference", "reference", tv__forget=0.2)]
    rows += [row("a", "method", tv__forget=0.5, tv__gap_closed=0.51), row("b", "method", tv__forget=0.5)]
    view = view_of(rows)
    gaps = [view.gap(entry, "tv.forget") for entry in view.ranked]
    assert [g.value for g in gaps if g] == pytest.approx([0.5, 0.5])
    rows[-1]["metrics"]["tv.gap_closed"] = 0.53
    view = view_of(rows)
    gaps = [view.gap(entry, "tv.forget") for entry in view.ranked]
    assert [g.value for g in gaps if g] == pytest.approx([0.53, 0.51])


def test_summary_is_made_from_rows_when_missing() -> None:
    made = summarise(
        view_of([row("a", "method", seed, x=value) for seed, value in enumerate((1.0, 2.0, 3.0))]).results.rows
    )
    measure = made[0].metrics["x"]
    assert (measure.value, measure.seed_count) == (2.0, 3)
    assert measure.low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)  # t with 2 degrees of freedom


def test_identical_rows_are_reported_and_identity_is_not() -> None:
    same = {"prob__forget": 0.5, "model_utility": 0.6, "rouge__forget": 0.7}
    other = {"prob__forget": 0.9, "model_utility": 0.61, "rouge__forget": 0.95}
    rows = [row("a", "method", **same), row("b", "method", **same)]
    rows += [row("original", "original", **other), row("identity", "identity", **other)]
    found = [text for text in warnings(view_of(rows)) if text.startswith("identical rows")]
    assert len(found) == 1 and "a (seed 0) and b (seed 0)" in found[0]
    rows.append(row("lazy", "method", **other))
    found = [text for text in warnings(view_of(rows)) if "lazy" in text]
    assert found == [
        "identical rows: original (seed 0) and identity (seed 0) and lazy (seed 0) agree in all 3 metrics; "
        "the method changed nothing that was measured"
    ]
    rows[1]["metrics"]["prob.forget"] = 0.5000001
    assert not any("a (seed 0)" in text for text in warnings(view_of(rows)) if text.startswith("identical"))


def test_warnings_of_a_bare_run() -> None:
    text = "\n".join(warnings(view_of([row("a", "method", prob__forget=0.2)])))
    assert "no retrained model was available" in text
    assert "the original model was not measured" in text
    assert "the base was not measured" in text
    assert "one seed only" in text


def test_a_summary_made_from_rows_is_cut_to_what_is_possible() -> None:
    rows = [row("npo", "method", seed, face_centroid__forget=v, loss__forget=v) for seed, v in ((0, 0.0), (1, 1.0))]
    (made,) = summarise(view_of(rows).results.rows)
    share, loss = made.metrics["face_centroid.forget"], made.metrics["loss.forget"]
    assert (share.low, share.high) == (0.0, 1.0)
    assert loss.low == 0.0 and loss.high is not None and loss.high > 6


def test_rows_that_lack_the_same_are_one_warning() -> None:
    rows = [
        row(m, k, seed, prob__forget=0.5) for m, k in (("original", "original"), ("npo", "method")) for seed in (0, 1)
    ]
    for entry in rows:
        entry["metrics"]["verdict.adequate"] = None
    rows[-1]["metrics"]["zrf.forget"] = None
    said = [w for w in warnings(view_of(rows)) if "no value for" in w]
    assert said == [
        "original (seed 0), original (seed 1), npo (seed 0): no value for verdict.adequate (could not be computed)",
        "npo (seed 1): no value for verdict.adequate, zrf.forget (could not be computed)",
    ]


def test_a_control_row_that_wins_is_said() -> None:
    rows = [row("original", "original", tv__forget=0.8), row("reference", "reference", tv__forget=0.05)]
    rows += [row("a", "method", tv__forget=0.5), row("random-edit", "random-edit", tv__forget=0.4)]
    assert "the control row random-edit is as close to retraining as the best method" in warnings(view_of(rows))
    rows[-1]["metrics"]["tv.forget"] = 0.75
    assert not any("control row" in text for text in warnings(view_of(rows)))


def test_nothing_learnt_means_nothing_to_forget() -> None:
    rows = [row(kind, kind, prob__forget=0.3) for kind in ("original", "reference")]
    view = view_of([*rows, row("a", "method", prob__forget=0.2)])
    assert any("nothing shows that the forget set had been learnt" in text for text in warnings(view))
    assert "cannot be said" in headline(view)


def test_failed_and_partial_methods_are_said() -> None:
    content = synthetic.results()
    text = "\n".join(warnings(View(parse_results(content))))
    assert "flat (seed 0) failed: training diverged at step 12" in text
    assert "identical rows: npo (seed 1) and simnpo (seed 1)" in text
    assert "flat has 1 of 3 seeds" in text


def test_pareto_against_the_definition() -> None:
    rng = random.Random(0)
    points = [(rng.random(), rng.random()) for _ in range(60)]
    slow = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)]
    assert pareto(points) == sorted(slow)


def test_spread_keeps_gap_order_and_limits() -> None:
    rng = random.Random(1)
    for _ in range(50):
        wanted = [rng.uniform(0, 10) for _ in range(8)]
        out = spread(wanted, 1.0, 0.0, 10.0)
        ordered = sorted(out)
        assert all(b - a >= 1.0 - 1e-9 for a, b in itertools.pairwise(ordered))
        assert ordered[0] >= -1e-9 and ordered[-1] <= 10 + 1e-9
        assert sorted(range(8), key=lambda i: wanted[i]) == sorted(range(8), key=lambda i: out[i])


def test_labels_of_a_crowded_scatter_do_not_overlap() -> None:
    rng = random.Random(3)
    points = [(rng.gauss(0.5, 0.12), rng.gauss(0.5, 0.12)) for _ in range(16)]
    with style():
        _, (axes,) = new_figure(4.0)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.plot(*zip(*points, strict=True), "o")
        boxes = label_points(axes, points, [f"method-{i}" for i in range(16)], ["#1b1f24"] * 16)
    assert len(boxes) == 16
    for one, other in itertools.combinations(boxes, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert width <= 0 or height <= 0


def test_points_on_one_another_share_a_label() -> None:
    with style():
        _, (axes,) = new_figure(3.0)
        axes.plot([0, 1], [0, 1], "o")
        boxes = label_points(axes, [(0, 0), (0, 0), (1, 1)], ["original", "identity", "other"], ["#1b1f24"] * 3)
        texts = {text.get_text() for text in axes.texts}
    assert len(boxes) == 2
    assert texts == {"original, identity", "other"}


def test_pack_keeps_forget_samples_when_it_must_choose() -> None:
    rows = [{"id": i, "role": "retain", "model": "a", "method": "a", "seed": 0} for i in range(20)]
    rows += [{"id": i, "role": "forget", "model": "a", "method": "a", "verdict": "adequate"} for i in range(6)]
    rows += [{"id": i, "role": "forget", "model": "a", "method": "a", "verdict": "under-unlearned"} for i in range(4)]
    packed = pack(rows, limit=5)
    assert packed["total"] == 30 and len(packed["rows"]) == 5
    assert [r[2] for r in packed["rows"]].count("under-unlearned") == 4


@pytest.mark.parametrize(
    ("name", "group", "ideal"),
    [
        ("prob.forget", "forgetting", "reference"),
        ("tv.forget", "forgetting", "zero"),
        ("loss.retain", "retention", "low"),
        ("perplexity.utility", "retention", "low"),
        ("mia.min_k.auc", "privacy", "reference"),
        ("relearn.loss_ratio", "robustness", "reference"),
        ("quant4.prob.forget", "robustness", "reference"),
        ("quant4.retain_ratio", "robustness", "high"),
        ("quant4.mia.loss.gap", "robustness", "zero"),
        ("mia.zlib.gap", "privacy", "zero"),
        ("rouge_l.forget", "forgetting", "reference"),
        ("something.new", "other", None),
        ("something.forget", "forgetting", "reference"),
    ],
)
def test_metric_names_are_understood(name: str, group: str, ideal: str | None) -> None:
    assert (understand(name).group, understand(name).ideal) == (group, ideal)


def test_numbers_read_well() -> None:
    assert [number(v) for v in (0.5, 5.0, 55.5, 555.5, 5555.0, 55555.0, -0.25, 0.00123, 3.1e15, None)] == [
        *("0.500", "5.00", "55.5", "556", "5555", "55 555", "−0.250", "0.00123", "3.1e+15", "–"),
    ]
