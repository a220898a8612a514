"""The demo on a smaller scale: one exact certificate, one of refusals, both verified, told and linked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.certify.test_cli_certify import expunge

from expunge import showcase

torch.set_num_threads(1)
SMALL = {
    "data_options": {"people": 8, "forget": 2, "holdout": 8, "utility": 16, "questions": 2},
    "init": "tiny-test",
    "methods": "graddiff",
    "base_epochs": 1.0,
    "epochs": 2.0,
}


@pytest.mark.slow
def test_the_demo_ends_with_both_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(showcase.DEMO, "people", showcase.DEMO["people"] | SMALL)
    out = tmp_path / "demo"
    assert expunge("demo", "--out", out, "--quiet") == 0
    said = capsys.readouterr().out
    assert "Certificate of zone-store (zone), signed and verified: certified" in said
    assert "L0 holds     After the removal of 4 record(s), what is released is byte for byte" in said
    assert "Certificate of cluster (edit), signed and verified: refused" in said
    assert "L0 not shown No claim at L0 (exact): the weights of a trained model were edited" in said
    page = (out / "report.html").read_text()
    for place in ("exact/erase", "measured/audit"):
        assert f'href="{place}/certificate.html"' in page and (out / place / "certificate.html").is_file()
        assert 'href="certificate.html"' in (out / place / "report.html").read_text()
        model = out / ("exact/erase/model" if place.startswith("exact") else "measured/cluster/model")
        keys = ["--pub", out / "signing.pub.pem", "--model", model]
        assert expunge("verify", out / place / "certificate.json", *keys) == 0
    before = {p: p.read_bytes() for p in out.rglob("certificate*")}
    capsys.readouterr()
    assert expunge("demo", "--out", out, "--quiet", "--json") == 0  # it is finished: nothing is made again
    assert json.loads(capsys.readouterr().out)["run"] == str(out)
    assert {p: p.read_bytes() for p in out.rglob("certificate*")} == before
