"""``expunge completeness`` as a user meets it."""

from __future__ import annotations

import csv
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expunge.cli.main import main
from expunge.completeness.table import write_table

Captured = pytest.CaptureFixture[str]
GOLDEN = {
    "text": (
        "id,unlearned,original,shadow\na,1.2,1.0,2.5\nb,2.6,1.1,2.7\nc,.8,.9,2.4\nd,2.2,1.0,2.6\n",
        [0.963836, 0.083133, 0.999997, 0.322784],
    ),
    "classifier": (
        "id,unlearned,original,shadow,shadow_2\na,.35,.99,.3,.4\nb,.95,.98,.7,.6\nc,.9,.999,.9,.95\nd,.9,.95,.1,.2\n",
        [0.974471, 0.427943, 0.962179, 0.326559],
    ),
}


def expunge(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["completeness", *map(str, arguments)])
    return int(end.value.code or 0)


def population(
    path: Path, num: int, seed: int = 0, kept: float = 0.5, shadows: int = 3, prefix: str = "s", learnt: bool = True
) -> Path:
    """A table of losses: the first part forgotten exactly (one more draw of a shadow), the rest as in the original.

    Without ``learnt`` the original never saw them either: a holdout.
    """
    rng = np.random.default_rng(seed)
    hard_N = rng.gamma(8, 0.3, num) + 0.8
    out = np.maximum(hard_N * np.exp(rng.normal(0, 0.12, (shadows + 1, num))), 0.05)
    original_N = hard_N * np.exp(rng.normal(0, 0.1, num)) * (0.15 if learnt else 1.0)
    member_N = np.arange(num) >= round(num * (1 - kept))
    columns = {
        "id": [f"{prefix}{i}" for i in range(num)],
        "unlearned": np.where(member_N, original_N * np.exp(rng.normal(0, 0.1, num)), out[-1]),
        "original": original_N,
        "shadow": out[0],
        **{f"shadow_{k + 1}": out[k] for k in range(1, shadows)},
        "label": member_N.astype(int),
    }
    return write_table(path, columns)


@pytest.mark.parametrize("form", ["text", "classifier"])
def test_parity_prints_the_golden_vectors_and_no_verdict(form: str, tmp_path: Path, capsys: Captured) -> None:
    text, expected = GOLDEN[form]
    (tmp_path / "t.csv").write_text(text)
    assert expunge("--signals", tmp_path / "t.csv", "--form", form, "--parity", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["score"] for row in found["rows"]] == pytest.approx(expected, abs=1e-5)
    assert found["verdicts"] is None and set(found["rows"][0]) == {"id", "score"}
    assert ("membership (1 = still a member)" if form == "text" else "U (1 = forgotten)") in found["score"]
    assert expunge("--signals", tmp_path / "t.csv", "--form", form, "--parity") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "score"] and lines[1].split() == ["a", f"{expected[0]:.4f}"]


def test_parity_pools_64_rows_of_text_unless_told(tmp_path: Path, capsys: Captured) -> None:
    path, scores = population(tmp_path / "t.csv", 100), []
    for more in ([], ["--batch-size", 64], ["--batch-size", 0]):
        expunge("--signals", path, "--form", "text", "--parity", "--json", *more)
        scores.append([row["score"] for row in json.loads(capsys.readouterr().out)["rows"]])
    assert scores[0] == scores[1] != scores[2]


