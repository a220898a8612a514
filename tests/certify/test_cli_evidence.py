"""Evidence that needs more than one run, from the command line alone: seeds and margins (L2), canaries (L4)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.certify.test_cli_certify import expunge

from expunge.certify.sections import EVIDENCE, Arms, read_sections
from expunge.certify.study import trials_of

pytestmark = pytest.mark.slow
torch.set_num_threads(1)
DATA = ["--data", "people"]
for _option in ("people=6", "forget=2", "holdout=6", "utility=6", "questions=2"):
    DATA += ["--data-option", _option]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study over three seeds, and one run of its method."""
    folder = tmp_path_factory.mktemp("seeds")
    study, run = folder / "study", folder / "run"
    (folder / "plan.yaml").write_text(
        "fixed: 2026-01-01T09:00:00Z\nmargins: {prob.forget: 0.9, prob.retain: 0.9, loss.forget: 40}\n"
    )
    trained = ["--init", "tiny-test", "--seeds", 3, "--references", 3, "--base-epochs", 1, "--epochs", 2]
    method = ["--methods", "graddiff:epochs=1", "--suite", "quick", "--quiet", "--batch-size", "4"]
    assert expunge("bench", *DATA, *map(str, trained), *method, "--out", study) == 0
    model = study / "models" / "original-0"
    given = ["--method", "graddiff", "--epochs", "1", "--suite", "quick", "--quiet", "--out", run]
    assert expunge("unlearn", "--model", model, "--base", study / "models" / "base", *DATA, *given) == 0
    return folder


def level(run: Path, name: str, capsys: Captured) -> dict[str, Any]:
    """The claim of a level as ``certify --json`` gives it."""
    capsys.readouterr()
    expunge("certify", run, "--json")
    claims = json.loads(capsys.readouterr().out)["statement"]["predicate"]["claims"]
    return dict(next(c for c in claims if c["level"] == name))


def test_equivalence_over_seeds_with_margins_of_a_plan(place: Path, capsys: Captured) -> None:
    run = place / "run"
    assert level(run, "L2", capsys)["verdict"] == "unsupported"
    expunge("certify", run, "--study", place / "study", "--plan", place / "plan.yaml")
    found = level(run, "L2", capsys)
    assert found["verdict"] == "certified", found
    assert found["evidence"]["statistics"]["prob.forget"]["runs"] == [3, 3]
    rows = json.loads((place / "study" / "results.json").read_text())["rows"]
    mine = [r["metrics"]["prob.forget"]["value"] for r in rows if r["kind"] == "method" and r["study"] == "main"]
    sections = read_sections(run)
    assert sections.equivalence is not None and sections.equivalence.arms["prob.forget"].unlearned == tuple(mine)
    assert sections.trials is not None and (sections.trials.positives, sections.trials.negatives) == (3, 3)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("fixed: 2099-01-01T00:00:00Z\nmargins: {prob.forget: 0.9, prob.retain: 0.9}", "fixed after the runs began"),
        ("fixed: 2026-01-01T00:00:00Z\nmargins: {prob.forget: 0.9}", "one of what stays"),
        ("fixed: 2026-01-01T00:00:00Z\nmargins: {prob.forget: 1.0e-9, prob.retain: 0.9}", "prob.forget"),
    ],
)
def test_plans_that_show_nothing(plan: str, words: str, place: Path, tmp_path: Path, capsys: Captured) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    (run / EVIDENCE).unlink(missing_ok=True)
    (tmp_path / "plan.yaml").write_text(plan)
    expunge("certify", run, "--study", place / "study", "--plan", tmp_path / "plan.yaml")
    found = level(run, "L2", capsys)
    assert found["verdict"] != "certified" and words in found["claim"]


