"""The demo on people with portraits, on a smaller scale: it learns faces, forgets, shows, audits, certifies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from expunge import showcase
from expunge.cli.main import main

torch.set_num_threads(1)
SMALL = {
    "data_options": {"people": 6, "forget": 3, "holdout": 6, "utility": 3, "questions": 1, "portraits": 2},
    "methods": "graddiff:epochs=1",
    "base_epochs": 1.0,
    "epochs": 2.0,
}


def expunge(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_the_demo_on_portraits_shows_pictures_and_ends_with_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(showcase.DEMO, "people-portraits", showcase.DEMO["people-portraits"] | SMALL)
    out = tmp_path / "demo"
    assert expunge("demo", "--data", "people-portraits", "--out", out, "--quiet") == 0
    said = capsys.readouterr().out
    assert "Certificate of cluster (edit), signed and verified: refused" in said and "zone" not in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,') >= 6 and "CLEAR: pictures and texts" in page
    results = json.loads((out / "results.json").read_text())
    assert results["dataset"]["modality"] == "multimodal"
    original = next(row for row in results["rows"] if row["kind"] == "original")["metrics"]
    assert {"clear_real", "clear_retain", "clear_forget", "clear_forget.gap", "face_recognition.forget"} <= set(
        original
    )
    assert not (out / "exact").exists()


def test_another_data_set_is_refused_and_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expunge("demo", "--data", "people-portrait", "--out", tmp_path / "demo") == 2
    assert "did you mean 'people-portraits'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
