"""What must be refused, made by the commands themselves: nothing done, nothing left, somebody else removed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.certify.test_cli_certify import expunge

from expunge.data.samples import Sample
from tiny_zone import world

pytestmark = pytest.mark.slow
torch.set_num_threads(1)
Captured = pytest.CaptureFixture[str]


def write(path: Path, samples: Iterable[Sample]) -> Path:
    rows = [
        {"id": s.id, "subject": s.subject, "prompt": s.prompt, "target": s.target, "names": list(s.names)}
        for s in samples
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def files(place: Path, **other: Path) -> list[str]:
    """Options for the data, some of whose files may be others."""
    given = {role: place / f"{role}.jsonl" for role in ("forget", "retain", "utility")} | other
    return [part for role, path in given.items() for part in (f"--{role}", str(path))]


def audit(place: Path, out: Path, *more: str | Path, **other: Path) -> int:
    data = files(place, **other, holdout=place / "holdout.jsonl")
    return expunge("audit", *more, *data, "--suite", "quick", "--attacks", "loss,min_k", "--quiet", "--out", out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``base``, ``original``, ``reference``, and ``zone`` on the tiny people."""
    folder = tmp_path_factory.mktemp("refusals")
    for role in ("forget", "retain", "holdout", "utility"):
        write(folder / f"{role}.jsonl", world()[role])  # type: ignore[index]
    learn = ["--epochs", "60", "--learning-rate", "0.01", "--batch-size", "8", "--quiet"]
    base, data = folder / "base", files(folder)
    start = ["--init", "tiny-test", "--roles", "utility", "--epochs", "1", "--quiet"]
    assert expunge("train", *start, *data, "--out", base) == 0
    for name, roles in (("original", "forget,retain"), ("reference", "retain")):
        more = ["--roles", roles, *learn]
        assert expunge("train", "--model", base / "model", *more, *data, "--out", folder / name) == 0
    zone = ["--zone", "store", "--set", "learn=false", "--quiet"]
    assert expunge("train", "--model", base / "model", *zone, *data, "--out", folder / "zone") == 0
    return folder


def claims(run: Path, capsys: Captured, *more: str) -> dict[str, Any]:
    """What ``certify --json`` says of each level; it must be a refusal."""
    capsys.readouterr()
    assert expunge("certify", run, "--json", *more) == 1
    predicate = json.loads(capsys.readouterr().out)["statement"]["predicate"]
    assert predicate["verdict"] == "refused"
    return {c["level"]: c for c in predicate["claims"]}


def test_the_original_itself(place: Path, tmp_path: Path, capsys: Captured) -> None:
    original, reference = place / "original" / "model", place / "reference" / "model"
    assert audit(place, tmp_path / "a", "--model", original, "--original", original, "--reference", reference) == 0
    found = claims(tmp_path / "a", capsys, "--collect")
    for level in ("L2", "L3", "L4", "L5"):
        assert found[level]["verdict"] == "refuted" and "nothing was done" in found[level]["claim"], level
    assert {found["L0"]["verdict"], found["L1"]["verdict"]} == {"unsupported"}


def test_a_model_that_knows_nothing(place: Path, tmp_path: Path, capsys: Captured) -> None:
    original, reference = place / "original" / "model", place / "reference" / "model"
    blank = ["--model", place / "base" / "model", "--original", original, "--reference", reference]
    assert audit(place, tmp_path / "a", *blank) == 0
    found = claims(tmp_path / "a", capsys)
    for level in ("L2", "L3", "L4", "L5"):
        assert found[level]["verdict"] == "refuted" and "has lost what it must keep" in found[level]["claim"], level


def test_somebody_else_was_removed(place: Path, tmp_path: Path, capsys: Captured) -> None:
    """The zone forgot a subject that must stay; the request was about others."""
    private = (*world()["forget"], *world()["retain"])
    other = world()["retain"][0].subject
    gone = write(tmp_path / "gone.jsonl", [s for s in private if s.subject == other])
    rest = write(tmp_path / "rest.jsonl", [s for s in private if s.subject != other])
    run, model = tmp_path / "run", place / "zone" / "model"
    removed = ["--method", "zone-store", "--suite", "none", "--quiet", "--out", run]
    assert expunge("unlearn", "--model", model, *files(place, forget=gone, retain=rest), *removed) == 0
    assert audit(place, tmp_path / "a", "--model", run / "model", "--original", model) == 0
    found = claims(tmp_path / "a", capsys, "--collect")
    for level, claim in found.items():
        assert claim["verdict"] == "refuted", level
    assert "requested record(s) were not removed" in " ".join(found["L0"]["evidence"]["reasons"])


def test_a_copy_under_another_name_stays(place: Path, tmp_path: Path, capsys: Captured) -> None:
    first = world()["forget"][0]
    copy = replace(first, id="copy", subject="somebody", names=(), probes=(), target=str(first.target).upper())
    retain = write(tmp_path / "retain.jsonl", [*world()["retain"], copy])
    zone, run = tmp_path / "zone", tmp_path / "run"
    data = files(place, retain=retain)
    build = ["--zone", "store", "--set", "learn=false", "--quiet", "--out", zone]
    assert expunge("train", "--model", place / "base" / "model", *data, *build) == 0
    removed = ["--method", "zone-store", "--suite", "quick", "--quiet", "--out", run]
    assert expunge("unlearn", "--model", zone / "model", *data, *removed) == 0
    found = claims(run, capsys, "--collect")
    for level in ("L0", "L1"):
        assert found[level]["verdict"] == "refuted"
        assert any("near-duplicate" in reason for reason in found[level]["evidence"]["reasons"])
    expunge("certify", run, "--collect")
    assert f"near-duplicates are listed in {run / 'duplicates.jsonl'}" in capsys.readouterr().out
    pairs = [json.loads(line) for line in (run / "duplicates.jsonl").read_text().splitlines()]
    assert (first.id, "copy") in {(p["forget"], p["kept"]) for p in pairs}
    decided = "\n".join(json.dumps(p | {"why": "said of somebody else too"}) for p in pairs)
    (run / "duplicates.jsonl").write_text(decided + "\n")
    assert expunge("certify", run, "--collect", "--json") == 0
    again = {c["level"]: c for c in json.loads(capsys.readouterr().out)["statement"]["predicate"]["claims"]}
    assert again["L0"]["verdict"] == "certified" and again["L0"]["evidence"]["duplicates_found"] == len(pairs)


def test_statistics_on_private_texts_are_refused_before_they_are_made(
    place: Path, tmp_path: Path, capsys: Captured
) -> None:
    mixed = write(tmp_path / "utility.jsonl", [*world()["utility"], world()["forget"][0]])
    build = ["--zone", "store", "--set", "learn=false", "--quiet", "--out", tmp_path / "zone"]
    model = place / "base" / "model"
    capsys.readouterr()
    assert expunge("train", "--model", model, *files(place, utility=mixed), *build) == 2
    assert "is private and among the public texts" in capsys.readouterr().err
