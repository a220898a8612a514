"""The table of metrics says what every metric is."""

from __future__ import annotations

import json

import pytest

import expunge.attacks.membership
from expunge.errors import UserError
from expunge.metrics.registry import all_metrics, get_metric, metric

EXPECTED = {
    "average_gap", "clear_forget", "clear_forget_quality", "clear_js_published", "clear_real", "clear_retain",
    "exact_memorization", "extraction_strength", "face_centroid", "face_recognition",
    "forget_quality", "kfr", "kfr_star", "krr", "linguistic_score",
    "klom", "mia", "mia_efficacy", "modality_matrix", "model_utility", "neurips_forget", "neurips_score", "privleak",
    "prob", "rouge", "rouge_with_image", "tow", "truth_ratio", "tv", "u_lira", "u_mia", "u_mia_population", "zrf",
}  # fmt: skip


def test_every_metric_is_described() -> None:
    found = all_metrics()
    assert set(found) >= EXPECTED
    for name in EXPECTED:
        record = found[name].record()
        json.dumps(record)
        assert record["name"] == name and "/" in record["definition"]
        assert all(record.values()), record
        assert found[name].doc.startswith(record["summary"])
    assert found["mia"].measure is expunge.attacks.membership.membership


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'truth_ratio'"):
        get_metric("truth-ratio")
    assert get_metric("tv").definition == "tv/1"


def test_two_metrics_may_not_share_a_name() -> None:
    def other() -> None:
        """Another one."""

    with pytest.raises(AssertionError, match="two metrics are called tv"):
        metric(name="tv", definition="x/1", formula="x", direction="x", source="x")(other)
