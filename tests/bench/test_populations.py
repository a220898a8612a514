"""A study over seeds, judged as a population: rows as the study writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from expunge.bench.populations import population_metrics
from expunge.bench.results import summaries
from expunge.metrics.population import klom, margins, u_lira
from expunge.report.catalogue import understand

SAMPLES = 12


def rows(kind: str, count: int, shift: float, tokens: int = 1) -> list[dict[str, Any]]:
    """Losses around 2 + shift nats per forget sample; accuracies .9 and .8."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng([seed, len(kind)])
        samples = [
            {"id": f"s{i}", "subject": f"s{i}", "role": "forget", "tokens": tokens, "loss": float(loss)}
            for i, loss in enumerate(np.exp(rng.normal(np.log(2) + shift, 0.2, SAMPLES)))
        ]
        samples.append({"id": "r", "subject": "r", "role": "retain", "tokens": 1, "loss": 0.1})
        accuracy = {f"accuracy.{role}": {"value": v} for role, v in (("retain", 0.9), ("holdout", 0.8))}
        metrics = {name: {**m, "n": 5, "definition": "accuracy/1"} for name, m in accuracy.items()}
        found.append(
            {"kind": kind, "method": kind, "study": "main", "seed": seed, "samples": samples, "metrics": metrics}
        )
    return found


def table(of: list[dict[str, Any]]) -> np.ndarray:
    return margins([[-s["loss"] for s in row["samples"] if s["role"] == "forget"] for row in of])


def test_records_are_the_metrics_of_the_margins() -> None:
    own, theirs = rows("method", 21, -1.0), rows("reference", 20, 0.0)
    found = population_metrics(own, theirs)
    assert found["klom"]["value"] == pytest.approx(klom(table(own), table(theirs)).estimate.value)
    assert found["u_lira"]["value"] == pytest.approx(u_lira(table(own), table(theirs)).estimate.value)
    assert found["u_lira"]["value"] > 0.9 and found["klom"]["n"] == SAMPLES and found["klom"]["seeds"] == 21
    assert found["neurips_score"]["value"] == pytest.approx(found["neurips_forget"]["value"])  # accurate as retrained
    assert found["klom"]["note"] == "21 models against 20 retrained ones"
    for name in found:
        assert understand(name).formula, name


def test_retrained_rows_under_another_name_are_not_told_apart() -> None:
    found = population_metrics(rows("method", 40, 0.0), rows("reference", 40, 0.0))
    assert abs(found["u_lira"]["value"] - 0.5) < 0.08
    assert found["klom"]["value"] < found["klom.floor"]["value"]


def test_too_few_models_texts_and_controls_have_none() -> None:
    enough = rows("reference", 4, 0.0)
    assert population_metrics(rows("method", 3, 0.0), enough) == {}
    assert population_metrics(rows("method", 4, 0.0), enough[:3]) == {}
    assert population_metrics(rows("method", 4, 0.0, tokens=7), enough) == {}
    assert population_metrics(rows("base", 4, 0.0), enough) == {}


def test_the_summary_of_a_study_has_them() -> None:
    lines = {line["method"]: line["metrics"] for line in summaries([*rows("reference", 4, 0), *rows("method", 4, 1)])}
    assert {"u_lira", "u_mia_population"} <= set(lines["method"])
    assert "u_lira" not in lines["reference"]
    assert not {"klom", "neurips_forget"} & set(lines["method"])  # four models fill no histogram
    assert lines["method"]["accuracy.retain"]["value"] == pytest.approx(0.9)