@pytest.mark.parametrize(
    ("arguments", "plan", "words"),
    [
        ("--study study", "", "belong together"),
        ("--plan plan.yaml", "", "belong together"),
        ("--study study --plan none.yaml", "", "cannot be read"),
        ("--study study --plan plan.yaml", "a: [", "is no YAML"),
        ("--study study --plan plan.yaml", "margins: {prob.forget: 0.1}", "fixed is wrong"),
        ("--study study --plan plan.yaml", "fixed: 2026-01-01T00:00:00\nmargins: {prob.forget: 0.1}", "no time zone"),
        ("--study study --plan plan.yaml", "fixed: 2026-01-01T00:00:00Z\nmargins: {prob.forget: -1}", "margins"),
        ("--study study --plan plan.yaml", "fixed: 2026-01-01T00:00:00Z\nmargins: {prob.forgot: 1}", "is missing in"),
        ("--study run --plan plan.yaml", "fixed: 2026-01-01T00:00:00Z\nmargins: {prob.forget: 1}", "no finished study"),
    ],
)
def test_wrong_plans(
    arguments: str,
    plan: str,
    words: str,
    place: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("study", "run"):
        (tmp_path / name).symlink_to(place / name)
    (tmp_path / "plan.yaml").write_text(plan)
    assert expunge("certify", place / "run", *arguments.split()) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_study_of_another_method_is_not_taken(place: Path, tmp_path: Path, capsys: Captured) -> None:
    model = place / "study" / "models" / "original-0"
    given = ["--method", "graddiff", "--epochs", "2", "--suite", "none", "--quiet", "--out", tmp_path / "run"]
    assert expunge("unlearn", "--model", model, *DATA, *given) == 0
    plan = ["--study", place / "study", "--plan", place / "plan.yaml"]
    assert expunge("certify", tmp_path / "run", *plan) == 2
    assert "and not 'graddiff' with the settings of this run" in capsys.readouterr().err


def test_trials_count_every_threshold_that_was_tried() -> None:
    """Apart by a threshold in one statistic: 3 of 3 and 0 of 3; 5 gaps in each of 2 statistics, 2 directions."""
    arms = {
        "prob.forget": Arms(unlearned=(0.1, 0.2, 0.3), retrained=(0.4, 0.5, 0.6)),
        "loss.forget": Arms(unlearned=(1.0, 3.0, 5.0), retrained=(2.0, 4.0, 6.0)),
        "prob.retain": Arms(unlearned=(0.0, 0.1, 0.2), retrained=(0.8, 0.9, 1.0)),
    }
    found = trials_of(arms)
    assert found is not None and (found.true_positives, found.false_positives, found.thresholds) == (3, 0, 20)
    assert trials_of({"prob.retain": arms["prob.retain"]}) is None


def test_a_one_run_audit_with_canaries(tmp_path: Path, capsys: Captured) -> None:
    """Canaries that were put in by coins and never unlearnt: the guesses are right, and the claim is refuted."""
    data = [
        "--data",
        "canaries",
        "--data-option",
        "count=40",
        "--data-option",
        "people=2",
        "--data-option",
        "utility=8",
    ]
    data += ["--data-option", "questions=2", "--quiet"]
    base, original, run = tmp_path / "base", tmp_path / "original", tmp_path / "run"
    start = ["--init", "tiny-test", "--roles", "utility", "--epochs", "1"]
    assert expunge("train", *start, *data, "--out", base) == 0
    learnt = ["--epochs", "60", "--learning-rate", "0.01", "--batch-size", "4"]
    assert expunge("train", "--model", base / "model", *learnt, *data, "--out", original) == 0
    few = ["--method", "graddiff", "--epochs", "0.05", "--learning-rate", "1e-7", "--suite", "quick"]
    assert expunge("unlearn", "--model", original / "model", *few, *data, "--out", run) == 0
    audited = tmp_path / "audit"
    audit = ["--original", original / "model", "--attacks", "loss", *data, "--out", audited]
    assert expunge("audit", "--model", run / "model", *audit) == 0
    assert expunge("certify", audited, "--collect") == 1
    found = read_sections(audited).guesses
    assert found is not None and found.coins and found.canaries == 40 and found.guesses == 26
    assert found.right >= 24
    claim = level(audited, "L4", capsys)
    assert claim["verdict"] == "refuted" and claim["evidence"]["canary_loss_at_least"] > 0.5
    assert claim["evidence"]["canary_loss_ceiling"] >= claim["evidence"]["canary_loss_at_least"]
