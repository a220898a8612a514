"""A whole study on models of some ten thousand parameters: rows, resume, tuning, sequences, sizes, failures."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge import api, opening
from expunge.bench import results, tune
from expunge.bench.plan import StudyOptions, check_study
from expunge.bench.prepare import split_holdout
from expunge.bench.results import _over_seeds
from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset, subjects
from expunge.errors import UserError
from expunge.metrics.ranges import possible
from expunge.stats import seed_interval

PEOPLE = {"people": 8, "forget": 2, "holdout": 6, "utility": 4, "questions": 2, "perturbed": 3}
ENTRIES = ("ga:epochs=1", "npo:epochs=1;batch_size=4")
SETTINGS: dict[str, Any] = {
    "init": "tiny-test",
    "data": "people",
    "data_options": PEOPLE,
    "methods": ",".join(ENTRIES),
    "seeds": 2,
    "references": 2,
    "base_epochs": 2,
    "epochs": 3,
    "suite": "quick",
    "sequential": 2,
    "size_impact": [3],
    "tune": 2,
}
TIMES = {"created", "wall_s", "cpu_s", "peak_mib", "tokens_per_s"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Bit for bit the same in this process and in another one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # Drawing takes longer than all studies here together; the study on the command line has its report.
        patch.setattr(opening, "write_report", lambda folder: Path(folder) / "report.html")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def people() -> Dataset:
    return load_dataset("people", options=PEOPLE)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> api.Result:
    return api.bench(tmp_path_factory.mktemp("study") / "run", **SETTINGS)


def timeless(content: Any) -> Any:
    """Without what differs between two runs of the same thing."""
    if isinstance(content, dict):
        return {k: timeless(v) for k, v in content.items() if k not in TIMES}
    return [timeless(v) for v in content] if isinstance(content, list) else content


def rows_of(result: api.Result, study: str) -> list[dict[str, Any]]:
    return [row for row in result.results["rows"] if row["study"] == study]


# -- what is there -----------------------------------------------------------------------------------------------


def test_every_row_is_there_once(study: api.Result) -> None:
    main = [row["model"] for row in rows_of(study, "main")]
    kinds = ["original", "identity", "random-edit", *ENTRIES]
    assert sorted(main) == sorted(
        ["base/0", "reference/0", "reference/1", *(f"{k}/{s}" for k in kinds for s in (0, 1))]
    )
    sequence = {(row["method"], row["seed"], row["position"]) for row in rows_of(study, "sequential")}
    assert sequence == {(e, s, k) for e in ENTRIES for s in (0, 1) for k in (1, 2)}
    sizes = {(row["method"], row["seed"], row["position"]) for row in rows_of(study, "size")}
    assert sizes == {(e, s, 3) for e in ("original", "reference", *ENTRIES) for s in (0, 1)}


def test_every_row_has_its_cost_properties_and_definitions(study: api.Result) -> None:
    for row in study.results["rows"]:
        assert row["metrics"] and all(found["definition"] for found in row["metrics"].values())
        if row["kind"] != "method":
            continue
        cost = row["cost"]
        assert cost["flops"] > 0 and cost["wall_s"] > 0 and cost["peak_mib"] > 0 and cost["parameters_changed"] > 0
        assert 0 < cost["share_of_retraining"] < 1, row["model"]
        assert row["properties"]["paper"] and row["settings"], row["model"]
    references = [row["cost"]["share_of_retraining"] for row in rows_of(study, "main") if row["kind"] == "reference"]
    assert np.mean(references) == pytest.approx(1.0)


def test_identity_is_the_original_and_a_random_edit_is_not(study: api.Result) -> None:
    found = {row["model"]: row["metrics"] for row in rows_of(study, "main")}
    for seed in (0, 1):
        for name in ("prob.forget", "prob.retain", "loss.forget"):
            assert found[f"identity/{seed}"][name]["value"] == found[f"original/{seed}"][name]["value"]
            assert found[f"random-edit/{seed}"][name]["value"] != found[f"original/{seed}"][name]["value"]
        assert found[f"identity/{seed}"]["tv.gap_closed"]["value"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("face_centroid.forget", (0.0, 1.0)),
        ("face_centroid.gap.retain", (0.0, 1.0)),
        ("zrf.gap", (0.0, 1.0)),
        ("mia.min_k_plus.gap", (0.0, 1.0)),
        ("quant4.mia.loss.gap", (0.0, 1.0)),
        ("quant4.tv.forget", (0.0, 1.0)),
        ("clear_forget.gap", (0.0, 1.0)),
        ("clear_forget_quality.p_value", (0.0, 1.0)),
        ("clear_js_published", (0.0, 1.0)),
        ("rouge_with_image.retain", (0.0, 1.0)),
        ("rouge_with_image.gain.forget", (-1.0, 1.0)),
        ("modality.image.retain", (-1.0, 1.0)),
        ("relearn.loss_ratio", (0.0, math.inf)),
        ("quant4.loss.forget", (0.0, math.inf)),
        ("modality.image.closed", (-math.inf, math.inf)),
        ("tv.gap_closed", (-math.inf, math.inf)),
        ("privleak", (-math.inf, math.inf)),
    ],
)
def test_intervals_over_seeds_are_cut_to_what_is_possible(name: str, expected: tuple[float, float]) -> None:
    assert possible(name) == expected
    found = [{"value": value, "n": 9, "definition": "x/1"} for value in (0.0, 1.0)]
    low, high = (_over_seeds(name, found)[end] for end in ("low", "high"))
    assert expected[0] <= low < 0.5 < high <= expected[1]
    if math.isfinite(expected[0]):  # two seeds at 0 and 1 would reach from -5.9 to 6.9
        assert low == expected[0]


def test_the_summary_follows_from_the_rows(study: api.Result) -> None:
    for entry in study.results["summary"]:
        rows = [
            r for r in study.results["rows"] if all(r[k] == entry[k] for k in ("study", "kind", "method", "position"))
        ]
        assert rows
        for name, shown in entry["metrics"].items():
            values = [r["metrics"][name]["value"] for r in rows if r["metrics"].get(name, {}).get("value") is not None]
            assert shown["seeds"] == len(values)
            assert shown["value"] == pytest.approx(float(np.mean(values)))
            if len(values) > 1:
                interval, (least, most) = seed_interval(values), possible(name)
                expected = max(least, interval.low), min(most, interval.high)
                assert (shown["low"], shown["high"]) == pytest.approx(expected)
                assert least <= shown["low"] and shown["high"] <= most
        for name, value in entry["cost"].items():
            assert value == pytest.approx(
                float(np.mean([r["cost"][name] for r in rows if r["cost"][name] is not None]))
            )


def test_means_follow_from_the_samples(study: api.Result, people: Dataset) -> None:
    samples = [json.loads(line) for line in (study.folder / "samples.jsonl").read_text().splitlines()]
    for row in rows_of(study, "main"):
        mine = [s for s in samples if s["model"] == row["model"] and s["role"] == "forget"]
        assert {s["id"] for s in mine} == {s.id for s in people["forget"]}
        mean = float(np.mean([s["prob"] for s in mine]))
        assert row["metrics"]["prob.forget"]["value"] == pytest.approx(mean), row["model"]


def test_requests_in_sequence_are_measured_one_by_one(study: api.Result) -> None:
    for row in rows_of(study, "sequential"):
        asked = {name for name in row["metrics"] if name.startswith("prob.request_")}
        assert asked == {f"prob.request_{k + 1}" for k in range(row["position"])}


def test_the_record_is_complete(study: api.Result) -> None:
    record = json.loads((study.folder / "run.json").read_text())
    assert record["status"] == "done" and record["seeds"] == [0, 1] and record["flops"] > 0
    assert {"code", "config", "data"} <= record["digests"].keys() and record["peak_mib"] > 0
    events = [json.loads(line) for line in (study.folder / "events.jsonl").read_text().splitlines()]
    keys = [event["key"] for event in events if event["kind"] == "row"]
    assert len(keys) == len(set(keys)), "no row is measured twice"


def test_running_it_again_changes_nothing(study: api.Result) -> None:
    before = {p: p.read_bytes() for p in study.folder.glob("rows/*.json")}
    again = api.bench(study.folder, **SETTINGS)
    assert again.results == study.results
    assert {p: p.read_bytes() for p in study.folder.glob("rows/*.json")} == before


def test_another_configuration_is_refused_with_the_difference(study: api.Result) -> None:
    with pytest.raises(UserError, match="epochs: 3 -> 4"):
        api.bench(study.folder, **{**SETTINGS, "epochs": 4})


# -- resume, and the command line --------------------------------------------------------------------------------


def command(out: Path) -> list[str]:
    """The same study on the command line."""
    line = [sys.executable, "-c", "from expunge.cli.main import main; main()", "bench", "--out", str(out), "--quiet"]
    line += ["--init", "tiny-test", "--data", "people", "--methods", SETTINGS["methods"], "--suite", "quick"]
    line += [part for k, v in PEOPLE.items() for part in ("--data-option", f"{k}={v}")]
    for name in ("seeds", "references", "base_epochs", "epochs", "sequential", "tune"):
        line += [f"--{name.replace('_', '-')}", str(SETTINGS[name])]
    return [*line, "--size-impact", "3"]


def test_killed_at_a_random_row_and_run_again_gives_the_same(study: api.Result, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Everything up to a random moment of the uninterrupted run, plus a process killed in the middle of its work.
    files = sorted(study.folder.glob("rows/*.json"), key=lambda p: p.stat().st_mtime)
    keep = random.Random(os.urandom(8)).randrange(len(files))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(out.glob("rows/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert json.loads((out / "run.json").read_text())["status"] == "running", "nobody could write a farewell"
    for file in files[:keep]:
        shutil.copy(file, out / "rows" / file.name)
    # The models of those rows were made before them, and stand there too.
    until = files[keep - 1].stat().st_mtime if keep else 0.0
    facts = [p for p in study.folder.glob("models/*.json") if p.stat().st_mtime <= until]
    for file in [*facts, study.folder / "tuning.json"]:
        if file.stat().st_mtime <= until:
            shutil.copy(file, out / file.relative_to(study.folder))
    for file in facts:
        shutil.copytree(file.with_suffix(""), out / "models" / file.stem, dirs_exist_ok=True)
    done = subprocess.run([*command(out), "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resumed = json.loads((out / "results.json").read_text())
    whole = json.loads((study.folder / "results.json").read_text())
    assert timeless(resumed) == timeless(whole), f"{keep} rows were there"
    assert (out / "report.html").stat().st_size > 10_000
    assert timeless(json.loads(done.stdout)["summary"]) == timeless(whole["summary"])
    record = json.loads((out / "run.json").read_text())
    assert [a["status"] for a in record["attempts"]] == ["interrupted", "done"]


# -- tuning ------------------------------------------------------------------------------------------------------


def test_the_best_trial_by_the_rule_is_used(study: api.Result) -> None:
    record = json.loads((study.folder / "tuning.json").read_text())
    for label in ENTRIES:
        trials = record[label]
        assert len(trials) == 2 and trials[0]["settings"] == dict(p.split("=") for p in label.split(":")[1].split(";"))
        best = max(trials, key=lambda t: t["score"])
        used = {k: str(v) for k, v in best["settings"].items()}
        for row in (r for r in study.results["rows"] if r["method"] == label):
            assert row["settings"] == used


def test_the_rule() -> None:
    class Value:
        def __init__(self, value: float) -> None:
            self.value = value

    good = {"tv.gap_closed": Value(0.6), "retain_ratio": Value(1.0), "mia.loss.gap": Value(0.05)}
    assert tune.score(good) == pytest.approx(0.6)
    assert tune.score(good, share=0.25) == tune.score(good)
    assert tune.score(good, share=0.35) == pytest.approx(0.6 - 5 * 0.1)
    assert tune.score({**good, "retain_ratio": Value(0.975)}) == pytest.approx(0.6 - 10 * 0.01)
    assert tune.score({**good, "mia.loss.gap": Value(0.10)}) == pytest.approx(0.6 - 2 * 0.05)
    assert tune.score({**good, "retain_ratio": Value(float("nan"))}) < tune.score(good) - 9
    assert tune.score({}) == pytest.approx(-1 - 9.85 - 2 * 0.45)


def test_tuning_never_meets_the_measured_forget_set(people: Dataset) -> None:
    validation = tune.validation(people)
    seen = {s.id for role in ("forget", "retain") for s in validation[role]}
    assert not seen & {s.id for s in people["forget"]}
    assert seen == {s.id for s in people["retain"]}
    assert len(subjects(validation["forget"])) == len(subjects(people["forget"]))
    assert not set(subjects(validation["forget"])) & set(subjects(validation["retain"]))


def test_calibration_and_measured_holdout_share_nobody(people: Dataset) -> None:
    unseen, measured = split_holdout(people, 0.34)
    assert unseen and measured["holdout"]
    assert not set(subjects(unseen)) & set(subjects(measured["holdout"]))
    assert {s.id for s in unseen} | {s.id for s in measured["holdout"]} == {s.id for s in people["holdout"]}
    assert split_holdout(people, 0.0) == ((), people)


# -- refusals and failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_impact": (16,)}, r"--size-impact 16: give numbers from 1 to 15"),
        ({"size_impact": (3, 3)}, "names a size twice"),
        ({"sequential": 3}, "3 requests in sequence: .* 1 to 2"),
    ],
)
def test_refused_before_anything_is_trained(options: dict[str, Any], message: str, people: Dataset) -> None:
    check_study(people, StudyOptions())
    with pytest.raises(UserError, match=message):
        check_study(people, StudyOptions(**options))


def test_no_retain_set_and_too_few_subjects_are_refused(people: Dataset) -> None:
    with pytest.raises(UserError, match="add --retain"):
        check_study(replace(people, roles={**people.roles, "retain": ()}), StudyOptions())
    few = replace(people, roles={**people.roles, "retain": people["retain"][:4]})
    with pytest.raises(UserError, match="--tune needs more than 2 subjects"):
        check_study(few, StudyOptions(tune=1))


BROKEN = '''"""A method with a defect."""
from expunge.methods.registry import method
from expunge.training.loop import TrainOptions

@method(name="broken", options=TrainOptions, paper="none")
def broken(context, options):
    """Fails."""
    return [][1]
'''


def test_a_failed_method_is_a_warning_and_the_others_are_measured(tmp_path: Path) -> None:
    from expunge.methods import registry

    (tmp_path / "own.py").write_text(BROKEN)
    settings = {**SETTINGS, "methods": f"{tmp_path}/own.py:broken,cluster:members=base;epochs=1", "seeds": 1}
    settings |= {"tune": 0, "size_impact": (), "sequential": 0, "references": 1, "blind": True}
    settings["methods"] += ",finetune:epochs=1"
    try:
        result = api.bench(tmp_path / "run", **settings)
    finally:
        registry._METHODS.pop("broken", None)
    failures = [w for w in result.results["warnings"] if " failed: " in w]
    assert any("broken" in w and "unexpected IndexError: list index out of range" in w for w in failures)
    assert any("cluster:" in w and "needs the base model" in w for w in failures)
    measured = {row["method"] for row in rows_of(result, "main") if row["kind"] == "method"}
    assert measured == {"finetune:epochs=1"}
    (log,) = (tmp_path / "run/errors").glob("*.log")
    assert "Traceback" in log.read_text()


def test_a_row_is_found_by_its_key(study: api.Result) -> None:
    names = {p.name for p in study.folder.glob("rows/*.json")}
    for row in rows_of(study, "main"):
        assert Path(results.row_file(f"main/{row['model']}")).name in names
