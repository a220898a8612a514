"""From a base without private data to a signed certificate of exact removal, with the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.certify.test_cli_certify import expunge, statement

from expunge import api
from expunge.certify.vendored import read_envelope
from expunge.data.registry import load_dataset

DATA = {"people": 12, "forget": 2, "holdout": 6, "utility": 20, "questions": 4}


@pytest.mark.slow
def test_a_zone_gets_an_exact_certificate_without_a_name_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, zone, run = (tmp_path / name for name in ("base", "zone", "run"))
    data = {"data": "people", "data_options": DATA}
    api.train(base, init="tiny-test", roles=("utility",), epochs=2, **data)
    api.train(zone, model=base / "model", zone="store", **data)
    api.unlearn(zone / "model", run, method="zone-store", suite="quick", **data)
    assert expunge("keygen", "--out", tmp_path / "k.pem") == 0
    assert expunge("certify", run) == 1  # nothing says yet what the base was trained on
    assert expunge("certify", run, "--collect", "--key", tmp_path / "k.pem") == 0
    certificate = run / "certificate.json"
    again = ["verify", certificate, "--pub", tmp_path / "k.pub.pem", "--require", "L0"]
    told = ["--run", run, "--commitments", run / "certificate.keys.json", "--recompute"]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert expunge(*again, *told) == 0
    said = capsys.readouterr().out
    assert "the data is the data of the certificate." in said and "removal" in said
    assert said.count("all 6 claims come out the same") == 2
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    found = statement(certificate)["predicate"]
    assert found["verdict"] == "certified" and found["method"]["kind"] == "zone"
    assert {c["level"]: c["verdict"] for c in found["claims"]}["L0"] == "certified"
    text = read_envelope(certificate.read_bytes()).payload.decode() + (run / "certificate.html").read_text()
    dataset = load_dataset("people", options=DATA)
    for samples in dataset.roles.values():
        for sample in samples:
            for word in (
                sample.id,
                sample.subject,
                *sample.names,
                *sample.subject.split(),
                sample.prompt,
                sample.target,
            ):
                assert not word or str(word) not in text, word
    secret = json.loads((run / "certificate.keys.json").read_text())["keys"]
    assert not any(key in text for key in secret.values())
    blocks = run / "model" / "zone-blocks.safetensors"
    data = blocks.read_bytes()
    blocks.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert expunge(*again) == 1