def test_calibrated_answers_per_sample(tmp_path: Path, capsys: Captured) -> None:
    path = population(tmp_path / "t.csv", 600)
    assert expunge("--signals", path, "--form", "text", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert {"id", "score", "completeness", "verdict"} <= set(rows[0])
    assert sum(found["verdicts"].values()) == found["samples"] == 600 and found["shadows"] == 3
    assert set(found["verdicts"]) == {"under-unlearned", "adequate", "over-unlearned", "not-auditable"}
    forgotten, kept = rows[:300], rows[300:]
    assert sum(r["verdict"] == "under-unlearned" for r in kept) > 0.9 * 300
    assert sum(r["verdict"] == "under-unlearned" for r in forgotten) < 0.08 * 300
    assert np.mean([r["completeness"] for r in forgotten]) > np.mean([r["completeness"] for r in kept]) + 0.3
    auc = found["auc"]["score"]
    assert auc["low"] <= auc["value"] <= auc["high"] and auc["value"] > 0.97 and auc["n"] == 600
    assert {"loss", "gap-ratio", "prob-ratio", "loss-difference"} <= set(found["auc"])


def test_a_holdout_calibrates(tmp_path: Path, capsys: Captured) -> None:
    path, unseen = (
        population(tmp_path / "t.csv", 200),
        population(tmp_path / "h.csv", 200, 1, kept=0, prefix="h", learnt=False),
    )
    assert expunge("--signals", path, "--form", "text", "--holdout", unseen, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["holdout"] == 200
    kept = [row["verdict"] for row in found["rows"][100:]]
    assert kept.count("under-unlearned") > 90


def test_row_order_changes_no_verdict(tmp_path: Path, capsys: Captured) -> None:
    path = population(tmp_path / "t.csv", 150)
    header, *lines = path.read_text().splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    (tmp_path / "u.csv").write_text("\n".join([header, *(lines[i] for i in order)]))
    rows = []
    for name in ("t.csv", "u.csv"):
        expunge("--signals", tmp_path / name, "--form", "text", "--json")
        rows.append({r["id"]: r for r in json.loads(capsys.readouterr().out)["rows"]})
    assert rows[0] == rows[1]


def test_people_read_a_table_a_summary_and_notes_apart(tmp_path: Path, capsys: Captured) -> None:
    path = population(tmp_path / "t.csv", 40)
    header, *given = path.read_text().splitlines()
    path.write_text("\n".join([f"{header},remark", *(f"{line},x" for line in given)]))
    assert expunge("--signals", path, "--form", "text") == 0
    done = capsys.readouterr()
    head, *lines = done.out.splitlines()
    assert head.split() == ["id", "score", "completeness", "verdict"] and lines[40] == ""
    assert lines[41].startswith("40 samples, 3 shadow(s), form text")
    assert "under-unlearned" in lines[42] and any(line.startswith("auc of score: ") for line in lines)
    assert "note: columns that have no meaning here were left out: remark." in done.err


def test_the_run_folder_holds_everything(tmp_path: Path, capsys: Captured) -> None:
    path, out = population(tmp_path / "t.csv", 60), tmp_path / "run"
    assert expunge("--signals", path, "--form", "text", "--out", out) == 0
    assert f"written to {out}" in capsys.readouterr().out
    with (out / "completeness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and {"id", "unlearned", "shadow_3", "score", "completeness", "verdict"} <= set(rows[0])
    results = json.loads((out / "results.json").read_text())
    assert results["schema"] == "expunge.completeness/1" and results["samples"] == 60
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    assert (out / "results.md").read_text().startswith("# Completeness")
    svg = (out / "figures/completeness.svg").read_text()
    assert "completeness (1 = gone)" in svg and "under-unlearned (" in svg
    assert (out / "figures/completeness.png").read_bytes().startswith(b"\x89PNG")
    first = (out / "completeness.csv").read_bytes()
    assert expunge("--signals", path, "--form", "text", "--out", out) == 0, "the same command again"
    assert (out / "completeness.csv").read_bytes() == first
    capsys.readouterr()
    assert expunge("--signals", path, "--form", "text", "--level", "0.1", "--out", out) == 2
    assert "choose a new --out" in capsys.readouterr().err


def test_offline_with_an_anchor(tmp_path: Path, capsys: Captured) -> None:
    path = population(tmp_path / "t.csv", 80)
    expunge("--signals", path, "--form", "text", "--parity", "--json")
    online = json.loads(capsys.readouterr().out)["auc"]["score"]["value"]
    without = [line.split(",") for line in path.read_text().splitlines()]
    (tmp_path / "off.csv").write_text("\n".join(",".join([*line[:2], *line[3:]]) for line in without))
    arguments = ["--signals", tmp_path / "off.csv", "--form", "text", "--parity", "--json"]
    assert expunge(*arguments) == 2
    assert "no column 'original'" in capsys.readouterr().err
    assert expunge(*arguments, "--anchor", "0.5") == 0
    offline = json.loads(capsys.readouterr().out)
    assert offline["anchor"] == 0.5 and 0.9 < offline["auc"]["score"]["value"] <= online + 0.05


WRONG = {
    "negative level": (["--level", "-1"], "--level -1.0 is not between 0 and 1"),
    "level of 1": (["--level", "1"], "--level 1.0 is not between 0 and 1"),
    "fdr": (["--fdr", "0"], "--fdr 0.0 is not between 0 and 1"),
    "form": (["--form", "tekst"], "unknown form 'tekst': did you mean 'text'"),
    "batch size without parity": (["--batch-size", "64"], "--batch-size belongs to --parity"),
    "parity with holdout": (["--parity", "--holdout", "t.csv"], "leave --holdout away"),
    "anchor": (["--anchor", "-2"], "the anchor -2.0 is not a loss"),
    "holdout of the same samples": (["--holdout", "t.csv"], "row(s) of the holdout are in the table too"),
    "holdout of other models": (["--holdout", "h.csv"], "the same models"),
    "protocol and a table": (["--protocol", "binui"], "give it without --signals and --form"),
    "no such table": (["--signals", "gone.csv"], "'gone.csv' does not exist"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_sentence_and_code_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    population(tmp_path / "t.csv", 20)
    population(tmp_path / "h.csv", 20, 1, shadows=1, prefix="h")
    more, message = WRONG[name]
    assert expunge("--signals", "t.csv", "--form", "text", "--out", "out", *more) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_table_or_a_protocol(capsys: Captured) -> None:
    assert expunge("--form", "text") == 2
    assert "nothing to measure: give --signals TABLE" in capsys.readouterr().err
    assert expunge("--protocol", "binu", "--out", "nowhere") == 2
    assert "unknown protocol 'binu': did you mean 'binui'?" in capsys.readouterr().err


def test_a_protocol_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """Every option arrives under its name; what the protocols do with them is tested with the protocols."""
    from expunge.completeness import protocols

    real = inspect.signature(protocols.run_protocol)
    given: dict[str, Any] = {}

    def stand_in(name: str, **options: Any) -> dict[str, Any]:
        real.bind(name, **options)
        given.update(options, name=name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.md").write_text(
            "# Protocol\n\n| score | auc |\n|---|---|\n| IAM-On |  |\n| p | 0.5 |\n"
        )
        return {"protocol": name}

    monkeypatch.setattr(protocols, "run_protocol", stand_in)
    line = "--protocol scoreui --data digits --data-option size=9 --init tiny --seed 3 --quick --shadows 4"
    assert expunge(*line.split(), "--set", "points=5", "--out", tmp_path) == 0
    table = "score   auc\nIAM-On\np       0.5"
    assert capsys.readouterr().out == f"# Protocol\n\n{table}\nwritten to {tmp_path / 'scoreui'}.\n"
    assert given.pop("progress") is not None
    assert given == {
        "name": "scoreui",
        "out": tmp_path,
        "data": "digits",
        "data_dir": None,
        "data_options": {"size": "9"},
        "model": None,
        "init": "tiny",
        "seed": 3,
        "shadows": 4,
        "groups": None,
        "quick": True,
        "options": {"points": "5"},
    }


def test_the_page_of_protocols_names_each_of_them_and_each_option() -> None:
    from dataclasses import fields

    from expunge.completeness.protocols import PROTOCOLS, ProtocolOptions

    page = (Path(__file__).resolve().parents[2] / "docs/protocols.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in PROTOCOLS)
    missing = {f.name for f in fields(ProtocolOptions) if not re.search(rf"[` -]{f.name}[`=]", page)}
    assert not missing, "every option of the protocols stands in docs/protocols.md"


def test_ten_thousand_rows_are_quick_and_need_no_torch(tmp_path: Path) -> None:
    """2 s of a processor of one's own; the limit here leaves room for a busy or slow machine."""
    path = population(tmp_path / "t.csv", 10_000, shadows=1)
    code = (
        "import sys, resource\nfrom expunge.cli.main import main\ntry:\n    main()\nfinally:\n"
        "    print('torch' in sys.modules, sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), file=sys.stderr)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "completeness", "--signals", str(path), "--form", "text"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wall = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    torch, seconds = done.stderr.split()[-2:]
    assert torch == "False"
    assert float(seconds) < 4 and float(seconds) <= wall + 1
    assert len(done.stdout.splitlines()) > 10_001


def test_readings_work_from_python(tmp_path: Path) -> None:
    from expunge.api import completeness
    from expunge.completeness.table import read_table
    from expunge.errors import UserError

    path = population(tmp_path / "t.csv", 50)
    readings = read_table(path, "text").readings
    one, other = completeness(path, "text", parity=True), completeness(readings, "text", parity=True)
    assert np.array_equal(one.member_N, other.member_N)
    with pytest.raises(UserError, match="readings of form 'text'"):
        completeness(readings, "classifier")
