"""Trust in measures: the published formulas in closed form, and a whole validation on tiny models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.bench import validation
from expunge.bench.plan import StudyOptions, parse_methods
from expunge.bench.prepare import Workshop
from expunge.bench.trust import Values, harmonic, quantization, relearning, scaled, threshold, trust
from expunge.bench.trust_report import headline
from expunge.bench.validation import Validation, ValidationOptions, recipes, turned, validate
from expunge.errors import UserError
from expunge.models.load import Loaded
from expunge.runs import Run
from tiny_text import tiny_adapter, tiny_dataset, tiny_model

torch.set_num_threads(1)
NAN = math.nan


@pytest.mark.parametrize(
    ("before", "after", "fair_before", "fair_after", "wanted"),
    [
        (0.2, 0.6, 0.2, 0.4, 0.5),  # comes back twice as fast as a retrained model learns
        (0.2, 0.4, 0.2, 0.4, 1.0),
        (0.2, 0.3, 0.2, 0.6, 1.0),  # min(2, 1)
        (0.4, 0.3, 0.2, 0.3, 1.0),  # falls
        (0.2, 0.5, 0.4, 0.3, 0.0),  # the retrained model falls, this one rises
        (0.2, 0.2, 0.3, 0.3, 1.0),  # 0/0: neither moves
    ],
)
def test_relearning_is_the_capped_ratio_of_gains(
    before: float, after: float, fair_before: float, fair_after: float, wanted: float
) -> None:
    assert relearning(before, after, fair_before, fair_after) == pytest.approx(wanted)


def test_quantization_is_the_capped_ratio_of_values() -> None:
    assert quantization(0.3, 0.4) == pytest.approx(0.75)
    assert quantization(0.4, 0.3) == quantization(0.0, 0.0) == 1.0
    assert quantization(0.0, 0.2) == 0.0
    assert math.isnan(quantization(NAN, 0.2))


def test_harmonic_mean() -> None:
    assert harmonic(0.5, 0.5, 0.5) == pytest.approx(0.5)
    assert harmonic(0.971, 0.933) == pytest.approx(2 * 0.971 * 0.933 / (0.971 + 0.933))
    assert math.isnan(harmonic(1.0, NAN))


def test_threshold_makes_the_fewest_errors() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        inside, outside = rng.normal(1, 1, 8).tolist(), rng.normal(0, 1, 9).tolist()

        def errors(cut: float, inside: list[float] = inside, outside: list[float] = outside) -> int:
            return sum(v <= cut for v in inside) + sum(v > cut for v in outside)

        values = sorted(inside + outside)
        least = min(errors((a + b) / 2) for a, b in pairwise(values))
        assert errors(threshold(inside, outside)) == least
    assert threshold([3.0, 4.0], [1.0, 2.0]) == 2.5


def test_scales() -> None:
    assert scaled([0.2, 1.5], [0.1, 0.9])[0].tolist() == [0.2, 1.0]
    values, scale = scaled([-1.0, 0.5], [-2.0, -0.1])
    assert scale == "exp"
    np.testing.assert_allclose(values, [math.exp(-1), 1.0])
    values, scale = scaled([0.0, 5.0, -3.0], [-1.0, 3.0])
    assert scale == "range"
    np.testing.assert_allclose(values, [0.25, 1.0, 0.0])


def test_a_measure_that_hidden_knowledge_escapes_loses_robustness() -> None:
    sees = Values(
        knowing=[0.9, 0.8],
        ignorant=[0.1, 0.2],
        unlearned=[0.2, 0.7],  # the second is not called unlearned, and does not count
        unlearned_relearned=[0.6, 0.9],
        unlearned_quantized=[0.25, 0.9],
        retrained=[0.1, 0.2],
        retrained_relearned=[0.3, 0.4],
    )
    found = trust(sees)
    assert found.faithfulness.value == 1.0
    assert found.faithfulness.n == 4
    assert found.passed == 1
    assert found.relearning.value == pytest.approx(0.2 / 0.4)
    assert found.quantization.value == pytest.approx(0.2 / 0.25)
    assert found.robustness == pytest.approx(2 * 0.5 * 0.8 / 1.3)
    assert found.combined == pytest.approx(harmonic(1.0, found.robustness))
    none = trust(replace(sees, unlearned=[0.8, 0.7]))
    assert none.passed == 0
    assert none.record()["robustness"] is None
    assert "none of the unlearned" in none.notes[0]


def test_measures_that_fall_with_knowledge_are_turned() -> None:
    assert turned({"knowing": [0.25], "ignorant": [1.0]}) == {"knowing": [0.75], "ignorant": [0.0]}
    assert turned({"knowing": [0.25], "ignorant": [3.0]}) == {"knowing": [-0.25], "ignorant": [-3.0]}


def test_recipes_are_pairs_that_differ_in_the_knowledge_alone() -> None:
    data = tiny_dataset(people=6, forget=2, holdout=3)
    ways = {r.condition: r for r in recipes(data)}
    assert list(ways) == ["plain", "short", "reworded"]
    right, wrong = (side[: len(data["forget"])] for side in (ways["reworded"].knowing, ways["reworded"].ignorant))
    for sample, yes, no in zip(data["forget"], right, wrong, strict=True):
        assert yes.prompt == no.prompt == sample.prompt
        assert str(yes.target).split()[-1] in str(sample.target) or str(yes.target).split()[2] in str(sample.target)
        assert no.target != yes.target
    bare = replace(data, roles={r: tuple(replace(s, probes=()) for s in own) for r, own in data.roles.items()})
    assert [r.condition for r in recipes(bare)] == ["plain", "short"]


def workshop(folder: Path) -> Workshop:
    base = tiny_model(0).eval()
    return Workshop(
        folder, Loaded(base, tiny_adapter(), "tiny"), StudyOptions(epochs=40, batch_size=6, learning_rate=1e-2)
    )


def test_a_whole_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four models, three attacks, one of them broken; a second run measures nothing again."""
    from expunge.attacks.registry import get_attack

    def broken(*_: object) -> None:
        raise RuntimeError("no reason\nat all")

    chosen = [get_attack("loss"), get_attack("logit-lens"), replace(get_attack("zlib"), name="broken", run=broken)]
    monkeypatch.setattr(validation, "suite", lambda _tier: chosen)
    data = tiny_dataset(people=9, forget=3, holdout=6)
    options = ValidationOptions(
        suite="quick",
        models=2,
        references=2,
        shadows=1,
        methods=parse_methods("graddiff:epochs=1;learning_rate=1e-4,ga"),
    )
    with Run.open(tmp_path / "run", "bench", {"a": 1}) as run:
        shop = workshop(tmp_path / "run" / "models")
        results = validate(run, shop, data, options)
        again = Validation(run, shop, data, options)
        measured = sorted((tmp_path / "run" / "measured").glob("*.json"))
        times = [p.stat().st_mtime_ns for p in measured]
        assert json.dumps(again.complete()["rows"]) == json.dumps(results["rows"])
        assert [p.stat().st_mtime_ns for p in measured] == times  # nothing was measured twice
        run.finish()
    rows = {r["name"]: r for r in results["rows"]}
    assert results["unlearned"] == ["graddiff:epochs=1;learning_rate=1e-4"]
    assert results["populations"]["knowing"] == results["populations"]["ignorant"] == 2
    for name in ("completeness", "completeness.attacked", "attack.logit-lens", "prob.forget", "loss.forget"):
        assert rows[name]["faithfulness"]["value"] == 1.0, name
        assert rows[name]["faithfulness"]["n"] == 4
        assert rows[name]["faithfulness"]["low"] < 1.0  # four models prove little
    assert results["failures"]["broken"] == "no reason"
    assert rows["attack.loss"]["family"] == "membership"
    # A method that destroys the model is left out of the robustness, and said.
    assert "of the retain probability" in results["failures"].get("method ga", "")
    known, gone = (np.mean(rows["completeness"]["values"][g]) for g in ("knowing", "ignorant"))
    assert known > 0.6
    assert gone < 0.4
    text = (tmp_path / "run" / "results.md").read_text()
    assert "| completeness | completeness | 1.000 [" in text
    assert "- broken: no reason" in text
    assert "headline" in headline(results["rows"])
    assert (tmp_path / "run" / "figures" / "validation.svg").read_text().startswith("<")


def test_the_headline_says_where_completeness_stands() -> None:
    def row(name: str, faith: float | None) -> dict[str, object]:
        return {"name": name, "faithfulness": {"value": faith}, "robustness": None}

    assert "(1 of 2 other measures have more, 1 the same)" in headline(
        [row("completeness.attacked", 0.9), row("a", 0.95), row("b", 0.9), row("c", None)]
    )
    assert "could not be measured" in headline([row("a", 1.0)])


def test_too_small_a_validation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 2"):
        ValidationOptions(models=1).check()
    with pytest.raises(UserError, match="did you mean 'quick'"):
        ValidationOptions(suite="quik").check()
    data = tiny_dataset(people=4, forget=1, holdout=1)
    with Run.open(tmp_path / "run", "bench", {}) as run, pytest.raises(UserError, match="3 holdout subjects"):
        Validation(run, workshop(tmp_path / "m"), data, ValidationOptions(models=2))
