"""What a validation of the measures leaves: results.json, results.md and a figure; see :mod:`expunge.bench.trust`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.runs import Run


def write(run: Run, results: Mapping[str, Any]) -> None:
    """results.json, results.md and figures/validation.svg."""
    run.write_json("results.json", results)
    run.write_text("figures/validation.svg", draw(results["rows"]))
    run.write_text("results.md", markdown(results))


HEADLINE = "completeness.attacked"  # completeness in its worst view, what an audit answers with


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the headline completeness stands among all measures, in one sentence."""
    own = next((r for r in rows if r["name"] == HEADLINE), None)
    if own is None or own["faithfulness"]["value"] is None:
        return "The completeness could not be measured."
    faith = [r["faithfulness"]["value"] for r in rows if r["faithfulness"]["value"] is not None]
    better = sum(f > own["faithfulness"]["value"] for f in faith)
    equal = sum(f == own["faithfulness"]["value"] for f in faith) - 1
    robust = "not measured" if own["robustness"] is None else f"{own['robustness']:.3f}"
    return (
        f"The headline completeness has a faithfulness of {own['faithfulness']['value']:.3f} "
        f"({better} of {len(faith) - 1} other measures have more, {equal} the same) and a robustness of {robust}."
    )


def markdown(results: Mapping[str, Any]) -> str:
    """The table, best combined value first, with the definitions and what failed."""
    sizes = results["populations"]
    lines = [
        "# Validation of the measures",
        "",
        headline(results["rows"]),
        "",
        f"{sizes['knowing']} models with and {sizes['ignorant']} without the knowledge, conditions "
        f"{', '.join(results['conditions'])}; robustness on models unlearned by "
        f"{', '.join(results['unlearned']) or 'no method (none kept its utility)'}.",
        "",
        "| measure | kind | faithfulness | relearning | quantization | robustness | combined | passed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        parts = [_cell(row[k]) for k in ("faithfulness", "relearning", "quantization")]
        parts += ["–" if row[k] is None else f"{row[k]:.3f}" for k in ("robustness", "combined")]
        lines.append(f"| {row['name']} | {row['kind']} | {' | '.join(parts)} | {row['passed']} |")
    lines += [
        "",
        "Faithfulness: AUC of the measure, models with the knowledge above models without, with its 95 % interval "
        "over models. Relearning: R = min((m_ret^a − m_ret^b) / (m_unl^a − m_unl^b), 1), one epoch on the forget "
        "set. Quantization: Q = min(m_unl^b / m_unl^a, 1), 4 bits. b before, a after, higher m = more knowledge. "
        "Robustness: harmonic mean of R and Q over the unlearned models that kept their utility and that the measure "
        "itself calls unlearned (passed); a value that cannot move, because it is at its floor, is robust by "
        "definition. Combined: harmonic mean of faithfulness and robustness (OpenUnlearning, arXiv:2506.12618).",
    ]
    if results["failures"]:
        lines += ["", "Not measured:", "", *(f"- {name}: {why}" for name, why in results["failures"].items())]
    return "\n".join([*lines, ""])


def _cell(record: Mapping[str, Any]) -> str:
    if record["value"] is None:
        return "–"
    ends = [record["low"], record["high"]]
    return f"{record['value']:.3f}" + ("" if None in ends else f" [{ends[0]:.2f}, {ends[1]:.2f}]")


def draw(rows: Sequence[Mapping[str, Any]]) -> str:
    """Faithfulness against robustness, as SVG: up and right is better."""
    from expunge.drawing import INK, look, new_figure, style, to_svg

    kinds = ("completeness", "attack", "metric")
    with style():
        figure, (axes,) = new_figure(3.6)
        for place, kind in enumerate(kinds):
            own = [r for r in rows if r["kind"] == kind and r["robustness"] is not None]
            points = [(r["robustness"], r["faithfulness"]["value"]) for r in own]
            points = [(x, y) for x, y in points if y is not None]
            if points:
                mark = look(place)
                axes.plot(*zip(*points, strict=True), mark["marker"], color=mark["color"], markersize=5, label=kind)
        for row in rows:
            if row["name"] == "completeness" and row["robustness"] is not None:
                at = (row["robustness"], row["faithfulness"]["value"])
                axes.annotate("headline", at, (-6, -12), textcoords="offset points", color=INK, ha="right")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        axes.axhline(0.5, linewidth=0.8, linestyle=":", color=INK)
        axes.set_xlabel("robustness: harmonic mean over relearning and quantization")
        axes.set_ylabel("faithfulness (dotted: chance)")
        axes.legend(loc="lower left", fontsize=7)
        return to_svg(figure, "validation")
