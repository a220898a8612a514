"""Several runs as one table: what is averaged, what is not, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_synthetic as synthetic
from scipy import stats

from expunge.cli.main import main
from expunge.errors import UserError
from expunge.report.merge import merge_runs

NAME = "prob.forget"


def run(folder: Path, shift: float = 0.0, methods: tuple[str, ...] = ("cluster", "npo"), seed: int = 0) -> Path:
    """A run of one seed whose numbers are moved by ``shift``."""
    content = synthetic.results()
    keep = {*synthetic.KINDS, *methods}
    rows = [r for r in content["rows"] if r["method"] in keep and r["study"] == "main" and r["seed"] == seed]
    rows = copy.deepcopy(rows)
    for row in rows:
        for measure in row["metrics"].values():
            measure["value"] += shift
    curves = [c for c in content["curves"] if c["model"] in {r["model"] for r in rows}]
    whole = {**content, "rows": rows, "summary": synthetic.summarise(rows), "curves": curves, "seeds": [seed]}
    return synthetic.write_run(folder, whole)


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def found(content: dict[str, Any], method: str, name: str = NAME) -> dict[str, Any]:
    measure: dict[str, Any] = next(s for s in content["summary"] if s["method"] == method)["metrics"][name]
    return measure


def test_repetitions_add_seeds_and_the_interval_is_over_them(tmp_path: Path) -> None:
    folders = [run(tmp_path / f"r{k}", shift) for k, shift in enumerate((0.0, 0.01, 0.05))]
    merged = read(merge_runs(folders, tmp_path / "all"))
    values = [found(read(f), "npo")["value"] for f in folders]
    own = found(merged, "npo")
    assert own["seeds"] == 3 and own["value"] == pytest.approx(np.mean(values))
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert own["high"] - own["value"] == pytest.approx(half)
    assert merged["seeds"] == [0, 1, 2] and merged["references"] == 3
    assert len({row["model"] for row in merged["rows"]}) == len(merged["rows"])
    assert {c["model"] for c in merged["curves"]} <= {row["model"] for row in merged["rows"]}
    assert sum("is a repetition" in w for w in merged["warnings"]) == 2


def test_every_sample_keeps_its_model(tmp_path: Path) -> None:
    folders = [run(tmp_path / "a"), run(tmp_path / "b", 0.01)]
    out = merge_runs(folders, tmp_path / "all")
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    rows = {row["model"]: row for row in read(out)["rows"]}
    assert len(lines) == 2 * len((folders[0] / "samples.jsonl").read_text().splitlines())
    assert all(line["seed"] == rows[line["model"]]["seed"] for line in lines)
    assert {line["seed"] for line in lines if line["model"] == "npo/0 of b"} == {1}


def test_other_methods_on_the_same_models_add_rows_and_no_seeds(tmp_path: Path) -> None:
    """The anchors are the very same models: counted twice they would halve the interval out of nothing."""
    folders = [run(tmp_path / "a", methods=("cluster",)), run(tmp_path / "b", methods=("npo",))]
    merged = read(merge_runs(folders, tmp_path / "all"))
    assert {s["method"] for s in merged["summary"]} == {*synthetic.KINDS, "cluster", "npo"}
    assert all(s["metrics"][NAME]["seeds"] == 1 for s in merged["summary"])
    assert not any("repetition" in w for w in merged["warnings"])


def test_what_follows_two_definitions_is_not_averaged(tmp_path: Path) -> None:
    folders = [run(tmp_path / "a"), run(tmp_path / "b", 0.01)]
    content = read(folders[1])
    for row in content["rows"]:
        row["metrics"][NAME]["definition"] = "prob/2"
    (folders[1] / "results.json").write_text(json.dumps(content))
    merged = read(merge_runs(folders, tmp_path / "all"))
    assert not any(NAME in s["metrics"] for s in merged["summary"])
    assert any(w.startswith(f"{NAME} was measured under several definitions (prob") for w in merged["warnings"])


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a"), run(tmp_path / "b", 0.01)
    with pytest.raises(UserError, match="name two or more run folders, each of them once"):
        merge_runs([one, one], tmp_path / "all")
    (other / "run.yaml").write_text("")
    with pytest.raises(UserError, match="is a run of its own"):
        merge_runs([one, run(tmp_path / "c", 0.02)], other)
    content = read(other)
    content["dataset"]["name"] = "tofu"
    (other / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the runs have different data sets, name 'people' .* and 'tofu'"):
        merge_runs([one, other], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def changed(folder: Path, method: str) -> Path:
    content = read(folder)
    next(r for r in content["rows"] if r["method"] == method)["metrics"][NAME]["value"] += 0.1
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_one_method_with_other_settings_from_the_same_original_is_a_row_of_its_own(tmp_path: Path) -> None:
    """Its other rows are the same models: as a repetition they would count twice."""
    folders = [run(tmp_path / "x" / "a"), *(changed(run(tmp_path / k / "b"), "npo") for k in ("x", "y"))]
    content = read(folders[2])
    next(r for r in content["rows"] if r["method"] == "npo")["metrics"][NAME]["value"] += 0.2
    (folders[2] / "results.json").write_text(json.dumps(content))
    out = merge_runs(folders, tmp_path / "all")
    merged = read(out)
    names = {s["method"]: s for s in merged["summary"]}
    again = [f"npo of {folder}" for folder in folders[1:]]  # two folders of one name: the whole path tells them apart
    assert {"npo", *again} <= set(names) and len(names) == len({s["method"] for s in read(folders[0])["summary"]}) + 2
    values = [names[n]["metrics"][NAME]["value"] for n in ("npo", *again)]
    assert np.diff(values) == pytest.approx([0.1, 0.2])
    assert not any("repetition" in w for w in merged["warnings"])
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines if line["model"].endswith(again[1])} <= {again[1]}


def test_one_original_beside_differing_references_is_refused(tmp_path: Path) -> None:
    folders = [run(tmp_path / "a"), changed(run(tmp_path / "b"), "reference")]
    with pytest.raises(UserError, match="measured twice beside one original, differently"):
        merge_runs(folders, tmp_path / "all")


def test_other_samples_of_the_same_data_set_are_said(tmp_path: Path) -> None:
    folders = [run(tmp_path / "a"), run(tmp_path / "b", 0.01)]
    content = read(folders[1])
    content["dataset"]["digest"] = "0" * 64
    (folders[1] / "results.json").write_text(json.dumps(content))
    assert any(
        "different samples of one data set" in w for w in read(merge_runs(folders, tmp_path / "all"))["warnings"]
    )


def test_the_command_writes_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run(tmp_path / "a"), run(tmp_path / "b", 0.01)]
    with pytest.raises(SystemExit) as end:
        main(["report", *map(str, folders), "--out", str(tmp_path / "all"), "--json"])
    assert end.value.code in (0, None)
    assert json.loads(capsys.readouterr().out) == {"reports": [str(tmp_path / "all" / "report.html")]}
    assert "2 runs together" in (tmp_path / "all" / "report.html").read_text()
