"""results.json: what is read, what is refused, what may be missing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import report_synthetic as synthetic

from expunge.errors import UserError
from expunge.report import load_results, parse_results, results_schema

MINIMAL: dict[str, Any] = {"schema": "expunge.results/1"}


def test_everything_that_is_written_is_read() -> None:
    content = synthetic.results()
    read = parse_results(content)
    assert len(read.rows) == len(content["rows"])
    first, again = content["rows"][0], read.rows[0]
    assert {name: m.value for name, m in again.metrics.items()} == {
        name: m["value"] for name, m in first["metrics"].items()
    }
    assert read.summary[0].metrics["tv.forget"].seed_count == content["summary"][0]["metrics"]["tv.forget"]["seeds"]


@pytest.mark.parametrize("version", ["expunge.results/2", "expunge.results/0", None, 1])
def test_another_version_is_refused(version: Any, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema": version}))
    with pytest.raises(UserError, match=r"this version of Expunge reads 'expunge\.results/1'"):
        load_results(tmp_path)


def test_missing_and_damaged_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_results(tmp_path)
    path = tmp_path / "results.json"
    path.write_text('{"schema": "expunge.results/1", "rows": [')
    with pytest.raises(UserError, match="is not JSON"):
        load_results(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match="not one JSON object"):
        load_results(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not JSON"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rows": [{"model": "a", "method": "a", "kind": "mystery"}]}, "rows.0.kind"),
        ({"rows": [{"method": "a"}]}, "rows.0.model"),
        (
            {"summary": [{"method": "a", "metrics": {"tv.forget": {"value": "much"}}}]},
            "summary.0.metrics.tv.forget.value",
        ),
    ],
)
def test_the_wrong_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"field '{field.replace('.', chr(92) + '.')}' is wrong"):
        parse_results({**MINIMAL, **change})


def test_absent_fields_and_unknown_fields_are_tolerated() -> None:
    read = parse_results({**MINIMAL, "rows": [{"model": "a/0", "method": "a", "future": 1, "metrics": {"x": 0.5}}]})
    assert read.rows[0].metrics["x"].value == 0.5  # a bare number is a measure without evidence
    assert read.rows[0].metrics["x"].n is None
    assert read.rows[0].seed is None


def test_not_a_number_is_missing() -> None:
    text = '{"schema": "expunge.results/1", "rows": [{"model": "a", "method": "a", "metrics": {"x": {"value": NaN}}}]}'
    assert parse_results(json.loads(text)).rows[0].metrics["x"].value is None


def test_the_published_schema_names_the_fields_of_the_file() -> None:
    schema = results_schema()
    content = synthetic.results()
    assert set(content) <= set(schema["properties"])
    assert schema["properties"]["schema"]["const"] == "expunge.results/1"
    assert "schema" in schema["required"]
    assert set(content["rows"][0]) <= set(schema["$defs"]["Row"]["properties"])
    assert set(content["summary"][0]) <= set(schema["$defs"]["Summary"]["properties"])
    json.dumps(schema)


def test_reading_does_not_change_the_content() -> None:
    content = synthetic.results()
    before = copy.deepcopy(content)
    parse_results(content)
    assert content == before


def test_a_run_that_measured_nothing_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": "expunge.training/1"}')
    with pytest.raises(UserError, match="holds no measurements: give the folder of a run"):
        load_results(tmp_path)
